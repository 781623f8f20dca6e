"""The training loop on a tiny data set: what a run records, resumed to the bit, blind to unseen names."""

import itertools
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torch import Tensor

from stale.api import infer, load
from stale.checkpoint import load_checkpoint, save_checkpoint
from stale.errors import StaleError
from stale.io import read_json, write_text
from stale.run_folder import RunFolder
from stale.training import losses, trainer
from stale.training.trainer import Trainer, train
from tests.helpers import LOSSES, SEEN, UNSEEN, assert_same, assert_same_runs, copy_data_set, history, tiny_config

STEPS = 3  # an epoch of 22 videos in batches of 8


# What a run writes


def test_a_run_records_every_interval_and_epoch(data: Path, run: RunFolder) -> None:
    records = history(run)
    steps = [record for record in records if "step" in record]
    assert [record["step"] for record in steps] == list(range(1, 2 * STEPS + 1))
    assert all(math.isfinite(record[name]) for record in steps for name in LOSSES)
    assert [record["epoch"] for record in records if "held_out_mAP" in record] == [1, 2]
    assert 0 < max(record.get("held_out_mAP", 0) for record in records) <= 1
    assert records[0]["total"] == pytest.approx(sum(records[0][name] for name in LOSSES[1:]), rel=1e-5)
    assert run.load_config() == tiny_config(data)
    split = read_json(run.split, "split")
    assert (tuple(split["seen"]), tuple(split["unseen"])) == (SEEN, UNSEEN)
    assert len(split["held_out"]) == 2
    assert Image.open(run.curves).size == (1000, 400)


def test_tensorboard_has_every_curve(run: RunFolder) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(run.path / "tensorboard")).Reload()
    names = {*board.Tags()["scalars"]}
    assert {*LOSSES, "gradient_norm", "seconds_per_step", "held_out_mAP"} <= names
    parts = {"text.context", "text", "temporal", "masking", "adaptation", "localizer", "background"}
    assert names >= {f"{group}/{part}" for group in ("learning_rate", "weights_moved") for part in parts}
    assert names >= {f"held_out_AP/{label}" for label in SEEN}
    assert all(0 < event.value < 1 for event in board.Scalars("weights_moved/text"))


def test_the_log_has_a_line_an_epoch_and_no_bar(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(tiny_config(data, "train.log_interval=2"), tmp_path / "run")
    log, shown = run.log.read_text(encoding="utf-8"), capsys.readouterr().err
    assert "2 held out, 6 classes; cpu, float32" in log and "command: python" in log
    assert re.search(r"stale .*, Python .*, torch .*, no GPU", log)
    assert re.search(r"trained parameters: all [\d,]+, .*text\.context 256, text", log)
    assert log.splitlines()[-1].endswith(f"next: python inference.py --run {run.path}")
    for epoch in (1, 2):
        lines = [line for line in log.splitlines() if f"epoch {epoch}/2: total" in line]
        assert len(lines) == 1
        assert re.search(r"held-out seen mAP \d+\.\d\d % .* s, peak memory .* GiB, time left 00:", lines[0])
        assert shown.count(lines[0].partition("INFO ")[2]) == 1
    assert "%|" not in shown
    assert [record.get("step") for record in history(run)] == [2, 3, None, 5, 6, None]


def test_the_best_checkpoint_is_the_first_with_the_highest_held_out_map(run: RunFolder) -> None:
    scores = {r["epoch"]: r["held_out_mAP"] for r in history(run) if "held_out_mAP" in r}
    best = load_checkpoint(run.checkpoint("best"))
    assert best["best"] == {"epoch": best["epoch"], "mAP": max(scores.values())}
    assert best["epoch"] == min(epoch for epoch, score in scores.items() if score == max(scores.values()))


def test_without_held_out_videos_the_last_checkpoint_is_kept(data: Path, tmp_path: Path) -> None:
    settings = ("data.holdout=0", "train.epochs=2", "detection.classify_by=calibrated")
    config = tiny_config(data, *settings)
    run = train(config, tmp_path / "run")
    last, best = (load_checkpoint(run.checkpoint(name)) for name in ("last", "best"))
    assert best["best"] == {"epoch": 2}
    assert_same(best["model"], last["model"])
    assert not torch.equal(best["model"]["class_weights"], torch.full((2,), 1 / config.model.temperature))
    assert load(run.path).chosen_on == "nothing: the last, epoch 2"
    assert "no video was held out" in run.log.read_text(encoding="utf-8")


def test_the_released_choice_of_a_checkpoint_is_stated(data: Path, run: RunFolder, tmp_path: Path) -> None:
    released = train(tiny_config(data, "train.choose_on=unseen_loss", "train.epochs=2"), tmp_path / "run")
    best = load_checkpoint(released.checkpoint("best"))["best"]
    assert set(best) == {"epoch", "mAP", "unseen_loss"}
    infer(released)
    chosen = read_json(released.detections("unseen"), "detections")["protocol"]["checkpoint_chosen_on"]
    assert chosen.startswith("LOSS ON THE UNSEEN TEST CLASSES")
    assert "no zero-shot" in released.log.read_text(encoding="utf-8")
    first = [history(path)[0]["total"] for path in (run, released)]
    assert first[0] == first[1], "the training itself is the same"


def test_every_epoch_shows_every_video_once_in_another_order(data: Path, tmp_path: Path) -> None:
    shown: list[int] = []
    step = Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, indices: (shown.extend(indices.tolist()), step(self, indices))[1])
        train(tiny_config(data), tmp_path / "run")
    first, second = shown[: len(shown) // 2], shown[len(shown) // 2 :]
    assert sorted(first) == sorted(second) == list(range(22))
    assert first != second


# Resuming


@pytest.mark.parametrize(
    ("event", "number", "message"),
    [
        ("step", 2, "epoch 1; no epoch is kept"),
        ("step", STEPS + 3, "epoch 2; epoch 1 is kept"),
        ("best", 1, "epoch 1; no epoch is kept"),
        ("last", 2, "epoch 2; epoch 1 is kept"),
    ],
)
def test_a_resumed_run_equals_one_uninterrupted(
    data: Path, run: RunFolder, tmp_path: Path, event: str, number: int, message: str
) -> None:
    """Interrupted before a step, or before the best or last checkpoint is written."""
    counter, step = itertools.count(1), Trainer.step

    def count(name: str) -> None:
        if name == event and next(counter) == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", lambda *inputs: (count("step"), step(*inputs))[1])
        patch.setattr(trainer, "save_checkpoint", lambda path, state: (count(path.stem), save_checkpoint(path, state)))
        train(tiny_config(data), tmp_path / "run")
    stopped = RunFolder(tmp_path / "run")
    assert f"interrupted in {message}: the same command with --resume" in stopped.log.read_text(encoding="utf-8")
    with stopped.history.open("a", encoding="utf-8") as file:
        file.write('{"epoch": 2, "st')  # as a full disk leaves it
    assert_same_runs(train(tiny_config(data), tmp_path / "run", resume=True), run)


def test_a_run_can_be_made_longer_and_resumed_when_finished(data: Path, run: RunFolder, tmp_path: Path) -> None:
    train(tiny_config(data, "train.epochs=1"), tmp_path / "run", resume=True)  # there is none: a new one
    longer = train(tiny_config(data), tmp_path / "run", resume=True)
    assert_same_runs(longer, run)
    assert longer.load_config().train.epochs == 2
    assert_same_runs(train(tiny_config(data), tmp_path / "run", resume=True), run)


def test_a_run_that_is_shortened_before_its_first_validation_has_a_best_checkpoint(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, "train.validate_every=2")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "validate", Mock(side_effect=KeyboardInterrupt))
        train(config, tmp_path / "run")
    shorter = train(tiny_config(data, "train.validate_every=2", "train.epochs=1"), tmp_path / "run", resume=True)
    assert load_checkpoint(shorter.checkpoint("best"))["best"]["epoch"] == 1


