"""The training-free baselines against loops."""

import pytest
import torch

from stale.data.annotations import Video
from stale.detection.baselines import OPTIONS, baseline_proposals
from stale.detection.run import VideoResults, to_results
from stale.run_folder import BASELINES
from tests.reference.detection import plain_regions

V, T, K, C = 5, 10, 4, 32
LABELS = ["Diving", "GolfSwing", "HighJump", "Shotput"]
VIDEOS = [Video(f"video_{number}", "test", 10.0 + number, ()) for number in range(V)]


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(V, T, C), torch.randn(K, C) * 3


def plain_classes(name: str, features: torch.Tensor, text: torch.Tensor) -> dict[int, float]:
    """The classes that a row detects in a video, and their probabilities at CLIP's temperature.

    They are the softmax of the similarities to the mean of the unit-length snippets.
    """
    pooled = sum(f / f.norm() for f in features) / T
    similarity = torch.tensor([float(pooled @ w / pooled.norm() / w.norm()) for w in text])
    scores = dict(enumerate((similarity / 0.01).softmax(0).tolist()))
    best = max(scores, key=lambda label: scores[label])
    return scores if name.endswith("_all_classes") else {best: scores[best]}


def found_by(name: str, features: torch.Tensor, text: torch.Tensor) -> VideoResults:
    """Results of a baseline without suppression."""
    options = OPTIONS[name].model_copy(update={"nms_sigma": 1e9})
    return to_results(VIDEOS, baseline_proposals(name, features, text), LABELS, options)


@pytest.mark.parametrize("name", [name for name in BASELINES if name.startswith("whole_video")])
def test_whole_video_has_its_classes_on_the_whole_of_it(case: tuple, name: str) -> None:
    results = found_by(name, *case)
    for video, x in zip(VIDEOS, case[0], strict=True):
        expected = {LABELS[label]: score for label, score in plain_classes(name, x, case[1]).items()}
        rows = results[video.id]
        assert {tuple(row["segment"]) for row in rows} == {(0.0, video.duration)}
        assert {row["label"]: row["score"] for row in rows} == pytest.approx(expected, rel=1e-3)
        assert len(rows) == len(expected)


@pytest.mark.parametrize("name", [name for name in BASELINES if name.startswith("snippets")])
def test_snippets_are_regions_of_the_similarity_to_each_class(case: tuple, name: str) -> None:
    features, text = case
    results = found_by(name, features, text)
    for video, x in zip(VIDEOS, features, strict=True):
        expected = {}
        for label, score in plain_classes(name, x, text).items():
            similarity = [float(f @ text[label] / f.norm() / text[label].norm()) for f in x]
            low, high = min(similarity), max(similarity)
            curve = [(value - low) / (high - low) for value in similarity]
            for threshold in OPTIONS[name].thresholds:
                for start, end in plain_regions(curve, threshold):
                    span = (round(start * video.duration / T, 3), round(end * video.duration / T, 3))
                    expected[(LABELS[label], *span)] = score * max(curve[start:end])
        found = {(row["label"], *row["segment"]): row["score"] for row in results[video.id]}
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", BASELINES)
def test_scale_and_precision_do_not_matter_and_a_still_video_is_no_error(case: tuple, name: str) -> None:
    features, text = case
    expected = baseline_proposals(name, features, text)
    other = baseline_proposals(name, features.half() * 7, text * 5)
    torch.testing.assert_close(other.scores, expected.scores, rtol=0.05, atol=1e-3)
    still = baseline_proposals(name, features[:, :1].expand(-1, T, -1), text)
    assert ((still.scores >= 0) & (still.scores <= 1)).all()
