"""The rows that need no training, against loops."""

from __future__ import annotations

import pytest
import torch

from scripts.benchmarks.decode import plain_regions
from stale.config import DetectionConfig
from stale.data.annotations import Video
from stale.detection.untrained import ROWS, detect_untrained

V, T, K, C = 5, 10, 4, 32
LABELS = ["Diving", "GolfSwing", "HighJump", "Shotput"]
OPTIONS = DetectionConfig(batch_size=2, thresholds=[0.0, 0.25, 0.5, 0.75], nms_sigma=0.5)


@pytest.fixture
def case() -> tuple[list[Video], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    videos = [Video(f"video_{number}", "test", 10.0 + number, ()) for number in range(V)]
    return videos, torch.randn(V, T, C), torch.randn(K, C) * 3


def slow_similarity(features: torch.Tensor, text: torch.Tensor) -> list[list[float]]:
    """One video: cosine of class k and snippet t."""
    return [[float(f @ w / f.norm() / w.norm()) for f in features] for w in text]


def slow_class(features: torch.Tensor, text: torch.Tensor) -> tuple[int, float]:
    """The class most similar to the mean of the unit-length snippets, and its probability at CLIP's temperature."""
    pooled = sum(f / f.norm() for f in features) / T
    similarity = torch.tensor([float(pooled @ w / pooled.norm() / w.norm()) for w in text])
    return int(similarity.argmax()), float((similarity / 0.01).softmax(0).max())


def test_whole_video_is_the_best_class_on_all_of_it(case: tuple) -> None:
    videos, features, text = case
    results = detect_untrained("whole_video", videos, features, text, LABELS, OPTIONS)
    assert list(results) == [video.id for video in videos]
    for video, x in zip(videos, features, strict=True):
        label, score = slow_class(x, text)
        (row,) = results[video.id]
        assert row["segment"] == [0.0, video.duration]
        assert row["label"] == LABELS[label]
        assert row["score"] == pytest.approx(score, rel=1e-4)


def test_snippets_are_the_regions_of_the_best_class(case: tuple) -> None:
    videos, features, text = case
    options = DetectionConfig(batch_size=2, thresholds=OPTIONS.thresholds, nms_sigma=1e9)  # SoftNMS lowers nothing
    results = detect_untrained("snippets", videos, features, text, LABELS, options)
    for video, x in zip(videos, features, strict=True):
        similarity = slow_similarity(x, text)
        label, score = slow_class(x, text)
        low, high = min(similarity[label]), max(similarity[label])
        curve = [(value - low) / (high - low) for value in similarity[label]]
        expected = {}
        for threshold in options.thresholds:
            for start, end in plain_regions(curve, threshold):
                peak = max(curve[start:end])
                span = (round(start * video.duration / T, 3), round(end * video.duration / T, 3))
                expected[span] = score * peak
        assert {tuple(row["segment"]): row["score"] for row in results[video.id]} == pytest.approx(expected, rel=1e-3)
        assert {row["label"] for row in results[video.id]} == {LABELS[label]}


@pytest.mark.parametrize("row", ROWS)
def test_lengths_of_vectors_and_batches_do_not_matter(case: tuple, row: str) -> None:
    videos, features, text = case
    results = detect_untrained(row, videos, features, text, LABELS, OPTIONS)
    other = detect_untrained(row, videos, features.half() * 7, text * 5, LABELS, DetectionConfig(
        batch_size=3, thresholds=OPTIONS.thresholds))  # fmt: skip
    for video in videos:
        assert [item["label"] for item in other[video.id]] == [item["label"] for item in results[video.id]]
        pairs = zip(other[video.id], results[video.id], strict=True)
        assert all(a["score"] == pytest.approx(b["score"], rel=0.05) for a, b in pairs)


@pytest.mark.parametrize("row", ROWS)
def test_a_still_video_is_no_error(case: tuple, row: str) -> None:
    videos, features, text = case
    still = features[:, :1].expand(-1, T, -1)
    results = detect_untrained(row, videos, still, text, LABELS, OPTIONS)
    assert set(results) == {video.id for video in videos}
    scores = [item["score"] for rows in results.values() for item in rows]
    assert all(0 < score <= 1 for score in scores)
