"""Bad input of every kind, through the real commands: one clear line, exit code 2, nothing half-written.

What one loader alone can tell is tested beside it; here it is what a user types, and what then lies on the disk.
"""

import gc
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stale import progress
from stale.api import infer
from stale.checkpoint import load_checkpoint, save_checkpoint
from stale.device import out_of_memory_hint
from stale.errors import StaleError, run_command
from stale.io import read_json, write_text
from stale.run_folder import RunFolder
from stale.training.trainer import train
from tests.helpers import REPOSITORY, SEEN, UNSEEN, assert_same_runs, copy_data_set, tiny_config

DAMAGE = Callable[[Path], object]  # damages a copy of the data set, or of a run


@dataclass
class Command:
    """Runs a command as if typed, in this process."""

    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture

    def __call__(self, script: str, *arguments: object) -> int:
        """Return the exit code."""
        self.patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    def is_refused(self, message: str, script: str, *arguments: object) -> None:
        """Check for exit code 2 and one line of error that matches; before it stands only the log."""
        self.capture.readouterr()
        code, error = self(script, *arguments), self.capture.readouterr().err.strip().splitlines()
        assert code == 2, error
        assert re.match(f"error: .*{message}", error[-1]), error[-1]
        assert len([line for line in error if "error" in line.lower()]) == 1
        assert not [line for line in error if "Traceback" in line]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    return Command(monkeypatch, capsys)


