"""Killed, interrupted, out of disk space: nothing is ever half-written, and a restart ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Running, start
from test_training import assert_same, assert_same_runs
from tiny import tiny_config

from stale.checkpoint import load_checkpoint
from stale.config import load_config
from stale.errors import StaleError, Terminated
from stale.files import append_text, read_json
from stale.run import RunFolder
from stale.training import trainer, validation
from stale.training.interruption import Interruption
from stale.training.trainer import train

KILLS = 4
SETTINGS = ("train.epochs=4", "train.log_interval=2", "train.save_minutes=1e-6")  # saved at every step


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing disturbed, with detections."""
    folder = tmp_path_factory.mktemp("finished")
    running = training(data, folder / "run")
    assert running.finish() == 0, running.said()
    assert start(folder / "inference.txt", "inference.py", "--run", str(folder / "run")).finish() == 0
    return RunFolder(folder / "run")


def training(data: Path, output: Path, *more: str, largest_file: int | None = None) -> Running:
    """Start train.py into ``output``."""
    output.parent.mkdir(exist_ok=True)
    line = ["--config", str(data), "--set", *SETTINGS, "--output", str(output), *more]
    return start(output.parent / "errors.txt", "train.py", *line, largest_file=largest_file)


def steps_done(run: Path) -> int:
    """By the run's records, of which the last may be half-written."""
    history = RunFolder(run).history
    lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def look_through(folder: Path) -> None:
    """Every file that is not hidden, and is no log, can be read whole."""
    readers = {".json": lambda path: read_json(path, "file"), ".pt": load_checkpoint}
    readers[".yaml"] = lambda path: load_config([path])
    for path in folder.rglob("*"):
        if path.suffix in readers and not path.name.startswith("."):
            readers[path.suffix](path)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


# Killed


def test_killed_training_ends_with_the_same_weights(data: Path, finished: RunFolder, tmp_path: Path) -> None:
    run, chance = tmp_path / "run", random.Random(1)
    for _ in range(KILLS):
        running = training(data, run, "--resume")
        wanted = steps_done(run) + chance.randrange(3)
        running.wait(lambda wanted=wanted: steps_done(run) > wanted, look=lambda: look_through(run))
        time.sleep(chance.uniform(0, 0.05))
        running.send(signal.SIGKILL)
        assert running.finish() in (0, -signal.SIGKILL), running.said()
        look_through(run)
    last = training(data, run, "--resume")
    assert last.finish() == 0, last.said()
    assert "continuing in epoch" in (run / "log.txt").read_text(encoding="utf-8"), "and not always from its begin"
    assert_same_runs(RunFolder(run), finished)
    assert not leftovers(run), "what the killed left behind is gone"


def test_killed_inference_leaves_whole_files_or_none(finished: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    written = [RunFolder(run).detections("unseen"), RunFolder(run).untrained("snippets", "unseen")]
    whole = [read_json(path, "detections") for path in written]
    for path in written:
        path.unlink()
    chance = random.Random(2)
    for _ in range(3):
        running = start(tmp_path / "errors.txt", "inference.py", "--run", str(run))
        moment = time.monotonic() + chance.uniform(0.1, 0.8)
        running.wait(lambda moment=moment: time.monotonic() > moment, look=lambda: look_through(run))
        running.send(signal.SIGKILL)
        running.finish()
        look_through(run)
    assert start(tmp_path / "errors.txt", "inference.py", "--run", str(run)).finish() == 0
    assert [read_json(path, "detections") for path in written] == whole


# Interrupted


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "int")])
def test_a_signal_saves_and_says_how_to_go_on(
    data: Path, finished: RunFolder, tmp_path: Path, number: int, code: int, word: str
) -> None:
    run = tmp_path / "run"
    running = training(data, run)
    assert running.wait(lambda: steps_done(run) >= 2), running.said()
    running.send(number)
    assert running.finish(10) == code, "well within a scheduler's grace time"
    assert "the same command with --resume continues" in running.said()
    assert running.said().splitlines()[-1].startswith(word)
    assert "Traceback" not in running.said()
    assert not leftovers(run)
    assert training(data, run, "--resume").finish() == 0
    assert_same_runs(RunFolder(run), finished)


