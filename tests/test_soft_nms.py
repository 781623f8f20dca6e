"""Gaussian SoftNMS against its definition, one video at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.detection.soft_nms import soft_nms


def slow_soft_nms(
    segments: list[list[float]], scores: list[float], labels: list[int], sigma: float, limit: int
) -> list[tuple[int, float]]:
    """Bodla et al. 2017, figure 2, with the Gaussian penalty, for the classes of one video."""
    left = dict(enumerate(scores))
    picked = []
    while left and len(picked) < limit:
        best = max(left, key=lambda index: (left[index], -index))
        score = left.pop(best)
        picked.append((best, score))
        for other in left:
            if labels[other] == labels[best]:
                left[other] *= math.exp(-(slow_tiou(segments[other], segments[best]) ** 2) / sigma)
    return picked


def slow_tiou(first: list[float], second: list[float]) -> float:
    overlap = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = first[1] - first[0] + second[1] - second[0] - overlap
    return overlap / union if union > 0 else 0.0


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
        expected = slow_soft_nms(segments[b].tolist(), scores[b].tolist(), labels[b].tolist(), sigma, limit)
        assert lowered[b].tolist() == pytest.approx([score for _, score in expected], rel=1e-9)
        assert picked[b].tolist() == [index for index, _ in expected]


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
