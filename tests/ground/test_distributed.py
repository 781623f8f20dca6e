"""Two processes on the CPU do what one does: the same losses, weights and detections; an error ends both."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stale import distributed
from stale.checkpoint import load_checkpoint
from stale.errors import StaleError
from stale.run_folder import RunFolder
from stale.training import trainer
from stale.training.trainer import train
from tests.helpers import (
    REPOSITORY,
    Running,
    assert_same_runs,
    history,
    leftovers,
    start_together,
    steps_done,
    tiny_config,
)
from tests.reference.train_by_sgd import build_sgd

NO_DROPOUT = [f"model.{name}.dropout=0" for name in ("temporal", "masking", "adaptation", "localizer")]
NO_DROPOUT += ["model.masking.feature_dropout=0"]
UNEVEN = ["train.batch_size=7"]  # 22 videos: 7, 7, 7 and 1, of which one of two processes has none
EPOCH = 4  # steps of an epoch
LONG = [*UNEVEN, "train.epochs=3", "train.validate_every=3", "detection.batch_size=3"]


def training(data: Path, output: Path, *settings: str, resume: bool = False, script: str = "") -> list[Running]:
    """Start train.py into ``output`` in two processes."""
    line = ["--config", str(data), "--output", str(output), *(["--resume"] if resume else []), "--set", *settings]
    return start_together(output.parent / "said", 2, script or "train.py", *line)


def finish(processes: list[Running], code: int = 0, line: str = "") -> None:
    """Both end with ``code``, and one of them reports ``line``."""
    assert [running.finish() for running in processes] == [code] * len(processes), [r.said() for r in processes]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("train.choose_on=unseen_loss",),
        ("loss.foreground=0", "loss.classification_form=pooled", "model.text.encoder=none"),
    ],
    ids=["default", "other losses"],
)
def test_losses_and_weights_are_those_of_one_process(data: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Up to the order of sums, 1e-6 of losses near 1. By plain gradient descent: equal weights are equal gradients."""
    settings = (*NO_DROPOUT, *UNEVEN, "train.epochs=1", "train.learning_rate=0.005", *settings)
    processes = training(data, tmp_path / "two", *settings, script="tests/reference/train_by_sgd.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_optimizer", build_sgd)
        one = train(tiny_config(data, *settings), tmp_path / "one")
    finish(processes)
    two = RunFolder(tmp_path / "two")
    assert len(history(one)) == EPOCH + 1
    for record, expected in zip(history(two), history(one), strict=True):
        assert record == pytest.approx(expected, rel=1e-5)
    checkpoints = [load_checkpoint(run.checkpoint("last")) for run in (two, one)]
    assert checkpoints[0]["best"] == pytest.approx(checkpoints[1]["best"], rel=1e-5)
    found, expected = (checkpoint["model"] for checkpoint in checkpoints)
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.slow
def test_detections_are_those_of_one_process(together: RunFolder, tmp_path: Path) -> None:
    """To the byte, for 16 videos in batches of 3."""
    for count, name in ((1, "one"), (2, "two")):  # each process with one thread: more would sum in another order
        shutil.copytree(together.path, tmp_path / name)
        line = ("inference.py", "--run", str(tmp_path / name), "--vocabulary", "all")
        finish(start_together(tmp_path / f"said {name}", count, *line), line="16 videos, 8 classes")
    for file in ("detections_all.json", "baselines/whole_video_all.json", "baselines/snippets_all.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert not leftovers(tmp_path / "two")


# Errors and interruption


@pytest.mark.slow
def test_an_error_of_both_is_reported_once(data: Path, tmp_path: Path) -> None:
    more = ("train.learning_rate=10", "train.clip_norm=0", "train.weight_decay=10", "train.epochs=30")
    finish(training(data, tmp_path / "run", *more), 2, "not finite")


def test_a_killed_process_ends_the_other(data: Path, tmp_path: Path) -> None:
    first, second = training(data, tmp_path / "run", *LONG)
    assert first.wait(lambda: steps_done(tmp_path / "run") >= 2), first.said()
    second.send(signal.SIGKILL)
    assert (first.finish(), second.finish()) == (2, -signal.SIGKILL)
    assert first.said().splitlines()[-1].startswith("error: another process of this run has ended")
    assert "Traceback" not in first.said() + second.said()


@pytest.mark.parametrize(
    ("name", "message"), [("cuda", r"more processes than GPUs \(1\): .*=1"), ("cuda:1", "one GPU for 2 processes")]
)
def test_every_process_needs_its_own_gpu(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(StaleError, match=message):
        distributed.local_device(torch.device(name), "train.device")
    assert distributed.local_device(torch.device("cpu"), "train.device").type == "cpu"


@pytest.mark.slow
def test_torchrun(data: Path, together: RunFolder, tmp_path: Path) -> None:
    """A signal to torchrun stops all processes; the resumed run ends like an undisturbed one."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command = [*launch, "--config", str(data), "--output", str(tmp_path / "run"), "--set", *LONG]
    place = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **place) as first:
        while first.poll() is None and steps_done(tmp_path / "run") <= EPOCH:
            time.sleep(0.01)
        first.terminate()
        said = first.communicate(timeout=300)[1]
    assert said.count("--resume") == 1, said
    assert said.count("\nterminated\n") == 1, said
    assert not leftovers(tmp_path / "run")
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, **place)
    assert again.returncode == 0, again.stderr
    assert_same_runs(RunFolder(tmp_path / "run"), together)
