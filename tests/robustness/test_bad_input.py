"""Bad input of every kind, through the real commands: one clear line, exit code 2, nothing half-written."""

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
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stale import progress
from stale.api import infer
from stale.device import out_of_memory_hint
from stale.errors import StaleError, run_command
from stale.io import read_json, write_text
from stale.run_folder import RunFolder
from stale.training.trainer import train
from tests.helpers import REPOSITORY, SEEN, assert_same_runs, copy_data_set, exit_code, tiny_config

DAMAGE = Callable[[Path], object]  # damages a copy of the data set, or of a run


@dataclass
class Command:
    """Runs a command as if typed, in this process."""

    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture

    def __call__(self, script: str, *arguments: object) -> int:
        """Return the exit code."""
        self.patch.setattr(sys, "argv", [script, *map(str, arguments)])
        return exit_code(lambda _: runpy.run_path(str(REPOSITORY / script), run_name="__main__"))

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


def first_entry(start: float, end: float, label: str = "Diving", count: int = 1) -> DAMAGE:
    def damage(folder: Path) -> None:
        content = read_json(folder / "annotations.json", "annotations")
        content["database"]["video_000"]["annotations"] = [{"segment": [start, end], "label": label}] * count
        write_text(folder / "annotations.json", json.dumps(content))

    return damage


def edit_features(change: Callable[[np.ndarray], np.ndarray], video: str | None = "video_001") -> DAMAGE:
    """Change the array of a video, None for all."""

    def damage(folder: Path) -> None:
        gc.collect()  # close the file of a training that waits for the garbage collection
        with h5py.File(folder / "features.h5", "r+") as file:
            for name in [video] if video else list(file):
                changed = change(file[name][()])
                del file[name]
                file[name] = changed

    return damage


def cut(name: str, to: int) -> DAMAGE:
    return lambda folder: os.truncate(folder / name, to)


SEEN_LIST = "splits/train_75_test_25/Tiny/train/split_0.list"
UNSEEN_LIST = SEEN_LIST.replace("/train/", "/test/")


def remove(name: str) -> DAMAGE:
    return lambda folder: (folder / name).unlink()


def without(video: str) -> DAMAGE:
    return lambda folder: h5py.File(folder / "features.h5", "r+").pop(video)


def moved(run: RunFolder, data: Path, folder: Path) -> RunFolder:
    """A copy of ``run`` without its detections in ``folder / "run"``, on a copy of its data set in ``folder``."""
    copy_data_set(data, folder)
    copied = RunFolder(folder / "run")
    shutil.copytree(run.path, copied.path)
    write_text(copied.config, run.config.read_text().replace(str(data.parent), str(folder)))
    copied.detections("unseen").unlink()
    return copied


TRAIN, DETECT = ("train.py", "--config", "tiny.yaml", "--output", "new"), ("inference.py", "--run", "run")
BEST, TEST_VIDEO = "run/checkpoints/best.pt", "video_030"  # which has unseen classes


@pytest.mark.parametrize(
    ("line", "damage", "message"),
    [
        (TRAIN, without("video_001"), "1 of 24 .*: video_001; add"),
        (TRAIN, edit_features(lambda x: x[:, :63]), "video 'video_001' in .*: width 63, but the others are 64"),
        (TRAIN, first_entry(900, 950, count=9), "seem to be in frames"),
        (TRAIN, first_entry(1, 5, "\ud800"), "surrogates not allowed"),
        (TRAIN, remove("text_encoder.pt"), "model.text.weights: .*text_encoder.pt does not exist"),
        (TRAIN, cut("text_encoder.pt", 9000), "text_encoder.pt"),
        (DETECT, remove(BEST), "checkpoint not found: .*best.pt"),
        (DETECT, cut(BEST, 30_000), "best.pt cannot be read, it is damaged or no checkpoint"),
        (DETECT, remove("run/config.yaml"), "no run in .*config.yaml is missing"),
        (DETECT, without(TEST_VIDEO), f"have no .*: {TEST_VIDEO}; add"),
        (DETECT, edit_features(lambda x: x[:, :63], None), "features .*63 wide.* 64 wide"),
    ],
)
def test_damaged_files_are_refused_and_nothing_is_written(
    data: Path, run: RunFolder, tmp_path: Path, command: Command, line: tuple, damage: DAMAGE, message: str
) -> None:
    folder = tmp_path / "data"
    moved(run, data, folder)
    damage(folder)
    before = contents(folder)
    command.patch.chdir(folder)
    command.is_refused(message, *line)
    assert contents(folder) == before
    assert not (folder / "new").exists()


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
    everything = "none.h5 does not exist; .*no.pt does not exist; no video in subset 'evaluation'; .* test, validation"
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
    for script, vocabulary in product(("inference.py", "eval.py"), ("unseen", "seen", "all")):
        assert command(script, "--run", copied.path, "--vocabulary", vocabulary) == 0
    infer(copied, oracle=["masks", "labels"])
    infer(copied, vocabulary="all", oracle=["proposals"])
    assert command("scripts/diagnose.py", "--run", copied.path, "--vocabulary", "unseen") == 0
    copied.clear()
    assert not list(copied.path.rglob("*"))


