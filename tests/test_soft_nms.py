"""Gaussian SoftNMS against its definition, one video and class at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.benchmarks.nms import as_table, plain_soft_nms
from stale.detection.soft_nms import _PAIRS, _pick_from_table, soft_nms


def random_candidates(seed: int, B: int, M: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    segments = torch.randint(0, 12, (B, M, 2), generator=generator).double().sort(2).values
    segments[..., 1] += 1
    scores = torch.rand(B, M, generator=generator, dtype=torch.double)
    return segments, scores, torch.randint(0, K, (B, M), generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    M=st.integers(1, 25),
    K=st.integers(1, 3),
    sigma=st.sampled_from([0.1, 0.5, 2.0]),
    limit=st.integers(1, 30),
)
def test_soft_nms_equals_its_definition(seed: int, M: int, K: int, sigma: float, limit: int) -> None:
    segments, scores, labels = random_candidates(seed, 4, M, K)
    picked, lowered = soft_nms(segments, scores, labels, sigma, limit)
    assert picked.shape == lowered.shape == (4, min(M, limit))
    for b in range(4):
        expected = plain_soft_nms(as_table(segments[b], scores[b], labels[b]), sigma, limit)
        assert lowered[b].tolist() == pytest.approx(expected["score"].tolist(), rel=1e-9)
        assert picked[b].tolist() == expected["candidate"].tolist()


@pytest.mark.parametrize("form", ["gaussian", "official"])
def test_every_way_gives_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors made at each pick, those of all pairs made before, and these a video at a time."""
    segments, scores, labels = random_candidates(1, 6, 40, 3)
    candidates = (segments.float(), scores.float(), labels)
    few = soft_nms(*candidates, 0.5, 30, form)
    monkeypatch.setitem(_PAIRS, "cpu", 0)
    assert all(map(torch.equal, soft_nms(*candidates, 0.5, 30, form), few))
    monkeypatch.setitem(_PAIRS, "cpu", 10**9)
    monkeypatch.setattr("stale.detection.soft_nms._pick_one_by_one", _pick_from_table)
    assert all(map(torch.equal, soft_nms(*candidates, 0.5, 30, form), few))


def test_a_batch_equals_its_videos() -> None:
    segments, scores, labels = random_candidates(3, 5, 20, 2)
    scores[2, 11:] = 0  # padded
    together = soft_nms(segments, scores, labels, 0.5, 15)
    for b in range(5):
        alone = soft_nms(segments[b : b + 1], scores[b : b + 1], labels[b : b + 1], 0.5, 15)
        assert torch.equal(alone[1][0], together[1][b])
        real = alone[1][0] > 0
        assert torch.equal(alone[0][0][real], together[0][b][real])


def test_classes_do_not_touch_each_other() -> None:
    segments = torch.tensor([[[0.0, 4.0], [0.0, 4.0], [0.0, 4.0]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0, 1, 0]])
    picked, lowered = soft_nms(segments, scores, labels, 0.5, 3)
    assert picked.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(lowered, torch.tensor([[0.9, 0.8, 0.7 * math.exp(-2)]]))


def test_overlap_never_raises_a_score() -> None:
    """The released code divides by 0.6, so that a slight overlap raises a score."""
    segments, scores, labels = random_candidates(5, 8, 25, 1)
    picked, lowered = soft_nms(segments, scores, labels, 0.5, 25)
    assert (lowered <= scores.gather(1, picked)).all()
    assert (lowered.diff(dim=1) <= 0).all()


def test_every_candidate_is_picked_once_and_padding_last() -> None:
    segments = torch.tensor([[[0.0, 4.0]] * 60 + [[0.0, 0.0]] * 4])
    scores = torch.cat([torch.linspace(1, 0.5, 60), torch.zeros(4)])[None]
    picked, lowered = soft_nms(segments, scores, torch.zeros(1, 64, dtype=torch.long), 0.5, 64)
    real = picked[0][lowered[0] > 0].tolist()
    assert len(real) == len(set(real))
    assert max(real) < 60
    assert (lowered[0, 60:] == 0).all()


def test_the_inputs_are_left_alone() -> None:
    segments, scores, labels = random_candidates(0, 2, 10, 2)
    before = scores.clone()
    soft_nms(segments, scores, labels, 0.5, 10)
    assert torch.equal(scores, before)
