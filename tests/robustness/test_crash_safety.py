"""Killed, interrupted, out of disk space: no file is half-written, and a resumed run ends like an undisturbed one."""

import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stale.checkpoint import load_checkpoint
from stale.config import load_config
from stale.io import read_json
from stale.run_folder import BASELINES, RunFolder
from tests.helpers import Running, assert_same_runs, leftovers, start, steps_done

EPOCH = 3  # steps of an epoch: 22 videos in batches of 8
SETTINGS = ("train.epochs=4", "train.log_interval=2")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An undisturbed run, with detections."""
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


def check_files(folder: Path) -> None:
    """Load every file that is not hidden, and no log."""
    loaders: dict[str, Any] = {".json": lambda path: read_json(path, "file"), ".pt": load_checkpoint}
    loaders[".yaml"] = lambda path: load_config([path])
    for path in folder.rglob("*"):
        if path.suffix in loaders and not path.name.startswith("."):
            loaders[path.suffix](path)


@pytest.mark.parametrize("finishes", [True, False])
def test_a_run_or_the_one_that_replaces_it_survives_a_kill_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finishes: bool
) -> None:
    def files(run: RunFolder) -> dict[Path, str]:
        return {path.relative_to(run.path): path.read_text() for path in run.path.rglob("*") if path.is_file()}

    def write(run: RunFolder, content: str, *names: str) -> None:
        for name in ("checkpoints/notes.txt", "config.yaml", *names):
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.path / name).write_text("foreign" if name.endswith("txt") else content)

    steps, killed, write_new = 0, True, ("checkpoints/last.pt",) if finishes else ()
    old, new = RunFolder(tmp_path / "old"), RunFolder(tmp_path / "new")
    write(old, "old", "checkpoints/last.pt", "checkpoints/best.pt", "split.json", "baselines/snippets.json")
    write(new, "new", *write_new)
    while killed:
        run, left = RunFolder(tmp_path / str(steps)), iter(range(steps))
        shutil.copytree(old.path, run.path)
        with monkeypatch.context() as patch, suppress(StopIteration):
            for name in ("replace", "unlink"):
                step = getattr(Path, name)
                patch.setattr(Path, name, lambda *paths, step=step, left=left: (next(left), step(*paths)))
            run.set_aside()
            write(run, "new", *write_new)
            run.settle()
            killed = False
        run.settle()
        assert files(run) == files(old) or (finishes and files(run) == files(new)), steps
        steps += 1
    assert steps > 10
    assert (files(run) == files(new)) is finishes
    assert not run.replaced.exists()


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(data: Path, finished: RunFolder, tmp_path: Path) -> None:
    run, chance = tmp_path / "run", random.Random(1)
    for kill in range(3):
        running = training(data, run, "--resume")
        wanted = kill * EPOCH + chance.randrange(1, EPOCH + 2)
        running.wait(lambda wanted=wanted: check_files(run) or steps_done(run) >= wanted)
        time.sleep(chance.uniform(0, 0.05))
        running.send(signal.SIGKILL)
        assert running.finish() in (0, -signal.SIGKILL), running.said()
        check_files(run)
    last = training(data, run, "--resume")
    assert last.finish() == 0, last.said()
    assert_same_runs(RunFolder(run), finished)
    assert not leftovers(run), "temporary files of the killed are removed"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "int")])
def test_a_signal_or_a_full_disk_keeps_the_checkpoint_and_says_how_to_resume(
    data: Path, finished: RunFolder, tmp_path: Path, number: int, code: int, word: str
) -> None:
    run = tmp_path / "run"
    running = training(data, run)
    assert running.wait(lambda: steps_done(run) > EPOCH), running.said()
    running.send(number)
    assert running.finish(10) == code, "well within a scheduler's grace time"
    kept = load_checkpoint(RunFolder(run).checkpoint("last"))["epoch"]
    assert kept >= 1
    assert re.search(rf"epoch {kept}\b.*--resume|--resume.*epoch {kept}\b", running.said())
    assert running.said().splitlines()[-1].startswith(word)
    assert "Traceback" not in running.said()
    assert not leftovers(run)
    # A full disk keeps the old checkpoint.
    before = RunFolder(run).checkpoint("last").read_bytes()
    full = training(data, run, "--resume", largest_file=1 << 20)
    assert full.finish() == 2, full.said()
    error = full.said().splitlines()[-1]
    assert re.match(f"error: cannot write {re.escape(str(run))}/checkpoints/(last|best).pt", error)
    assert "Traceback" not in full.said()
    assert RunFolder(run).checkpoint("last").read_bytes() == before
    assert not leftovers(run)
    assert training(data, run, "--resume").finish() == 0
    assert_same_runs(RunFolder(run), finished)


def test_detections_on_a_full_disk_are_one_line(finished: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    run.detections("unseen").unlink()
    run.log.unlink()  # the training's is nearly as long
    failed = start(tmp_path / "errors.txt", "inference.py", "--run", str(run.path), largest_file=2000)
    assert failed.finish() == 2, failed.said()
    # The baselines of all classes are as long as the model's detections: whichever is written first is too large.
    files = (run.detections("unseen"), *(run.baselines(row, "unseen") for row in BASELINES))
    assert failed.said().splitlines()[-1].startswith(tuple(f"error: cannot write {file}" for file in files))
    assert "Traceback" not in failed.said()
    assert not leftovers(run.path)
    assert not run.detections("unseen").exists()
