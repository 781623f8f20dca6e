"""Two processes on the CPU do what one does: the same losses, weights and detections; they stop together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from processes import Running, start_together
from test_crash_safety import leftovers, steps_done
from test_training import LOSSES, assert_same_runs, history
from tiny import tiny_config
from train_by_sgd import build_sgd

from stale import parallel
from stale.checkpoint import load_checkpoint
from stale.errors import StaleError, Terminated
from stale.run import RunFolder
from stale.training import trainer
from stale.training.trainer import train

STILL = [f"model.{name}.dropout=0" for name in ("temporal", "masking", "adaptation")]
UNEVEN = ["train.batch_size=7"]  # 22 videos: 7, 7, 7 and 1, of which one of two processes has none
LONG = [*UNEVEN, "train.epochs=3", "train.validate_every=3", "detection.batch_size=3"]


def training(
    data: Path, output: Path, *settings: str, options: tuple[str, ...] = (), script: str = ""
) -> list[Running]:
    """Start train.py into ``output``, in two processes."""
    line = ["--config", str(data), "--output", str(output), *options, "--set", *settings]
    return start_together(output.parent / "said", 2, script or "train.py", *line)


def finish(processes: list[Running], code: int = 0, line: str = "") -> None:
    """All end with ``code``, and one of them says why."""
    assert [running.finish() for running in processes] == [code] * len(processes), [
        running.said() for running in processes
    ]
    said = "".join(running.said() for running in processes)
    assert "Traceback" not in said
    assert said.count(line) == 1 or not line, said
    assert (said.count("error:"), said.count("terminated")) == (int(code == 2), int(code == 143)), said


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of two processes, with dropout."""
    folder = tmp_path_factory.mktemp("together")
    finish(training(data, folder / "run", *LONG))
    return RunFolder(folder / "run")


# The same as one process


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("loss.foreground=0", "loss.classification_form=pooled", "model.text.encoder=none"),
    ],
    ids=" ".join,
)
def test_losses_and_weights_are_those_of_one_process(data: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """To some units in the last place of what is summed, in another order: 1e-6 of losses near 1.

    By plain gradient descent, so that equal weights are equal gradients.
    """
    settings = (*STILL, *UNEVEN, "train.epochs=1", "train.learning_rate=0.05", *settings)
    processes = training(data, tmp_path / "two", *settings, script="tests/train_by_sgd.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_optimizer", build_sgd)
        one = train(tiny_config(data, *settings), tmp_path / "one")
    finish(processes)
    two = RunFolder(tmp_path / "two")
    assert len(history(one)) == 4 + 1
    for record, expected in zip(history(two), history(one), strict=True):
        assert record == pytest.approx(expected, rel=1e-5)
    found, expected = (load_checkpoint(run.checkpoint("last"))["model"] for run in (two, one))
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=2e-6, msg=name)


def test_dropout_differs_between_processes(together: RunFolder) -> None:
    state = load_checkpoint(together.checkpoint("last"))
    assert len(state["random_of_others"]) == 1
    assert not torch.equal(state["random"]["cpu"], state["random_of_others"][0]["cpu"])


# Stopping and going on


def interrupted(data: Path, output: Path, *settings: str) -> None:
    """Two processes are asked to stop, as torchrun asks them: each by a signal of its own."""
    processes = training(data, output, *settings)
    assert processes[0].wait(lambda: steps_done(output) >= 2), processes[0].said()
    for running in processes:
        running.send(signal.SIGTERM)
    finish(processes, 143, "the same command with --resume continues")
    assert not leftovers(output)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(data: Path, together: RunFolder, tmp_path: Path) -> None:
    """To the bit, with dropout: the checkpoint holds the random numbers of both."""
    interrupted(data, tmp_path / "run", *LONG)
    finish(training(data, tmp_path / "run", *LONG, options=("--resume",)))
    assert_same_runs(RunFolder(tmp_path / "run"), together)


def test_a_run_of_two_goes_on_with_one_and_back(data: Path, tmp_path: Path) -> None:
    """Its losses are those of a run of one, to a thousandth: Adam makes whole steps of rounding here and there."""
    settings = (*STILL, *LONG)
    one = train(tiny_config(data, *settings), tmp_path / "one")
    interrupted(data, tmp_path / "run", *settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Terminated):
        stop_after_step(patch, 2)
        train(tiny_config(data, *settings), tmp_path / "run", resume=True)
    finish(training(data, tmp_path / "run", *settings, options=("--resume",)))
    for record, expected in zip(history(RunFolder(tmp_path / "run")), history(one), strict=True):
        losses = [record[name] for name in LOSSES if name in record]
        assert losses == pytest.approx([expected[name] for name in LOSSES if name in expected], rel=1e-3)


