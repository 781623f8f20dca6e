"""The library: three lines from features to a picture, any class names, and image encoders that must match."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import stale
from stale.api import Detector
from stale.checkpoint import load_checkpoint
from stale.data.dataset import rescale
from stale.data.features import Backbone
from stale.data.selection import load_test_data
from stale.detection.run import class_features, detect
from stale.errors import StaleError
from stale.run_folder import RunFolder
from stale.video.image_encoder import ImageEncoder
from tests.helpers import SNIPPETS, UNSEEN, WIDTH, random_image_encoder_weights


@pytest.fixture(scope="module")
def model(clip_run: Path) -> Detector:
    return stale.load(clip_run)


def some_features(snippets: int = 30, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((snippets, width)).astype(np.float32)


def test_three_lines(clip_run: Path, tmp_path: Path) -> None:
    model = stale.load(clip_run)
    detections = model.detect(some_features(), fps=5, classes=["high jump", "tennis swing"])
    figure = stale.plot(detections, tmp_path / "timeline.svg")

    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    assert "<svg" in (tmp_path / "timeline.svg").read_text()
    assert len(detections) > 0
    for item in detections:
        assert item["label"] in ("high jump", "tennis swing")
        assert 0 <= item["segment"][0] < item["segment"][1] <= 6.0
        assert 0 < item["score"] <= detections[0]["score"] <= 1
    assert str(detections).startswith("video\n    start")
    assert detections.class_scores.shape == (2, SNIPPETS)


def test_one_video_is_detected_as_the_test_set_is(model: Detector) -> None:
    test, classes = load_test_data(model.config, "unseen"), class_features(model.model, UNSEEN)
    features = torch.stack([rescale(torch.from_numpy(test.store.read(video.id)), SNIPPETS) for video in test.videos])
    expected = detect(model.model, test.videos, features, classes, options=model.config.detection, progress=False)
    for video in test.videos[:3]:
        raw = test.store.read(video.id)
        given = model.detect(raw, len(raw) / video.duration, list(UNSEEN), name=video.id)
        for found in (given, model.detect_annotated(video.id)):
            scores = [item["score"] for item in found]
            assert scores == pytest.approx([item["score"] for item in expected[video.id]], abs=1e-3)


def test_an_annotated_video_that_is_unknown_is_an_error(model: Detector) -> None:
    assert model.detect_annotated("video_000", "seen").video.instances, "a training video, with its ground truth"
    with pytest.raises(StaleError, match=r"video 'video_00' is not in .*did you mean 'video_0"):
        model.detect_annotated("video_00")


def test_tensors_half_precision_and_lists_are_accepted(model: Detector) -> None:
    features = some_features()
    found = model.detect(features, 5, ["diving"])
    for other in (torch.from_numpy(features), features.tolist(), features[::-1].copy()[::-1]):
        np.testing.assert_allclose(model.detect(other, 5, ["diving"]).class_scores, found.class_scores, atol=1e-5)
    for half in (features.astype(np.float16), torch.from_numpy(features).bfloat16()):
        np.testing.assert_allclose(model.detect(half, 5, ["diving"]).class_scores, found.class_scores, atol=0.05)


@pytest.mark.parametrize(
    ("features", "fps", "classes", "message"),
    [
        (some_features(), 5, [], "no classes"),
        (some_features(), 5, ["a", " a "], "named twice: a"),
        *((some_features(), 5, ["a", name], "empty") for name in ("", " | ")),
        *((some_features(), fps, ["a"], "fps") for fps in (0, np.nan, np.inf, 5e-324)),
        (some_features(width=WIDTH + 8), 5, ["a"], "72 wide.*64 wide: use the same image encoder"),
        (some_features()[0], 5, ["a"], "shape"),
        (some_features() * np.nan, 5, ["a"], "NaN"),
        (some_features(), 5, ["word " * 100], "tokens"),
    ],
)
def test_bad_input_is_one_clear_line(model: Detector, features, fps, classes, message: str) -> None:
    with pytest.raises(StaleError, match=message) as error:
        model.detect(features, fps, classes)
    assert "\n" not in str(error.value)


def test_several_phrases_of_a_class_are_averaged(model: Detector) -> None:
    def text(*classes: str | dict, templates: tuple[str, ...] = ()) -> torch.Tensor:
        named = classes[0] if isinstance(classes[0], dict) else classes
        return torch.nn.functional.normalize(model.class_features(named, templates).text, dim=-1)

    one, two = text("diving"), text("a person jumps into water")
    both = text("diving | a person jumps into water")
    torch.testing.assert_close(both, text({"diving": ["diving", "a person jumps into water"]}))
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + two, dim=-1))
    torch.testing.assert_close(text("diving", "golf"), torch.cat([one, text("golf")]))
    torch.testing.assert_close(text("diving", templates=("{}.",)), one)  # the learned prompt's own text
    ensemble = text("diving", templates=("a video of {}", "a photo of {}"))
    parts = text("diving", templates=("a video of {}",)) + text("diving", templates=("a photo of {}",))
    torch.testing.assert_close(ensemble, torch.nn.functional.normalize(parts, dim=-1))


# Image encoders


def test_checkpoints_record_the_image_encoder_of_the_features(clip_run: Path, model: Detector, tmp_path: Path) -> None:
    expected = ImageEncoder(random_image_encoder_weights(), torch.device("cpu")).backbone
    assert model.backbone == expected
    for name in ("best", "last"):
        assert load_checkpoint(RunFolder(clip_run).checkpoint(name))["features"] == expected.as_dict()
    state = load_checkpoint(RunFolder(clip_run).checkpoint("best"))
    del state["features"]
    torch.save(state, tmp_path / "old.pt")
    old = stale.load(clip_run, str(tmp_path / "old.pt"))
    assert old.backbone == Backbone()
    assert len(old.detect(some_features(), 5, ["diving"]))


def test_another_or_no_image_encoder_is_a_clear_error(clip_run: Path, model: Detector, tmp_path: Path) -> None:
    torch.save(random_image_encoder_weights(seed=1), tmp_path / "other.pt")
    with pytest.raises(StaleError, match="other.pt come from .*the run was trained on .*use the same image encoder"):
        model.load_encoder(tmp_path / "other.pt")
    unknown = replace(model, backbone=Backbone())
    torch.save(random_image_encoder_weights(output_width=32), tmp_path / "narrow.pt")
    with pytest.raises(StaleError, match="32 wide.*64 wide: use the same image encoder"):
        unknown.load_encoder(tmp_path / "narrow.pt")
    without = stale.load(clip_run)
    weights = torch.load(without.config.model.text.weights)
    torch.save({k: v for k, v in weights.items() if not k.startswith("visual.")}, tmp_path / "text.pt")
    without.config.model.text.weights = str(tmp_path / "text.pt")
    with pytest.raises(StaleError, match="--image-weights"):
        without.load_encoder()