def exchange_classes(folder: Path) -> None:
    (folder / SEEN_LIST).write_text("\n".join(["GolfSwing", *SEEN[1:]]))
    (folder / UNSEEN_LIST).write_text("\n".join(["BaseballPitch", "PoleVault"]))


CHANGES = {
    "seen": exchange_classes,
    "segments": first_entry(1.5, 5),
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


FIELDS = {
    "detections.json": (lambda x: x["protocol"].update(classes=3), "classes", "eval.py --run RUN"),
    "metrics.json": (lambda x: x["baselines"]["random"].update(mAP=None), "baselines.random.mAP", "eval.py --runs RUN"),
    "split.json": (lambda x: x.update(seen={}), "seen", "train.py --config CONFIG --output RUN --resume"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_type_is_named(
    name: str, data: Path, run: RunFolder, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    assert command("eval.py", "--run", tmp_path / "run") == 0
    change, field, line = FIELDS[name]
    arguments = [{"RUN": tmp_path / "run", "CONFIG": data}.get(word, word) for word in line.split()]
    content = read_json(tmp_path / "run" / name, name)
    content["newer"] = content.setdefault("protocol", {})["newer"] = [1]
    write_text(tmp_path / "run" / name, json.dumps(content))
    assert command(*arguments) == 0, "fields of newer versions are left alone"
    change(content)
    write_text(tmp_path / "run" / name, json.dumps(content))
    command.is_refused(rf"{name}.* is incomplete or damaged \({field} should be a", *arguments)


FEATURES = ("--features", "FEATURES", "--fps", "2", "--classes")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "none.npy", "--classes", "a"], "features not found: none.npy"),
        ([*FEATURES, "a", "--template", "b"], "has no {} for the class name"),
        ([*FEATURES, "very " * 90], "needs 9. tokens; .* has room"),
        (["--video", "none.mp4", "--classes", "a"], "video not found: none.mp4"),
        ([*FEATURES, "a", "--csv", "/dev/null/a"], "cannot write /dev/null/a"),
        (["--device", "cuda:99"], "--device is cuda:99, but .*; use auto or cpu"),
        (["--device", "gpu"], "--device 'gpu' is unknown; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_options_of_inference(run: RunFolder, tmp_path: Path, command: Command, more: list, message: str) -> None:
    command.patch.chdir(tmp_path)
    filled = [run.load_config().data.features if word == "FEATURES" else word for word in more]
    command.is_refused(message, "inference.py", "--run", run.path, *filled)
    assert not list(tmp_path.iterdir())


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


def test_a_traceback_only_with_debug(tmp_path: Path, command: Command) -> None:
    command.is_refused("no run in", "inference.py", "--run", tmp_path)
    assert command("inference.py", "--run", tmp_path, "--debug") == 2
    said = command.capture.readouterr().err
    assert re.search(r"Traceback \(most.*stale.errors.StaleError.*\nerror: ", said, re.DOTALL)


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
        list(progress.progress_bar(range(3), "pack"))
        said = capsys.readouterr().err
        assert re.fullmatch(lines, said)
        assert "\r" not in said