@pytest.mark.parametrize("step", [1, 2, 3, 5], ids="in step {}".format)
def test_a_signal_waits_for_the_end_of_the_step(data: Path, tmp_path: Path, step: int) -> None:
    """Saved is what the step gave, losses not yet logged and random numbers included: nothing is done twice."""
    config = tiny_config(data, "train.log_interval=2")
    number, original = 0, trainer.Trainer._step

    def interrupted(self: trainer.Trainer, indices: Any) -> Any:
        nonlocal number
        number += 1
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", interrupted)
        with pytest.raises(Terminated):
            train(config, tmp_path / "run")
        state = load_checkpoint(RunFolder(tmp_path / "run").checkpoint("last"))
        assert (state["epoch"], state["step"]) == ((step - 1) // 3, (step - 1) % 3 + 1)
        resumed = train(config, tmp_path / "run", resume=True)
        assert number == 2 * 3
    assert_same_runs(resumed, train(config, tmp_path / "undisturbed"))


def test_a_signal_breaks_a_validation_off(data: Path, tmp_path: Path) -> None:
    """It can take long, and changes nothing: it is done again."""
    config, original, calls = tiny_config(data), validation.detect, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "detect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    state = load_checkpoint(RunFolder(tmp_path / "run").checkpoint("last"))
    assert (state["epoch"], state["step"]) == (1, 3)
    assert_same_runs(train(config, tmp_path / "run", resume=True), train(config, tmp_path / "undisturbed"))


def test_a_second_signal_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with pytest.raises(KeyboardInterrupt), Interruption() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.noted == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_a_thread_leaves_signals_alone(data: Path, tmp_path: Path) -> None:
    made: list[RunFolder] = []
    thread = threading.Thread(target=lambda: made.append(train(tiny_config(data, "train.epochs=1"), tmp_path / "run")))
    thread.start()
    thread.join()
    assert load_checkpoint(made[0].checkpoint("last"))["epoch"] == 1


def test_interrupted_inference_writes_nothing(finished: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    RunFolder(run).detections("unseen").unlink()
    running = start(tmp_path / "errors.txt", "inference.py", "--run", str(run))
    time.sleep(0.15)
    running.send(signal.SIGTERM)
    code = running.finish(10)
    if code == 143:  # else it was faster
        assert running.said().splitlines()[-1] == "terminated"
    assert RunFolder(run).detections("unseen").exists() is (code == 0)
    assert not leftovers(run)


# Out of disk space


def test_a_full_disk_keeps_the_old_checkpoint(data: Path, finished: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = training(data, run)
    assert running.wait(lambda: steps_done(run) >= 2)
    running.send(signal.SIGTERM)
    running.finish()
    before = RunFolder(run).checkpoint("last").read_bytes()
    full = training(data, run, "--resume", largest_file=1 << 20)
    assert full.finish() == 2, full.said()
    error = full.said().splitlines()[-1]  # of the best first, where the epoch's last step was done already
    assert re.match(f"error: cannot write {re.escape(str(run))}/checkpoints/(last|best).pt", error)
    assert "Traceback" not in full.said()
    assert RunFolder(run).checkpoint("last").read_bytes() == before
    assert not leftovers(run)
    assert training(data, run, "--resume").finish() == 0
    assert_same_runs(RunFolder(run), finished)


@pytest.mark.parametrize("what", ["log", "detections"])
def test_a_full_disk_is_one_line_wherever_it_is_met(finished: RunFolder, tmp_path: Path, what: str) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    run.detections("unseen").unlink()
    if what == "log":
        run.log.unlink()
        run.log.symlink_to("/dev/full")  # which takes no byte
    limit = None if what == "log" else 2000
    failed = start(tmp_path / "errors.txt", "inference.py", "--run", str(run.path), largest_file=limit)
    assert failed.finish() == 2, failed.said()
    place = run.log if what == "log" else run.detections("unseen")
    assert failed.said().splitlines()[-1].startswith(f"error: cannot write {place}")
    assert "Traceback" not in failed.said()
    assert not leftovers(run.path)
    assert run.detections("unseen").exists() is (what == "log"), "whole or absent"


def test_records_on_a_full_disk_are_an_error_too() -> None:
    with pytest.raises(StaleError, match="^cannot write /dev/full: No space left on device$"):
        append_text("/dev/full", "{}")


def test_the_same_checkpoints_whatever_was_saved_between(data: Path, finished: RunFolder, tmp_path: Path) -> None:
    """Saving inside an epoch changes nothing."""
    running = training(data, tmp_path / "run", "--set", "train.save_minutes=0")
    assert running.finish() == 0, running.said()
    unsaved = RunFolder(tmp_path / "run")
    one, other = (load_checkpoint(run.checkpoint("last"))["model"] for run in (unsaved, finished))
    assert_same(dict(one), dict(other))
