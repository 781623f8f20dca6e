"""Bad input of every kind, through the real commands: one clear line, exit code 2, nothing half-written.

What a reader alone can tell is tested beside it (test_annotations, test_splits, test_features, test_config, test_text,
test_evaluation_results); here it is what a user types, and what then lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_training import assert_same_runs, history
from tiny import SEEN, UNSEEN, tiny_config

from stale import memory
from stale.build import choose_device
from stale.checkpoint import load_checkpoint, save_checkpoint
from stale.detection import detector
from stale.detection.inference import infer
from stale.errors import StaleError, run_command
from stale.files import read_json, write_json, write_text
from stale.run import RunFolder
from stale.training.trainer import Trainer, train

DAMAGE = Callable[[Path], object]  # what is done to a copy of the data set, or of a run


def call(script: str, *arguments: object, patch: pytest.MonkeyPatch) -> int:
    """Run a command as if typed, in this process; its exit code."""
    patch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def contents(folder: Path) -> dict[str, str]:
    """Every file, hidden ones too, with its hash."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(code: int, captured: pytest.CaptureFixture, message: str) -> None:
    """Exit code 2 and one line of error that matches; before it only what the log says."""
    error = captured.readouterr().err.strip().splitlines()
    assert code == 2, error
    assert re.match(f"error: .*{message}", error[-1]), error[-1]
    assert len([line for line in error if "error" in line.lower()]) == 1
    assert not [line for line in error if "Traceback" in line]


# Ways to spoil a data set: each takes its folder


def edit_annotations(change: Callable[[dict], object]) -> DAMAGE:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "annotations.json").read_text())
        change(content["database"])
        (folder / "annotations.json").write_text(json.dumps(content))

    return damage


def first_entry(**changes: object) -> DAMAGE:
    return edit_annotations(lambda database: database["video_000"].update(changes))


def one_label(label: str) -> DAMAGE:
    return first_entry(annotations=[{"segment": [1, 5], "label": label}])


def edit_features(change: Callable[[np.ndarray], np.ndarray], video: str = "video_001") -> DAMAGE:
    def damage(folder: Path) -> None:
        with h5py.File(folder / "features.h5", "r+") as file:
            changed = change(file[video][()])
            del file[video]
            file[video] = changed

    return damage


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[3, 5] = value
        return array

    return change


def of_known_rate(then: DAMAGE, rate: object = 2.0) -> DAMAGE:
    """Damage to features that record how many snippets a second they have."""

    def damage(folder: Path) -> None:
        with h5py.File(folder / "features.h5", "r+") as file:
            file.attrs["fps"] = rate
        then(folder)

    return damage


def cut(name: str, to: int) -> DAMAGE:
    return lambda folder: os.truncate(folder / name, to)


def text(name: str, content: str) -> DAMAGE:
    return lambda folder: (folder / name).write_text(content)


def long_name(folder: Path) -> None:
    name = "very " * 90 + "long name"
    one_label(name)(folder)
    lists = folder / "splits/train_75_test_25/Tiny/train/split_0.list"
    lists.write_text(lists.read_text() + f"\n{name}\n")


def of_another_tower(folder: Path) -> None:
    weights = torch.load(folder / "text_tower.pt", weights_only=True)
    weights["text_projection"] = weights["text_projection"][:, :32]
    torch.save(weights, folder / "text_tower.pt")


def nothing(folder: Path) -> None:
    pass


def far_off(video: str) -> str:
    """The message of features that do not last as long as their video."""
    lengths = rf"{video} in .*features\.h5 \([\d.]+ s, annotated [\d.]+ s\)"
    return (
        f"1 of .* videos have features far longer or shorter than the annotated duration: {lengths}; extract them again"
        " or correct the annotations, or go on without them by data.misfit=skip"
    )


def a_video_twice(folder: Path) -> None:
    path = folder / "annotations.json"
    path.write_text(path.read_text().replace('"video_002"', '"video_003"'))