def contents(folder: Path) -> dict[str, str]:
    """Every file, hidden ones too, with its hash; without the log."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Ways to damage a data set, given its folder


def first_entry(**changes: object) -> DAMAGE:
    def damage(folder: Path) -> None:
        content = read_json(folder / "annotations.json", "annotations")
        content["database"]["video_000"].update(changes)
        write_text(folder / "annotations.json", json.dumps(content))

    return damage


def one_label(label: str) -> DAMAGE:
    return first_entry(annotations=[{"segment": [1, 5], "label": label}])


def edit_features(
    change: Callable[[np.ndarray], np.ndarray], video: str | None = "video_001", rate: object = None
) -> DAMAGE:
    """Change the array of a video, None for all; ``rate`` is recorded as the number of snippets a second."""

    def damage(folder: Path) -> None:
        gc.collect()  # close the file of a training that waits for the garbage collection
        with h5py.File(folder / "features.h5", "r+") as file:
            for name in [video] if video else list(file):
                changed = change(file[name][()])
                del file[name]
                file[name] = changed
        if rate is not None:
            record(folder, fps=rate)

    return damage


def record(folder: Path, **attributes: object) -> None:
    with h5py.File(folder / "features.h5", "r+") as file:
        file.attrs.update(attributes)


def one_nan(array: np.ndarray) -> np.ndarray:
    array[3, 5] = np.nan
    return array


def cut(name: str, to: int) -> DAMAGE:
    return lambda folder: os.truncate(folder / name, to)


def text(name: str, content: str) -> DAMAGE:
    return lambda folder: (folder / name).write_text(content)


def far_off(video: str) -> str:
    """The message of features that do not last as long as their video."""
    return (
        rf"1 of .* videos have features far longer or shorter than .*: {video} in .* \([\d.]+ s, annotated [\d.]+ s\)"
    )


SEEN_LIST = "splits/train_75_test_25/Tiny/train/split_0.list"
UNSEEN_LIST = SEEN_LIST.replace("/train/", "/test/")

TRAIN = {
    # features
    "a video without": (lambda f: h5py.File(f / "features.h5", "r+").pop("video_001"), "1 of 24 .*: video_001; add"),
    "truncated": (cut("features.h5", 5000), "not an HDF5 file or damaged"),
    "NaN": (edit_features(one_nan), "video 'video_001' in .*: NaN or infinite"),
    "one wrong width": (edit_features(lambda x: x[:, :63]), "video 'video_001' in .*: width 63, but the others are 64"),
    "far shorter": (edit_features(lambda x: x[: len(x) // 5], rate=2.0), far_off("video_001")),
    # annotations
    "label in no list": (one_label("Juggling"), "classes Juggling in neither train nor test"),
    "frames": (first_entry(annotations=[{"segment": [900, 950], "label": "Diving"}] * 9), "seem to be in frames"),
    "half a character": (one_label("\ud800"), "surrogates not allowed"),
    # splits
    "a class on both sides": (text(UNSEEN_LIST, "\n".join([*UNSEEN, "Diving"])), "Diving in both train and test"),
    # text encoder
    "no weights": (lambda f: (f / "text_encoder.pt").unlink(), "model.text.weights: .*text_encoder.pt does not exist"),
    "truncated weights": (cut("text_encoder.pt", 9000), "text_encoder.pt"),
}


@pytest.mark.parametrize("row", TRAIN)
def test_training_refuses(row: str, data: Path, tmp_path: Path, command: Command) -> None:
    damage, message = TRAIN[row]
    folder = copy_data_set(data, tmp_path / "data")
    damage(folder)
    command.is_refused(message, "train.py", "--config", folder / "tiny.yaml", "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Options of train.py


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "train.device=cuda"], "train.device is cuda, but no GPU is usable here; use auto or cpu"),
        (["--set", "train.device=gpu"], "train.device 'gpu' is unknown; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_options_of_train(data: Path, tmp_path: Path, command: Command, more: list, message: str) -> None:
    if "cuda" in more[-1] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = ["--config", data, *more]
    command.is_refused(message, "train.py", *line, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# An output folder that is taken


def test_a_run_is_replaced_only_on_request(data: Path, run: RunFolder, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    foreign = {"notes.txt": "mine", "detections_mine.json": "{}", "checkpoints/epoch_7.pt": "mine", "a/b.png": ""}
    for name, content in foreign.items():
        write_text(folder / name, content)
    before = contents(folder)
    line = ("train.py", "--config", data, "--output", folder, "--set", "train.epochs=1", "train.seed=3")
    command.is_refused("already holds a run.*--resume.*--overwrite", *line)
    command.is_refused("another train.seed", *line, "--resume")
    assert command(*line, "--resume", "--overwrite") == 2
    assert contents(folder) == before
    everything = (
        "data.features: none.h5 does not exist; model.text.weights: no.pt does not exist; "
        "no video in subset 'evaluation'; the annotations have: test, validation"
    )
    wrong = ("data.features=none.h5", "model.text.weights=no.pt", "data.test_subset=evaluation")
    command.is_refused(everything, *line, *wrong, "--overwrite")
    command.is_refused("not finite in epoch 1", *line, "loss.classification=1e39", "--overwrite")
    assert contents(folder) == before, "a mistake costs no run"

    assert command(*line, "--overwrite") == 0
    for name, content in foreign.items():
        assert (folder / name).read_text() == content
    expected = train(tiny_config(data, "train.epochs=1", "train.seed=3"), tmp_path / "new")
    assert_same_runs(RunFolder(folder), expected)
    left = {name for name in contents(folder) if "tfevents" not in name}
    assert left == {*foreign, *(name for name in contents(expected.path) if "tfevents" not in name)}


def test_everything_that_commands_write_into_a_run_is_its_own(run: RunFolder, tmp_path: Path, command: Command) -> None:
    copied = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, copied.path)
    for vocabulary in ("unseen", "seen", "all"):
        assert command("inference.py", "--run", copied.path, "--vocabulary", vocabulary) == 0
        assert command("eval.py", "--run", copied.path, "--vocabulary", vocabulary) == 0
    infer(copied, oracle=["masks", "labels"])
    infer(copied, vocabulary="all", oracle=["proposals"])
    assert command("scripts/diagnose.py", "--run", copied.path, "--vocabulary", "unseen") == 0
    copied.clear()
    assert not list(copied.path.rglob("*"))


# A run on changed data


def exchange_classes(folder: Path) -> None:
    (folder / SEEN_LIST).write_text("\n".join(["GolfSwing", *SEEN[1:]]))
    (folder / UNSEEN_LIST).write_text("\n".join(["BaseballPitch", "PoleVault"]))


CHANGES = {
    "seen": exchange_classes,
    "segments": first_entry(annotations=[{"segment": [1.5, 5], "label": "Diving"}]),
    "features": edit_features(lambda x: x[::-1], None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_at_the_same_paths_are_noticed(
    name: str, data: Path, run: RunFolder, tmp_path: Path, command: Command
) -> None:
    copied = moved(run, data, tmp_path / "data")
    line = ("train.py", "--config", tmp_path / "data/tiny.yaml", "--output", copied.path, "--resume")
    assert command(*line) == 0, "the same data elsewhere"
    CHANGES[name](tmp_path / "data")
    command.is_refused(rf"data have changed .* \(.*{name}.* differ\)", *line)
    if name == "seen":
        command.is_refused("trained with other seen classes", "inference.py", "--run", copied.path)
    else:
        assert command("inference.py", "--run", copied.path) == 0
        assert f"the {name} of the training videos have changed" in command.capture.readouterr().err


def test_features_too_coarse_for_the_configuration_are_named(data: Path, tmp_path: Path, command: Command) -> None:
    folder = copy_data_set(data, tmp_path / "data")
    edit_features(lambda x: x[:16], None)(folder)
    finer = ("detection.proposals=foreground", "data.sampling=native", "model.localizer.kind=none")
    for more in ((), finer):
        line = ("train.py", "--config", folder / "tiny.yaml", "--output", tmp_path / str(len(more)), "--set")
        assert command(*line, "train.epochs=1", *more) == 0
        assert ("16 snippets of every video, fewer than" in command.capture.readouterr().err) is bool(more)


# Files of a run with a field of another type


FIELDS = {
    "detections.json": ("protocol.classes", 3, "eval.py --run RUN"),
    "metrics.json": ("baselines.random.mAP", None, "eval.py --runs RUN"),
    "split.json": ("seen", {}, "train.py --config CONFIG --output RUN --resume"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_type_is_named(
    name: str, data: Path, run: RunFolder, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    assert command("eval.py", "--run", tmp_path / "run") == 0
    field, value, line = FIELDS[name]
    arguments = [{"RUN": tmp_path / "run", "CONFIG": data}.get(word, word) for word in line.split()]
    content = read_json(tmp_path / "run" / name, name)
    content["newer"] = content.setdefault("protocol", {})["newer"] = [1]
    write_text(tmp_path / "run" / name, json.dumps(content))
    assert command(*arguments) == 0, "fields of newer versions are left alone"
    *path, last = field.split(".")
    section = content
    for key in path:
        section = section[key]
    section[last] = value
    write_text(tmp_path / "run" / name, json.dumps(content))
    command.is_refused(
        rf"{name}.* is incomplete or damaged \({field.removeprefix('protocol.')} should be a", *arguments
    )


# Runs, checkpoints and data that inference.py cannot use


def edit_checkpoint(change: Callable[[dict], object]) -> DAMAGE:
    def damage(folder: Path) -> None:
        path = folder / "run/checkpoints/best.pt"
        state = load_checkpoint(path)
        change(state)
        save_checkpoint(path, {key: value for key, value in state.items() if key not in ("kind", "version")})

    return damage


BEST, VIDEO = "run/checkpoints/best.pt", "video_030"  # which has unseen classes
INFERENCE = {
    "no checkpoint": (lambda f: (f / BEST).unlink(), "checkpoint not found: .*best.pt"),
    "truncated": (cut(BEST, 30_000), "best.pt cannot be read, it is damaged or no checkpoint"),
    "incomplete": (edit_checkpoint(lambda state: state.pop("feature_width")), r"incomplete or damaged \(feature_width"),
    "no configuration": (lambda f: (f / "run/config.yaml").unlink(), "no run in .*config.yaml is missing"),
    "a video without": (lambda f: h5py.File(f / "features.h5", "r+").pop(VIDEO), f"have no .*: {VIDEO}; add"),
    "no features": (lambda f: (f / "features.h5").unlink(), "features not found: .*features.h5; set data.features"),
    "far shorter": (edit_features(lambda x: x[: len(x) // 5], VIDEO, 2.0), far_off(VIDEO)),
    "all of another width": (edit_features(lambda x: x[:, :63], None), "features .*63 wide.* 64 wide"),
}


def moved(run: RunFolder, data: Path, folder: Path) -> RunFolder:
    """A copy of ``run`` without its detections in ``folder / "run"``, on a copy of its data set in ``folder``."""
    copy_data_set(data, folder)
    copied = RunFolder(folder / "run")
    shutil.copytree(run.path, copied.path)
    write_text(copied.config, run.config.read_text().replace(str(data.parent), str(folder)))
    copied.detections("unseen").unlink()
    return copied


@pytest.mark.parametrize("row", INFERENCE)
def test_inference_refuses(row: str, data: Path, run: RunFolder, tmp_path: Path, command: Command) -> None:
    damage, message = INFERENCE[row]
    copied = moved(run, data, tmp_path / "data")
    damage(tmp_path / "data")
    before = contents(copied.path)
    command.is_refused(message, "inference.py", "--run", copied.path)
    assert contents(copied.path) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "none.npy", "--classes", "a"], "features not found: none.npy"),
        (["--features", "FEATURES", "--fps", "2", "--classes", "a", "a"], "class named twice: a"),
        (["--features", "FEATURES", "--fps", "2", "--classes", "a", "--template", "b"], "has no {} for the class name"),
        (["--features", "FEATURES", "--fps", "2", "--classes", "very " * 90], "needs 9. tokens; .* has room"),
        (["--video", "none.mp4", "--classes", "a"], "video not found: none.mp4"),
        (
            ["--features", "FEATURES", "--classes", "a", "--fps", "2", "--csv", "/dev/null/a"],
            "cannot write /dev/null/a",
        ),
        (["--device", "cuda:99"], "--device is cuda:99, but"),
    ],
)
def test_options_of_inference(run: RunFolder, tmp_path: Path, command: Command, more: list, message: str) -> None:
    command.patch.chdir(tmp_path)
    filled = [run.load_config().data.features if word == "FEATURES" else word for word in more]
    command.is_refused(message, "inference.py", "--run", run.path, *filled)
    assert not list(tmp_path.iterdir())


# Out of memory


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of GPU memory: lower x.y"),
        (MemoryError(), "out of main memory: lower x.y .now 9"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"), "out of main memory"),
    ],
)
def test_no_memory_names_the_setting(error: Exception, message: str) -> None:
    with pytest.raises(StaleError, match=message), out_of_memory_hint("x.y", 9):
        raise error
    with pytest.raises(RuntimeError, match="^a defect$"), out_of_memory_hint("train.batch_size", 9):
        raise RuntimeError("a defect")


# Tracebacks and signals


@pytest.mark.parametrize("script", ["train.py", "inference.py", "eval.py"])
def test_a_traceback_only_with_debug(tmp_path: Path, command: Command, script: str) -> None:
    command.patch.chdir(tmp_path)
    line = ("--output", "run") if script == "train.py" else ("--run", "run")
    command.is_refused("", script, *line)
    assert command(script, *line, "--debug") == 2
    error = command.capture.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "stale.errors.StaleError" in error
    assert error.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StaleError("no such video"), "error: no such video\n"),
        (FileNotFoundError(2, "No such file or directory", "/none"), "error: /none: No such file or directory\n"),
        (StaleError("class 'a\nb\x1b[2J\ud800'" + "x" * 10_000), "error: class 'a\\nb\\x1b[2J\\ud800'xxx"),
    ],
    ids=["StaleError", "OSError", "hostile text"],
)
def test_messages_are_one_line_whatever_they_quote(capsys: pytest.CaptureFixture, error: Exception, line: str) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(line)
    assert said.count("\n") == 1
    assert len(said) < 5000


def test_defects_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 / 0))


def test_a_closed_pipe_is_no_traceback() -> None:
    script = "from stale.errors import run_command; run_command(lambda: print('x' * 1_000_000))"
    line = f'{sys.executable} -c "{script}" | head -c 1 > /dev/null'
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert result.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(0, 0), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_in_any_surroundings_ends_by_its_own_code(tmp_path: Path, number: int, code: int) -> None:
    """No UTF-8, a notebook's backend of matplotlib, and signals when all is done."""
    script = f"""
import atexit, os, signal
from stale.errors import run_command

def main():
    atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGINT)])
    from stale.plots import Timeline, save_figure
    save_figure(Timeline(), {str(tmp_path / "a.png")!r})
    print("跳高")
    os.kill(os.getpid(), {int(number)})

run_command(main)
"""
    hostile = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, cwd=REPOSITORY, env=os.environ | hostile
    )
    assert (result.returncode, result.stdout) == (code, b"\\u8df3\\u9ad8\n"), result.stderr


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    for interval, lines in ((0.0, r"(pack: +\d+%.*\d/3.*\n)+"), (60.0, "")):
        monkeypatch.setattr(progress, "_INTERVAL", interval)
        list(progress.progress_bar(range(3), "pack", mininterval=0))
        said = capsys.readouterr().err
        assert re.fullmatch(lines, said)
        assert "\r" not in said
