"""Gaussian SoftNMS against its definition, one video and class at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.config import DetectionConfig
from stale.detection.soft_nms import _MOST_PAIRS, _pick_together, soft_nms, vote
from tests.reference.detection import plain_soft_nms, plain_vote


def options_of(max_detections: int, sigma: float = 0.5, nms: str = "gaussian") -> DetectionConfig:
    return DetectionConfig(max_detections=max_detections, nms_sigma=sigma, nms=nms)


def random_proposals(seed: int, B: int, M: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    segments, scores, labels = random_proposals(seed, 4, M, K)
    scores[2, M // 2 :] = 0  # padding
    before = scores.clone()
    picked, lowered = soft_nms(segments, scores, labels, options_of(limit, sigma))
    assert picked.shape == lowered.shape == (4, min(M, limit))
    assert torch.equal(scores, before)
    for b in range(4):
        expected = plain_soft_nms(segments[b].numpy(), scores[b].numpy(), labels[b].numpy(), sigma, limit)
        real = sum(score > 0 for _, score in expected)
        assert picked[b, :real].tolist() == [index for index, _ in expected[:real]]
        assert lowered[b].tolist() == pytest.approx([score for _, score in expected], rel=1e-9)


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1.0])
def test_voting_equals_its_definition(threshold: float) -> None:
    segments, scores, labels = random_proposals(3, 4, 30, 2)
    segments[3, :5, 1] = segments[3, :5, 0]  # empty
    scores[2, 15:] = 0  # padding
    picked = soft_nms(segments, scores, labels, options_of(20))[0]
    voted = vote(segments, scores, labels, picked, threshold=threshold)
    for b in range(4):
        expected = [plain_vote(index, segments[b], scores[b], labels[b], threshold) for index in picked[b].tolist()]
        torch.testing.assert_close(voted[b], torch.tensor(expected, dtype=torch.double))
    moved = (voted - segments.gather(1, picked.unsqueeze(2).expand(-1, -1, 2))).abs().amax()
    assert (moved > 0.1) == (threshold < 1), "equal segments vote for themselves"


@pytest.mark.parametrize("form", ["gaussian", "official"])
@pytest.mark.parametrize("sigma", [0.5, 0.3])
def test_every_way_to_pick_gives_the_same_to_the_bit(form: str, sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    segments, scores, labels = random_proposals(1, 6, 300, 2)
    scores[2, 150:] = 0  # padding
    scores[3] = scores[3].round(decimals=1)  # equal scores in different classes
    proposals, options = (segments.float(), scores.float(), labels), options_of(250, sigma, form)
    by_class = soft_nms(*proposals, options)
    at_each_pick = _pick_together(*proposals, options)
    monkeypatch.setitem(_MOST_PAIRS, "cpu", 1 << 20)
    in_advance = soft_nms(*proposals, options)
    assert all(map(torch.equal, at_each_pick, in_advance))
    assert torch.equal(by_class[1], in_advance[1])
    found = in_advance[1] > 0  # the indices of padding are any
    assert torch.equal(by_class[0][found], in_advance[0][found])
    assert 0 < (~found).sum() < found.sum()


def test_only_the_official_form_raises_the_score_of_a_slight_overlap() -> None:
    segments = torch.tensor([[[0.0, 10.0], [9.0, 19.0], [0.0, 9.0], [30.0, 40.0]]])
    scores, labels = torch.tensor([[0.9, 0.5, 0.4, 0.3]]), torch.zeros(1, 4, dtype=torch.long)
    picked, lowered = soft_nms(segments, scores, labels, options_of(4, nms="official"))
    result = dict(zip(picked[0].tolist(), lowered[0].tolist(), strict=True))
    assert result[1] == pytest.approx(0.5 * math.exp(-10 * (1 / 19) ** 2) / 0.6)
    assert result[1] > 0.5
    assert result[2] == pytest.approx(0.4 * math.exp(-10 * 0.9**2) / 0.6, rel=1e-3)
    assert result[3] == pytest.approx(0.3), "no overlap, no change"
    picked, proper = soft_nms(segments, scores, labels, options_of(4))
    assert (proper <= scores.gather(1, picked)).all()