def stop_after_step(patch: pytest.MonkeyPatch, number: int) -> None:
    step, done = trainer.Trainer._step, []

    def stopped(self: trainer.Trainer, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        done.append(1)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, indices)

    patch.setattr(trainer.Trainer, "_step", stopped)


# Detection


def test_detections_are_those_of_one_process(together: RunFolder, tmp_path: Path) -> None:
    """To the byte, of 16 videos in batches of 3."""
    for name in ("one", "two"):
        shutil.copytree(together.path, tmp_path / name)
    for count, name in ((1, "one"), (2, "two")):  # each process with one thread: another number adds up otherwise
        line = ("inference.py", "--run", str(tmp_path / name), "--vocabulary", "all")
        finish(start_together(tmp_path / f"said {name}", count, *line), line="16 videos, 8 classes")
    for file in ("detections_all.json", "untrained/whole_video_all.json", "untrained/snippets_all.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert not leftovers(tmp_path / "two")


# Failing


def test_bad_input_is_said_once(data: Path, tmp_path: Path) -> None:
    finish(training(data, tmp_path / "run", "data.annotations=absent.json"), 2, "error: annotation file not found")
    assert not (tmp_path / "run").exists()


def test_a_loss_not_finite_ends_both(data: Path, tmp_path: Path) -> None:
    finish(training(data, tmp_path / "run", "train.learning_rate=1e30"), 2, "not finite")


def test_who_is_killed_does_not_keep_the_other(data: Path, tmp_path: Path) -> None:
    first, second = training(data, tmp_path / "run", *LONG)
    assert first.wait(lambda: steps_done(tmp_path / "run") >= 2), first.said()
    second.send(signal.SIGKILL)
    assert (first.finish(), second.finish()) == (2, -signal.SIGKILL)
    assert first.said().splitlines()[-1].startswith("error: another process of this run has ended")
    assert "Traceback" not in first.said() + second.said()


def test_what_one_process_alone_meets_ends_both(together: RunFolder, tmp_path: Path) -> None:
    """The features of a single video are broken."""
    shutil.copytree(together.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    features = run.load_config().data.features
    shutil.copy(features, tmp_path / "features.h5")
    video = "video_030"
    with h5py.File(tmp_path / "features.h5", "r+") as file:
        file[video][0, 0] = np.nan
    run.config.write_text(run.config.read_text().replace(features, str(tmp_path / "features.h5")))
    finish(start_together(tmp_path / "said", 2, "inference.py", "--run", str(run.path)), 2, video)
    assert not run.detections("unseen").exists()
    assert not leftovers(run.path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "more processes than GPUs, 1 GPU is usable here: .*=1"), ("cuda:1", "one GPU for 2 processes")],
)
def test_a_process_without_a_gpu_of_its_own_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(StaleError, match=message):
        parallel.own_device(torch.device(name), "train.device")
    assert parallel.own_device(torch.device("cpu"), "train.device").type == "cpu"


def test_own_videos_are_for_one_process(together: RunFolder, tmp_path: Path) -> None:
    line = ("inference.py", "--run", str(together.path), "--features", "x.npy", "--classes", "diving")
    finish(start_together(tmp_path / "said", 2, *line), 2, "start it without torchrun")


# The launcher


@pytest.mark.slow
def test_torchrun(data: Path, together: RunFolder, tmp_path: Path) -> None:
    """Asked to stop, it asks its processes; started again, they end as if nothing had been."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command = [*launch, "--config", str(data), "--output", str(tmp_path / "run"), "--set", *LONG]
    place = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **place) as first:
        while first.poll() is None and steps_done(tmp_path / "run") < 2:
            time.sleep(0.01)
        first.terminate()
        said = first.communicate(timeout=120)[1]
    assert said.count("the same command with --resume continues in epoch") == 1, said
    assert said.count("\nterminated\n") == 1, said
    assert not leftovers(tmp_path / "run")
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120, **place)
    assert again.returncode == 0, again.stderr
    assert_same_runs(RunFolder(tmp_path / "run"), together)
