"""The training-free baselines against loops."""

from __future__ import annotations

import pytest
import torch

from stale.data.annotations import Video
from stale.detection.baselines import OPTIONS, baseline_proposals
from stale.detection.run import to_results
from stale.run_folder import BASELINES
from tests.reference.detection import plain_regions

V, T, K, C = 5, 10, 4, 32
LABELS = ["Diving", "GolfSwing", "HighJump", "Shotput"]
VIDEOS = [Video(f"video_{number}", "test", 10.0 + number, ()) for number in range(V)]


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(V, T, C), torch.randn(K, C) * 3


def plain_class(features: torch.Tensor, text: torch.Tensor) -> tuple[int, float]:
    """The class most similar to the mean of the unit-length snippets, and its probability at CLIP's temperature."""
    pooled = sum(f / f.norm() for f in features) / T
    similarity = torch.tensor([float(pooled @ w / pooled.norm() / w.norm()) for w in text])
    return int(similarity.argmax()), float((similarity / 0.01).softmax(0).max())


def test_whole_video_is_its_best_class(case: tuple) -> None:
    features, text = case
    results = to_results(VIDEOS, baseline_proposals("whole_video", features, text), LABELS, OPTIONS)
    for video, x in zip(VIDEOS, features, strict=True):
        label, score = plain_class(x, text)
        (row,) = results[video.id]
        assert (row["segment"], row["label"]) == ([0.0, video.duration], LABELS[label])
        assert row["score"] == pytest.approx(score, rel=1e-4)


def test_snippets_are_regions_of_the_best_class(case: tuple) -> None:
    features, text = case
    no_suppression = OPTIONS.model_copy(update={"nms_sigma": 1e9})
    results = to_results(VIDEOS, baseline_proposals("snippets", features, text), LABELS, no_suppression)
    for video, x in zip(VIDEOS, features, strict=True):
        label, score = plain_class(x, text)
        similarity = [float(f @ text[label] / f.norm() / text[label].norm()) for f in x]
        low, high = min(similarity), max(similarity)
        curve = [(value - low) / (high - low) for value in similarity]
        expected = {}
        for threshold in OPTIONS.thresholds:
            for start, end in plain_regions(curve, threshold):
                span = (round(start * video.duration / T, 3), round(end * video.duration / T, 3))
                expected[span] = score * max(curve[start:end])
        assert {tuple(row["segment"]): row["score"] for row in results[video.id]} == pytest.approx(expected, rel=1e-3)
        assert {row["label"] for row in results[video.id]} == {LABELS[label]}


@pytest.mark.parametrize("name", BASELINES)
def test_scale_and_precision_do_not_matter_and_a_still_video_is_no_error(case: tuple, name: str) -> None:
    features, text = case
    expected = baseline_proposals(name, features, text)
    other = baseline_proposals(name, features.half() * 7, text * 5)
    torch.testing.assert_close(other.scores, expected.scores, rtol=0.05, atol=1e-3)
    still = baseline_proposals(name, features[:, :1].expand(-1, T, -1), text)
    assert ((still.scores >= 0) & (still.scores <= 1)).all()