SEEN_LIST = "splits/train_75_test_25/Tiny/train/split_0.list"
UNSEEN_LIST = SEEN_LIST.replace("/train/", "/test/")

TRAIN = {
    # features
    "a video without": (
        lambda f: h5py.File(f / "features.h5", "r+").pop("video_001"),
        "1 of 24 .*: video_001; add them",
    ),
    "truncated": (cut("features.h5", 5000), "not an HDF5 file or damaged"),
    "empty file": (cut("features.h5", 0), "not an HDF5 file or damaged"),
    "NaN": (edit_features(with_value(np.nan)), "video 'video_001' in .*: NaN or infinite"),
    "infinite": (edit_features(with_value(-np.inf)), "video 'video_001' in .*: NaN or infinite"),
    "no snippet": (edit_features(lambda x: x[:0]), r"video 'video_001' in .*: shape \(0, 64\)"),
    "one wrong width": (edit_features(lambda x: x[:, :63]), "video 'video_001' in .*: width 63, but the others are 64"),
    "whole numbers": (edit_features(lambda x: x.astype(np.int32)), "type int32; float16 or float32"),
    "far shorter": (of_known_rate(edit_features(lambda x: x[: len(x) // 5])), far_off("video_001")),
    "far longer": (of_known_rate(edit_features(lambda x: np.tile(x, (5, 1)))), far_off("video_001")),
    "a rate that is none": (of_known_rate(nothing, "fast"), "video '.*' in .*: 'fps' is recorded as 'fast'; a number"),
    # annotations
    "broken JSON": (cut("annotations.json", 500), "annotation file is not valid JSON"),
    "empty annotations": (text("annotations.json", ""), "annotation file is not valid JSON"),
    "reversed segment": (first_entry(annotations=[{"segment": [5, 2], "label": "Diving"}]), "'video_000'.*ends before"),
    "zero duration": (first_entry(duration=0), "'video_000': 'duration' must be"),
    "a video twice": (a_video_twice, "annotations.json: video listed twice: video_003"),
    "label in no list": (one_label("Juggling"), "classes Juggling in neither train nor test"),
    "no training video": (
        text("annotations.json", '{"database": {}}'),
        "split_0.list: classes .* not in the annotations",
    ),
    "half a character": (one_label("\ud800"), "half a character"),
    # splits
    "a class on both sides": (text(UNSEEN_LIST, "\n".join([*UNSEEN, "Diving"])), "Diving in both train and test"),
    "unknown class": (text(SEEN_LIST, "\n".join([*SEEN, "Juggling"])), "Juggling not in the annotations"),
    "empty list": (text(SEEN_LIST, "\n \n"), "names no class"),
    "a class twice": (text(SEEN_LIST, "\n".join([*SEEN, "Diving"])), "names a class twice: Diving"),
    "name beyond the context": (long_name, "class name 'very very .*long name' needs .* tokens"),
    # text tower
    "no weights": (lambda f: (f / "text_tower.pt").unlink(), "text weights '.*text_tower.pt'"),
    "truncated weights": (cut("text_tower.pt", 9000), "text_tower.pt"),
    "another width": (of_another_tower, "features are 64 wide .*embedding is 32.*visual_projection"),
}


@pytest.mark.parametrize("row", TRAIN)
def test_training_refuses(
    row: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    damage, message = TRAIN[row]
    folder = copy_of(data, tmp_path / "data")
    damage(folder)
    code = call("train.py", "--config", folder / "tiny.yaml", "--output", tmp_path / "run", patch=monkeypatch)
    refused(code, capsys, message)
    assert not (tmp_path / "run").exists()


def copy_of(data: Path, folder: Path) -> Path:
    """The data set in a folder of its own."""
    shutil.copytree(data.parent, folder)
    write_text(folder / "tiny.yaml", data.read_text().replace(str(data.parent), str(folder)))
    return folder


# What is odd but no fault


ODD = {
    "one snippet": edit_features(lambda x: x[:1]),
    "constant": edit_features(lambda x: np.ones_like(x)),
    "of known rate": of_known_rate(nothing),
    "some snippets short": of_known_rate(edit_features(lambda x: x[:-5])),
    "some snippets long": of_known_rate(edit_features(lambda x: np.concatenate([x, x[:5]]))),
    "all zero": edit_features(lambda x: np.zeros_like(x)),
    "of a fifth of the duration": edit_features(lambda x: x[: len(x) // 5]),
    "of five times the duration": edit_features(lambda x: np.tile(x, (5, 1))),
    "as large as half precision goes": edit_features(lambda x: np.sign(x) * np.float16(65504)),
    "segment of zero length": edit_annotations(
        lambda videos: videos["video_000"]["annotations"].append({"segment": [3, 3], "label": "Diving"})
    ),
    "segment beyond the end": edit_annotations(
        lambda videos: videos["video_000"]["annotations"].append({"segment": [3, 9999], "label": "Diving"})
    ),
    "Windows lists": text(SEEN_LIST, "\r\n\r\n".join(SEEN) + "\r\n"),
    "stray blank lines, no final newline": text(UNSEEN_LIST, "\n".join(["", UNSEEN[0], " ", *UNSEEN[1:]])),
}


@pytest.mark.parametrize("row", ODD)
def test_training_and_detection_take(
    row: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of(data, tmp_path / "data")
    ODD[row](folder)
    line = ("--config", folder / "tiny.yaml", "--set", "train.epochs=1", "--output", tmp_path / "run")
    assert call("train.py", *line, patch=monkeypatch) == 0, capsys.readouterr().err
    assert call("inference.py", "--run", tmp_path / "run", patch=monkeypatch) == 0
    found = read_json(tmp_path / "run" / "detections.json", "detections")["results"]
    assert any(found.values())
    records = history(RunFolder(tmp_path / "run"))
    assert all(np.isfinite(value) for record in records for value in record.values())


# Options of train.py


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "train.device=cuda"], "train.device is cuda, but no GPU is usable here; use auto or cpu"),
        (["--set", "train.device=cuda:7"], "train.device is cuda:7, but no GPU"),
        (["--set", "train.device=gpu"], "train.device 'gpu' is unknown; use auto, cpu, cuda or cuda:N"),
        (["--set", "train.device=meta"], "train.device 'meta' is unknown"),
        (["--config", "none.yaml"], "configuration not found: none.yaml"),
        (
            ["--set", "train.epoch=1", "data.split=x", "model.masking.kind=none", "detection.name_by=proposals"],
            "did you mean 'train.epochs'.*data.split must be a whole number, not 'x'.*detection.name_by=proposals",
        ),
        (["--set", "model.text.template=" + "x" * 9999], "no {} for the class name"),
    ],
)
def test_options_of_train(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, more: list, message: str
) -> None:
    if "cuda" in more[-1] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = ["--config", data, *more] if more[0] == "--set" else more
    refused(call("train.py", *line, "--output", tmp_path / "run", patch=monkeypatch), capsys, message)
    assert not (tmp_path / "run").exists()


def test_the_option_that_named_the_device_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(StaleError, match="^--device is cuda:1, but no GPU is usable here; use auto or cpu$"):
        choose_device("cuda:1", "--device")


# An output folder that is taken


def test_a_run_is_replaced_only_when_asked_for(
    data: Path, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    foreign = {
        "notes.txt": "mine",
        "detections_mine.json": "{}",
        "checkpoints/epoch_7.pt": "mine",
        "pictures/a.png": "",
    }
    for name, content in foreign.items():
        write_text(folder / name, content)
    before = contents(folder)
    line = ("--config", data, "--set", "train.epochs=1", "train.seed=3", "--output", folder)
    refused(call("train.py", *line, patch=monkeypatch), capsys, "already holds a run.*--resume.*--overwrite")
    refused(call("train.py", *line, "--resume", patch=monkeypatch), capsys, "another train.seed")
    assert call("train.py", *line, "--resume", "--overwrite", patch=monkeypatch) == 2
    assert contents(folder) == before
    bad = (*line[:-2], "data.features=none.h5", *line[-2:])
    capsys.readouterr()
    refused(call("train.py", *bad, "--overwrite", patch=monkeypatch), capsys, "features not found")
    assert contents(folder) == before, "a mistake costs no run"

    assert call("train.py", *line, "--overwrite", patch=monkeypatch) == 0
    for name, content in foreign.items():
        assert (folder / name).read_text() == content
    expected = train(tiny_config(data, "train.epochs=1", "train.seed=3"), tmp_path / "new")
    assert_same_runs(RunFolder(folder), expected)
    left = {name for name in contents(folder) if "tfevents" not in name}
    assert left == {*foreign, *(name for name in contents(expected.path) if "tfevents" not in name)}


def test_everything_the_commands_write_into_a_run_is_its_own(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, copied.path)
    for vocabulary in ("unseen", "seen", "all"):
        assert call("inference.py", "--run", copied.path, "--vocabulary", vocabulary, patch=monkeypatch) == 0
        assert call("eval.py", "--run", copied.path, "--vocabulary", vocabulary, patch=monkeypatch) == 0
    infer(copied, oracle="masks")
    infer(copied, vocabulary="all", oracle="proposals")
    copied.clear()
    assert not list(copied.path.rglob("*"))


@pytest.mark.parametrize("option", [(), ("--resume",), ("--overwrite",)], ids=str)
def test_a_folder_that_is_no_run_is_left_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, option: tuple
) -> None:
    write_text(tmp_path / "run" / "log.txt", "somebody's")
    code = call("train.py", "--config", data, "--output", tmp_path / "run", *option, patch=monkeypatch)
    refused(code, capsys, "holds log.txt but no config.yaml")
    assert contents(tmp_path / "run").keys() == {"log.txt"}


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_no_write_permission(
    data: Path,
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    script: str,
) -> None:
    """The superuser may write anywhere, so the system call says no."""
    folder = tmp_path / "run"
    if script == "inference.py":
        shutil.copytree(run.path, folder)
    before = contents(tmp_path)

    def no(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    line = ("--config", data, "--output", folder) if script == "train.py" else ("--run", folder)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", no)
        code = call(script, *line, patch=patch)
    refused(code, capsys, f"cannot write {folder}.*: Permission denied")
    assert contents(tmp_path) == before


# Going on with a run under changed data


CHANGED = {
    "features of another tower": (
        lambda f: h5py.File(f / "features.h5", "r+").attrs.update({"backbone": "RN50", "weights_sha256": "ab"}),
        "features .*come from RN50.*trained on features of ViT-B/16",
    ),
    "another split": (
        lambda f: (
            (f / SEEN_LIST).write_text("\n".join(["GolfSwing", *SEEN[1:]]))
            and (f / UNSEEN_LIST).write_text("\n".join(["BaseballPitch", "PoleVault"]))
        ),
        r"split.json: the data have changed since the run began \(seen, unseen.* differ\)",
    ),
}


@pytest.mark.parametrize("row", CHANGED)
def test_changed_data_do_not_go_on(
    row: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    damage, message = CHANGED[row]
    folder = copy_of(data, tmp_path / "data")
    with h5py.File(folder / "features.h5", "r+") as file:
        file.attrs["backbone"] = "ViT-B/16"
    line = ("--config", folder / "tiny.yaml", "--output", tmp_path / "run", "--resume", "--set")
    assert call("train.py", *line, "train.epochs=1", patch=monkeypatch) == 0
    damage(folder)
    before = contents(tmp_path / "run")
    capsys.readouterr()
    refused(call("train.py", *line, "train.epochs=2", patch=monkeypatch), capsys, message)
    assert contents(tmp_path / "run") == before


# Runs and checkpoints that inference.py cannot use


def edit_checkpoint(change: Callable[[dict], object]) -> DAMAGE:
    def damage(folder: Path) -> None:
        path = folder / "checkpoints" / "best.pt"
        state = load_checkpoint(path)
        change(state)
        save_checkpoint(path, {key: value for key, value in state.items() if key not in ("kind", "version")})

    return damage


INFERENCE = {
    "no checkpoint": (lambda f: (f / "checkpoints/best.pt").unlink(), "checkpoint not found: .*best.pt"),
    "truncated": (cut("checkpoints/best.pt", 30_000), "best.pt cannot be read, it is damaged or no checkpoint"),
    "empty": (cut("checkpoints/best.pt", 0), "best.pt cannot be read, it is damaged or no checkpoint"),
    "not a checkpoint": (
        text("checkpoints/best.pt", "hello"),
        "best.pt cannot be read, it is damaged or no checkpoint",
    ),
    "other tensors": (
        lambda f: torch.save({"a": torch.ones(2)}, f / "checkpoints/best.pt"),
        "is not a checkpoint of this",
    ),
    "incomplete": (
        edit_checkpoint(lambda state: state.pop("feature_width")),
        r"is incomplete or damaged \(feature_width\)",
    ),
    "of another configuration": (
        lambda f: write_text(f / "config.yaml", (f / "config.yaml").read_text().replace("queries: 4", "queries: 9")),
        "best.pt does not fit this run's configuration",
    ),
    "of another tower": (
        edit_checkpoint(lambda state: state["features"].update(backbone="RN50")),
        "features .* come from ViT-B/16, but the run was trained on features of RN50: use the same image tower",
    ),
    "no configuration": (lambda f: (f / "config.yaml").unlink(), "no run in .*config.yaml is missing"),
    "broken configuration": (text("config.yaml", "train: ["), "config.yaml: not valid YAML"),
}


@pytest.mark.parametrize("row", INFERENCE)
def test_inference_refuses(
    row: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    damage, message = INFERENCE[row]
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    if row == "of another tower":
        config = run.load_config()
        features = copy_of(Path(config.data.annotations).parent / "tiny.yaml", tmp_path / "data") / "features.h5"
        with h5py.File(features, "r+") as file:
            file.attrs["backbone"] = "ViT-B/16"
        write_text(folder / "config.yaml", run.config.read_text().replace(config.data.features, str(features)))
    damage(folder)
    RunFolder(folder).detections("unseen").unlink()
    before = {name: value for name, value in contents(folder).items() if name != "log.txt"}
    refused(call("inference.py", "--run", folder, patch=monkeypatch), capsys, message)
    assert {name: value for name, value in contents(folder).items() if name != "log.txt"} == before


TEST_VIDEO = "video_030"  # with unseen classes
INFERENCE_DATA = {
    "a video without": (lambda f: h5py.File(f / "features.h5", "r+").pop(TEST_VIDEO), f"have no .*: {TEST_VIDEO}; add"),
    "no features": (lambda f: (f / "features.h5").unlink(), "features not found: .*features.h5; set data.features"),
    "truncated": (cut("features.h5", 5000), "not an HDF5 file or damaged"),
    "NaN": (edit_features(with_value(np.nan), TEST_VIDEO), f"video '{TEST_VIDEO}' in .*: NaN or infinite"),
    "no snippet": (edit_features(lambda x: x[:0], TEST_VIDEO), rf"video '{TEST_VIDEO}' in .*: shape \(0, 64\)"),
    "wrong width": (edit_features(lambda x: x[:, :63], TEST_VIDEO), f"video '{TEST_VIDEO}' in .*: width 63, but the"),
    "far shorter": (of_known_rate(edit_features(lambda x: x[: len(x) // 5], TEST_VIDEO)), far_off(TEST_VIDEO)),
    "far longer": (of_known_rate(edit_features(lambda x: np.tile(x, (5, 1)), TEST_VIDEO)), far_off(TEST_VIDEO)),
    "all of another width": (lambda f: of_width(f, 63), "features .*63 wide.* 64 wide"),
    "annotations broken": (cut("annotations.json", 500), "annotation file is not valid JSON"),
    "zero duration": (first_entry(duration=0), "'video_000': 'duration' must be"),
    "list broken": (text(UNSEEN_LIST, "\n"), "names no class"),
}


def of_width(folder: Path, width: int) -> None:
    """All features cut to ``width``."""
    with h5py.File(folder / "features.h5", "r+") as file:
        for name in list(file):
            narrow = file[name][:, :width]
            del file[name]
            file[name] = narrow


def moved(run: RunFolder, data: Path, folder: Path) -> RunFolder:
    """A copy of ``run`` without its detections, on a copy of its data set in ``folder / "data"``."""
    copy_of(data, folder / "data")
    shutil.copytree(run.path, folder / "run")
    copied = RunFolder(folder / "run")
    write_text(copied.config, run.config.read_text().replace(str(data.parent), str(folder / "data")))
    copied.detections("unseen").unlink()
    return copied


@pytest.mark.parametrize("row", INFERENCE_DATA)
def test_inference_refuses_data(
    row: str,
    data: Path,
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    damage, message = INFERENCE_DATA[row]
    copied = moved(run, data, tmp_path)
    damage(tmp_path / "data")
    before = {name: value for name, value in contents(copied.path).items() if name != "log.txt"}
    refused(call("inference.py", "--run", copied.path, patch=monkeypatch), capsys, message)
    assert {name: value for name, value in contents(copied.path).items() if name != "log.txt"} == before


def test_misfits_can_be_skipped_and_are_counted(
    data: Path, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    copied = moved(run, data, tmp_path)
    for video in (TEST_VIDEO, "video_001"):
        of_known_rate(edit_features(lambda x: x[: len(x) // 5], video))(tmp_path / "data")
    every = read_json(run.detections("unseen"), "detections")
    for word, skipped in (("skip", 1), ("keep", 0)):
        write_text(copied.config, copied.config.read_text().replace("misfit: stop", f"misfit: {word}"))
        assert call("inference.py", "--run", copied.path, patch=monkeypatch) == 0, capsys.readouterr().err
        found = read_json(copied.detections("unseen"), "detections")
        assert found["protocol"]["skipped_videos"] == skipped
        assert len(found["results"]) == len(every["results"]) - skipped
        write_text(copied.config, copied.config.read_text().replace(f"misfit: {word}", "misfit: stop"))
    line = ("--config", tmp_path / "data" / "tiny.yaml", "--set", "data.misfit=skip", "train.epochs=1")
    assert call("train.py", *line, "--output", tmp_path / "other", patch=monkeypatch) == 0
    said = f"skipped: 1 of 24 videos have features far longer.*video_001 in {tmp_path / 'data'}"
    assert re.search(said, (tmp_path / "other" / "log.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "none.npy", "--classes", "a"], "features not found: none.npy"),
        (["--features", "FEATURES", "--fps", "2", "--classes", "a", "a"], "class named twice: a"),
        (["--features", "FEATURES", "--fps", "2", "--classes", " "], "a name or a phrase is empty"),
        (["--features", "FEATURES", "--fps", "2", "--classes-file", "none.txt"], "classes file not found"),
        (["--features", "FEATURES", "--fps", "2", "--classes", "a", "--template", "b"], "has no {} for the class name"),
        (["--features", "FEATURES", "--fps", "2", "--classes", "very " * 90], "needs 9. tokens; .* has room"),
        (["--video", "none.mp4", "--classes", "a"], "video not found: none.mp4"),
        (["--device", "cuda:99"], "--device is cuda:99, but"),
        (["--checkpoint", "none.pt"], "checkpoint not found: none.pt"),
    ],
)
def test_options_of_inference(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    more: list,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [run.load_config().data.features if word == "FEATURES" else word for word in more]
    refused(call("inference.py", "--run", run.path, *filled, patch=monkeypatch), capsys, message)
    assert not list(tmp_path.iterdir())


def test_a_rate_that_is_none_beside_ones_own_features(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of several videos the others would go on, so it is no fault of the call."""
    np.save(tmp_path / "clip.npy", np.ones((9, 64), np.float32))
    write_json(tmp_path / "clip.json", {"fps": "fast"})
    monkeypatch.chdir(tmp_path)
    line = ("--run", run.path, "--features", tmp_path / "clip.npy", "--classes", "a")
    assert call("inference.py", *line, patch=monkeypatch) == 1
    assert "clip.npy: 'fps' is recorded as 'fast'; a number above 0 is expected" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


# Out of memory


def test_no_memory_names_the_knob(data: Path, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with (
        monkeypatch.context() as patch,
        pytest.raises(StaleError, match="out of GPU memory: lower train.batch_size .now 8"),
    ):
        patch.setattr(Trainer, "_step", no_memory)
        train(tiny_config(data), tmp_path / "run")
    with (
        monkeypatch.context() as patch,
        pytest.raises(StaleError, match="GPU memory: lower detection.batch_size .now 32"),
    ):
        patch.setattr(detector, "read_videos", no_memory)
        infer(run)
    knob = memory.names_knob("data.num_snippets", 9)
    with pytest.raises(StaleError, match="out of main memory: lower data.num_snippets .now 9"), knob:
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="^a fault of ours$"), memory.names_knob("train.batch_size", 9):
        raise RuntimeError("a fault of ours")


def test_a_batch_of_detection_may_change_between(data: Path, tmp_path: Path) -> None:
    """It changes no result, so lowering it does not cost the run."""
    train(tiny_config(data, "train.epochs=1"), tmp_path / "run")
    train(tiny_config(data, "train.epochs=1", "detection.batch_size=2"), tmp_path / "run", resume=True)


# Tracebacks and signals


@pytest.mark.parametrize("script", ["train.py", "inference.py", "eval.py"])
def test_a_traceback_only_with_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, script: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("--output", "run") if script == "train.py" else ("--run", "run")
    refused(call(script, *line, patch=monkeypatch), capsys, "")
    assert call(script, *line, "--debug", patch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "stale.errors.StaleError" in error
    assert error.splitlines()[-1].startswith("error: ")


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        Path("/none/at/all").read_text()

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: /none/at/all: No such file or directory\n"


def test_messages_are_one_line_whatever_they_quote(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise StaleError("class 'a\nb\x1b[2J\ud800'" + "x" * 10_000)

    with pytest.raises(SystemExit):
        run_command(main)
    error = capsys.readouterr().err
    assert error.startswith("error: class 'a\\nb\\x1b[2J\\ud800'xxx")
    assert error.count("\n") == 1
    assert len(error) < 5000


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    script = "import sys; sys.path.insert(0, sys.argv.pop())\nfrom stale.errors import run_command\n"
    script += "run_command(lambda: print('x' * 1_000_000))"
    line = f"{sys.executable} -c {json.dumps(script)!s} {REPOSITORY} | head -c 1 > /dev/null"
    result = subprocess.run(["bash", "-c", line.replace("\\n", "\n")], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""


def test_eval_refuses_what_it_cannot_write(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_json(tmp_path / "file", {})
    code = call("eval.py", "--run", run.path, "--json", tmp_path / "file" / "out.json", patch=monkeypatch)
    refused(code, capsys, "cannot write .*out.json")
