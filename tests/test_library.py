"""The library: three lines from features to a picture, any class names, and towers that must match."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from matplotlib.figure import Figure

import stale
from stale.build import load_test_data, phrases
from stale.checkpoint import load_checkpoint
from stale.data.dataset import rescale
from stale.data.tower import Tower
from stale.data.vocabulary import NamedClass, fill_template, parse_classes, read_classes
from stale.detection.detector import detect
from stale.detection.library import Detector
from stale.errors import StaleError
from stale.files import write_json
from stale.run import RunFolder
from stale.video.encoder import ImageEncoder
from tests.clips import image_tower_weights, make_clip, write_classes
from tests.tiny import SNIPPETS, UNSEEN, WIDTH


@pytest.fixture(scope="module")
def model(clip_run: Path) -> Detector:
    return stale.load(clip_run)


def some_features(snippets: int = 30, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((snippets, width)).astype(np.float32)


def same(one: stale.VideoDetections, other: stale.VideoDetections) -> bool:
    return np.allclose(one.class_scores, other.class_scores, atol=1e-5)


def test_three_lines(clip_run: Path, tmp_path: Path) -> None:
    model = stale.load(clip_run)
    detections = model.detect(some_features(), fps=5, classes=["high jump", "tennis swing"])
    figure = stale.plot(detections, tmp_path / "timeline.svg")

    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    assert "<svg" in (tmp_path / "timeline.svg").read_text()
    assert len(detections) > 0
    for item in detections:
        assert item["label"] in ("high jump", "tennis swing")
        assert 0 <= item["segment"][0] < item["segment"][1] <= 6.0
        assert 0 < item["score"] <= 1
    assert [item["score"] for item in detections] == sorted((item["score"] for item in detections), reverse=True)
    assert detections[0] in detections
    assert str(detections).startswith("video\n    start")
    assert detections.class_scores.shape == (2, SNIPPETS)


def test_importing_the_package_stays_light() -> None:
    script = "import sys, stale; assert not {'torch', 'matplotlib', 'numpy', 'av'} & set(sys.modules); stale.load"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_it_is_the_path_of_the_runs_own_test_videos(clip_run: Path, model: Detector) -> None:
    config = RunFolder(clip_run).load_config()
    test = load_test_data(config, "unseen")
    features = torch.stack([rescale(torch.from_numpy(test.store.read(video.id)), SNIPPETS) for video in test.videos])
    expected = detect(model.model, test.videos, features, list(UNSEEN), phrases(UNSEEN), config.detection)
    for video in test.videos[:3]:
        raw = test.store.read(video.id)
        found = model.detect(raw, len(raw) / video.duration, list(UNSEEN), name=video.id)
        assert len(found) == len(expected[video.id])
        for mine, theirs in zip(found, expected[video.id], strict=True):
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)


def test_tensors_half_precision_and_lists_are_understood(model: Detector) -> None:
    features = some_features()
    found = model.detect(features, 5, ["diving"])
    assert same(found, model.detect(torch.from_numpy(features), 5, ["diving"]))
    assert same(found, model.detect(features.tolist(), 5, ["diving"]))
    half = model.detect(features.astype(np.float16), 5, ["diving"])
    np.testing.assert_allclose(half.class_scores, found.class_scores, atol=0.05)


@pytest.mark.parametrize(
    ("features", "fps", "classes", "message"),
    [
        (some_features(), 5, [], "no classes"),
        (some_features(), 5, ["a", " a "], "named twice: a"),
        (some_features(), 5, ["a", ""], "empty"),
        (some_features(), 5, ["a | "], "empty"),
        (some_features(), 0, ["a"], "fps"),
        (some_features(), float("nan"), ["a"], "fps"),
        (some_features(width=WIDTH + 8), 5, ["a"], "72 wide.*64 wide: use the same image tower"),
        (some_features()[0], 5, ["a"], "shape"),
        (some_features() * np.nan, 5, ["a"], "NaN"),
        (some_features(), 5, ["word " * 100], "tokens"),
    ],
)
def test_bad_input_is_one_clear_line(model: Detector, features, fps, classes, message: str) -> None:
    with pytest.raises(StaleError, match=message) as error:
        model.detect(features, fps, classes)
    assert "\n" not in str(error.value)


# Vocabulary


def test_several_phrases_of_a_class_are_averaged(model: Detector) -> None:
    def text(*classes: str, templates: tuple[str, ...] = ()) -> torch.Tensor:
        return torch.nn.functional.normalize(model._describe(parse_classes(classes), templates), dim=-1)

    one, two = text("diving"), text("a person jumps into water")
    both = text("diving | a person jumps into water")
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + two, dim=-1))
    torch.testing.assert_close(text("diving", "golf"), torch.cat([one, text("golf")]))
    torch.testing.assert_close(text("diving", templates=("{}.",)), one)  # the learned prompt's own text
    assert not torch.allclose(text("diving", templates=("a video of {}",)), one)
    ensemble = text("diving", templates=("a video of {}", "a photo of {}"))
    parts = text("diving", templates=("a video of {}",)) + text("diving", templates=("a photo of {}",))
    torch.testing.assert_close(ensemble, torch.nn.functional.normalize(parts, dim=-1))


def test_classes_may_be_a_mapping_or_text(model: Detector) -> None:
    features = some_features()
    by_text = model.detect(features, 5, ["dive | diving | jump"])
    by_mapping = model.detect(features, 5, {"dive": ["dive", "diving", "jump"]})
    assert same(by_text, by_mapping)
    assert by_text.classes == by_mapping.classes == ["dive"]
    assert parse_classes("high jump") == [NamedClass("high jump", ("high jump",))]
    assert parse_classes(["HighJump"]) == [NamedClass("HighJump", ("high jump",))]
    assert parse_classes({"a": "one phrase"}) == [NamedClass("a", ("one phrase",))]


def test_classes_are_read_from_lines_or_json(tmp_path: Path) -> None:
    lines = write_classes(
        tmp_path / "c.txt", "# sports", "HighJump", "", "  serve | a tennis serve ", "\tgolf: putt, 9"
    )
    expected = [
        NamedClass("HighJump", ("high jump",)),
        NamedClass("serve", ("serve", "a tennis serve")),
        NamedClass("golf: putt, 9", ("golf: putt, 9",)),
    ]
    assert read_classes(lines) == expected
    write_json(tmp_path / "c.json", {"x": ["y", "z"], "w": "v"})
    assert read_classes(tmp_path / "c.json") == [NamedClass("x", ("y", "z")), NamedClass("w", ("v",))]
    write_json(tmp_path / "l.json", ["HighJump"])
    assert read_classes(tmp_path / "l.json") == expected[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "# nothing", "c.txt: no classes"),
        ("c.txt", "a\na", "c.txt: class named twice: a"),
        ("c.json", '{"a": 3}', "list of names"),
        ("c.json", "3", "list of names"),
        ("c.json", '{"a": []}', "empty"),
        ("c.json", "{", "JSON"),
    ],
)
def test_bad_classes_files_are_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(StaleError, match=message):
        read_classes(tmp_path / name)


def test_a_template_takes_the_phrase() -> None:
    assert fill_template(["a", "b"], ["x {}", "{} y"]) == ["x a", "a y", "x b", "b y"]
    with pytest.raises(StaleError, match="'x' has no"):
        fill_template(["a"], ["x"])


# Towers


def test_the_checkpoints_record_the_tower_of_the_features(clip_run: Path, model: Detector) -> None:
    expected = ImageEncoder(image_tower_weights(), torch.device("cpu")).tower
    assert model.tower == expected
    for name in ("best", "last"):
        assert load_checkpoint(RunFolder(clip_run).checkpoint(name))["features"] == expected.as_dict()


def test_a_video_is_detected_by_the_runs_own_weights(model: Detector, tmp_path: Path) -> None:
    pytest.importorskip("av")
    found = model.detect_video(make_clip(tmp_path / "clip.mkv"), ["diving"], fps=2)
    assert found.video.id == "clip"
    assert found.video.duration == pytest.approx(4.0, abs=0.11)
    assert found.thumbnails
    assert stale.plot(found).axes[0].images, "thumbnails are drawn"
    (tmp_path / "clip.mkv").write_bytes(b"broken")
    with pytest.raises(StaleError, match="clip.mkv"):
        model.detect_video(tmp_path / "clip.mkv", ["diving"])


def test_another_tower_is_a_clear_error(model: Detector, tmp_path: Path) -> None:
    torch.save(image_tower_weights(seed=1), tmp_path / "other.pt")
    with pytest.raises(StaleError, match="other.pt come from .*weights.*the run was trained on .*same image tower"):
        model.load_encoder(tmp_path / "other.pt")
    np.save(tmp_path / "clip.npy", some_features())
    write_json(tmp_path / "clip.json", {"fps": 5, "backbone": "ViT-L/14"})
    ((name, result),) = model.detect_stored([tmp_path / "clip.npy"], ["diving"])
    assert name == "clip"
    assert isinstance(result, StaleError)
    assert "come from ViT-L/14" in str(result)


def test_a_tower_of_another_width_is_an_error_even_where_its_name_is_unknown(clip_run: Path, tmp_path: Path) -> None:
    model = stale.load(clip_run)
    model.tower = Tower()
    torch.save(image_tower_weights(output_width=32), tmp_path / "narrow.pt")
    with pytest.raises(StaleError, match="32 wide.*64 wide: use the same image tower"):
        model.load_encoder(tmp_path / "narrow.pt")


def test_text_weights_without_an_image_tower_say_what_to_give(clip_run: Path, tmp_path: Path) -> None:
    model = stale.load(clip_run)
    weights = torch.load(model.config.model.text.weights)
    torch.save({k: v for k, v in weights.items() if not k.startswith("visual.")}, tmp_path / "text.pt")
    model.config.model.text.weights = str(tmp_path / "text.pt")
    with pytest.raises(StaleError, match="no image tower.*--image-weights"):
        model.load_encoder()


def test_a_checkpoint_that_records_no_tower_still_loads(clip_run: Path, tmp_path: Path) -> None:
    state = load_checkpoint(RunFolder(clip_run).checkpoint("best"))
    del state["features"]
    torch.save(state, tmp_path / "old.pt")
    model = stale.load(clip_run, str(tmp_path / "old.pt"))
    assert model.tower == Tower()
    assert len(model.detect(some_features(), 5, ["diving"]))