@pytest.mark.parametrize(
    "assignment",
    ["train.learning_rate=0.01", "train.seed=3", "model.masking.queries=5", "data.setting=50_50", "loss.dice=0.1"],
)
def test_other_settings_cannot_resume(data: Path, run: RunFolder, assignment: str) -> None:
    before = load_checkpoint(run.checkpoint("last"))
    with pytest.raises(StaleError, match=f"another {assignment.partition('=')[0]};"):
        train(tiny_config(data, assignment), run.path, resume=True)
    assert_same(load_checkpoint(run.checkpoint("last")), before)


# Numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_not_finite_is_named_and_earlier_checkpoints_are_kept(
    data: Path, run: RunFolder, tmp_path: Path, value: float
) -> None:
    counter, sound = itertools.count(1), losses.localization_loss

    def broken(*inputs: Any) -> Tensor:
        return sound(*inputs) * (value if next(counter) > STEPS + 1 else 1.0)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StaleError, match=f"epoch 2.*localization {value}"):
        patch.setattr(losses, "localization_loss", broken)
        train(tiny_config(data), tmp_path / "run")
    state = load_checkpoint(RunFolder(tmp_path / "run").checkpoint("last"))
    assert state["epoch"] == 1
    assert all(weights.isfinite().all() for weights in state["model"].values())
    assert_same_runs(train(tiny_config(data), tmp_path / "run", resume=True), run)


def test_weights_not_finite_are_not_saved(data: Path, tmp_path: Path) -> None:
    """A finite loss can have a gradient that is not."""
    counter, step = itertools.count(1), Trainer.step

    def broken(self: Trainer, indices: Tensor) -> dict[str, Tensor]:
        result = step(self, indices)
        if next(counter) == 2 * STEPS:  # the last step of the last epoch: no later loss shows it
            self.model.background.data[0] = math.nan
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StaleError, match="not finite.*epoch 2.*background"):
        patch.setattr(Trainer, "step", broken)
        train(tiny_config(data), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["epoch"] == 1


# Unseen classes


def test_no_unseen_label_reaches_training(data: Path, run: RunFolder, tmp_path: Path) -> None:
    """Under any other names the unseen classes leave the run the same to the bit."""
    renamed = copy_data_set(data, tmp_path / "data") / data.name
    annotations = (tmp_path / "data/annotations.json").read_text(encoding="utf-8")
    for label in UNSEEN:
        annotations = annotations.replace(f'"{label}"', f'"Aaa{label[::-1]}"')
    write_text(tmp_path / "data/annotations.json", annotations)
    names = "\n".join(f"Aaa{label[::-1]}" for label in UNSEEN)
    write_text(tmp_path / "data/splits/train_75_test_25/Tiny/test/split_0.list", names)
    assert_same_runs(train(tiny_config(renamed), tmp_path / "run"), run)
