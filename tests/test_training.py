"""Training and detection end to end on a tiny data set: the same every time, resumed exactly, blind to unseen names."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from conftest import REPOSITORY
from tiny import NUM_TEST, SEEN, SNIPPETS, UNSEEN, make_data_set, tiny_config
from torch import Tensor

from stale.build import load_training_data, restore_model
from stale.checkpoint import load_checkpoint, save_checkpoint
from stale.data.vocabulary import phrase
from stale.detection.inference import infer
from stale.errors import StaleError
from stale.evaluation import read_results
from stale.files import read_json, write_json, write_text
from stale.model.text import TextEncoder
from stale.run import RunFolder
from stale.training import losses, trainer
from stale.training.trainer import Trainer, train

STEPS = 3  # an epoch of 22 videos in batches of 8
LOSSES = ("total", "classification", "localization", "foreground", "consistency")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny data set."""
    return make_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of two epochs with detections of the unseen classes."""
    finished = train(tiny_config(data), tmp_path_factory.mktemp("runs") / "finished")
    infer(finished)
    return finished


def history(run: RunFolder) -> list[dict[str, Any]]:
    """The run's records without their times."""
    records = [json.loads(line) for line in run.history.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds_a_step"} for record in records]


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal to the bit, in dicts and lists of tensors and values."""
    assert type(first) is type(second), where
    if isinstance(first, Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert first == second, where


def assert_same_runs(first: RunFolder, second: RunFolder) -> None:
    assert history(first) == history(second)
    for name in ("last", "best"):
        assert_same(load_checkpoint(first.checkpoint(name)), load_checkpoint(second.checkpoint(name)), name)


# What a run writes


def test_a_run_records_every_interval_and_epoch(run: RunFolder) -> None:
    records = history(run)
    steps = [record for record in records if "step" in record]
    assert [record["step"] for record in steps] == list(range(1, 2 * STEPS + 1))
    assert all(math.isfinite(record[name]) for record in steps for name in LOSSES)
    assert [record["epoch"] for record in records if "held_out_mAP" in record] == [1, 2]
    assert 0 < max(record.get("held_out_mAP", 0) for record in records) <= 1
    assert records[0]["total"] == pytest.approx(sum(records[0][name] for name in LOSSES[1:]), rel=1e-5)
    assert "2 held out, 6 classes" in run.log.read_text(encoding="utf-8")


def test_a_run_keeps_its_configuration_and_split(data: Path, run: RunFolder) -> None:
    assert run.load_config() == tiny_config(data)
    split = read_json(run.split, "split")
    assert (tuple(split["seen"]), tuple(split["unseen"])) == (SEEN, UNSEEN)
    assert len(split["held_out"]) == 2


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    records = history(train(tiny_config(data, "train.epochs=8"), tmp_path / "run"))
    totals = [record["total"] for record in records if "total" in record]
    assert sum(totals[-STEPS:]) < 0.8 * sum(totals[:STEPS])


def test_the_best_checkpoint_is_the_first_with_the_highest_held_out_map(run: RunFolder) -> None:
    figures = {r["epoch"]: r["held_out_mAP"] for r in history(run) if "held_out_mAP" in r}
    best = load_checkpoint(run.checkpoint("best"))
    assert best["best"] == {"epoch": best["epoch"], "mAP": max(figures.values())}
    assert best["epoch"] == min(epoch for epoch, figure in figures.items() if figure == max(figures.values()))


def test_held_out_videos_are_not_trained_on(data: Path) -> None:
    loaded = load_training_data(tiny_config(data))
    assert len(loaded.train) + len(loaded.held_out) == 24
    assert not {video.id for video in loaded.train.videos} & {video.id for video in loaded.held_out.videos}


# The same every time


def test_two_runs_with_one_seed_are_equal(data: Path, run: RunFolder, tmp_path: Path) -> None:
    assert_same_runs(train(tiny_config(data), tmp_path / "again"), run)


def test_another_seed_is_another_run(data: Path, run: RunFolder, tmp_path: Path) -> None:
    other = train(tiny_config(data, "train.seed=1", "train.epochs=1"), tmp_path / "other")
    assert history(other)[0]["total"] != history(run)[0]["total"]


def test_every_epoch_shows_every_video_once_in_another_order(data: Path, tmp_path: Path) -> None:
    shown: list[int] = []
    step = Trainer._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda self, indices: (shown.extend(indices.tolist()), step(self, indices))[1])
        train(tiny_config(data), tmp_path / "run")
    first, second = shown[: len(shown) // 2], shown[len(shown) // 2 :]
    assert sorted(first) == sorted(second) == list(range(22))
    assert first != second


# Resuming


def interrupt_step(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Break off before the ``number``-th step."""

    def install(patch: pytest.MonkeyPatch) -> None:
        counter, step = itertools.count(1), Trainer._step

        def broken(self: Trainer, indices: Tensor) -> dict[str, Tensor]:
            if next(counter) == number:
                raise KeyboardInterrupt
            return step(self, indices)

        patch.setattr(Trainer, "_step", broken)

    return install


def interrupt_saving(name: str, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Break off before the ``number``-th writing of a checkpoint."""

    def install(patch: pytest.MonkeyPatch) -> None:
        counter = itertools.count(1)

        def broken(path: Path, content: dict[str, Any]) -> None:
            if path.stem == name and next(counter) == number:
                raise KeyboardInterrupt
            save_checkpoint(path, content)

        patch.setattr(trainer, "save_checkpoint", broken)

    return install


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(interrupt_step(2), id="in the first epoch"),
        pytest.param(interrupt_step(STEPS + 1), id="after an epoch"),
        pytest.param(interrupt_step(STEPS + 3), id="in the second epoch"),
        pytest.param(interrupt_saving("best", 1), id="before the best checkpoint"),
        pytest.param(interrupt_saving("last", 1), id="before the first checkpoint"),
        pytest.param(interrupt_saving("last", 2), id="before the second checkpoint"),
    ],
)
def test_a_resumed_run_equals_one_uninterrupted(
    data: Path, run: RunFolder, tmp_path: Path, interrupt: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch)
        train(tiny_config(data), tmp_path / "run")
    assert_same_runs(train(tiny_config(data), tmp_path / "run", resume=True), run)


def test_a_half_written_record_is_forgotten(data: Path, run: RunFolder, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_step(STEPS + 2)(patch)
        train(tiny_config(data), tmp_path / "run")
    with RunFolder(tmp_path / "run").history.open("a", encoding="utf-8") as file:
        file.write('{"epoch": 2, "st')
    assert_same_runs(train(tiny_config(data), tmp_path / "run", resume=True), run)


def test_a_run_can_be_made_longer(data: Path, run: RunFolder, tmp_path: Path) -> None:
    train(tiny_config(data, "train.epochs=1"), tmp_path / "run")
    longer = train(tiny_config(data), tmp_path / "run", resume=True)
    assert_same_runs(longer, run)
    assert longer.load_config().train.epochs == 2


def test_resuming_a_finished_run_changes_nothing(data: Path, run: RunFolder, tmp_path: Path) -> None:
    copied = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, copied.path)
    assert_same_runs(train(tiny_config(data), copied.path, resume=True), run)


def test_resume_starts_a_run_where_there_is_none(data: Path, tmp_path: Path) -> None:
    assert history(train(tiny_config(data, "train.epochs=1"), tmp_path / "new", resume=True))


def test_an_occupied_folder_is_refused(data: Path, run: RunFolder) -> None:
    before = run.history.read_bytes()
    with pytest.raises(StaleError, match="already holds a run.*--resume"):
        train(tiny_config(data), run.path)
    assert run.history.read_bytes() == before


@pytest.mark.parametrize(
    "assignment",
    ["train.learning_rate=0.01", "train.seed=3", "model.masking.queries=5", "data.setting=50_50", "loss.dice=0.1"],
)
def test_other_settings_cannot_resume(data: Path, run: RunFolder, assignment: str) -> None:
    before = load_checkpoint(run.checkpoint("last"))
    with pytest.raises(StaleError, match=f"another {assignment.partition('=')[0]};"):
        train(tiny_config(data, assignment), run.path, resume=True)
    assert_same(load_checkpoint(run.checkpoint("last")), before)


def test_a_damaged_checkpoint_is_an_error(data: Path, run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    damaged = RunFolder(tmp_path / "run").checkpoint("last")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(StaleError, match=r"last\.pt cannot be read"):
        train(tiny_config(data, "train.epochs=3"), tmp_path / "run", resume=True)


# Losses that are not finite


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
    stopped = RunFolder(tmp_path / "run")
    assert load_checkpoint(stopped.checkpoint("last"))["epoch"] == 1
    assert all(t.isfinite().all() for t in load_checkpoint(stopped.checkpoint("last"))["model"].values())
    assert_same_runs(train(tiny_config(data), tmp_path / "run", resume=True), run)


def test_weights_not_finite_are_not_saved(data: Path, tmp_path: Path) -> None:
    """A finite loss can have a gradient that is not."""
    counter, step = itertools.count(1), Trainer._step

    def broken(self: Trainer, indices: Tensor) -> dict[str, Tensor]:
        result = step(self, indices)
        if next(counter) == 2 * STEPS:  # the last step of the last epoch: no loss will tell
            self.model.background.data[0] = math.nan
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StaleError, match="not finite.*epoch 2.*background"):
        patch.setattr(Trainer, "_step", broken)
        train(tiny_config(data), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_finite_and_close(data: Path, run: RunFolder, tmp_path: Path, precision: str) -> None:
    mixed = train(tiny_config(data, f"train.precision={precision}", "train.epochs=1"), tmp_path / "run")
    records = history(mixed)
    assert records[0]["total"] != history(run)[0]["total"], "the precision is really another"
    assert records[0]["total"] == pytest.approx(history(run)[0]["total"], rel=0.02)
    assert all(record["total"] < 2 * records[0]["total"] for record in records if "total" in record)


# Unseen classes


def with_unseen(data: Path, folder: Path, change: Callable[[dict], dict | None]) -> Path:
    """A copy of the data set in which ``change`` rewrites or drops every instance of an unseen class."""
    shutil.copytree(data.parent, folder)
    content = read_json(folder / "annotations.json", "annotations")
    for entry in content["database"].values():
        changed = (change(item) if item["label"] in UNSEEN else item for item in entry["annotations"])
        entry["annotations"] = [item for item in changed if item]
    write_json(folder / "annotations.json", content)
    text = data.read_text(encoding="utf-8").replace(str(data.parent), str(folder))
    write_text(folder / "tiny.yaml", text)
    return folder / "tiny.yaml"


def test_no_unseen_label_reaches_training(data: Path, run: RunFolder, tmp_path: Path) -> None:
    """Under any other names the unseen classes leave the run the same to the bit."""
    renamed = with_unseen(data, tmp_path / "data", lambda item: {**item, "label": f"Aaa{item['label'][::-1]}"})
    names = "\n".join(f"Aaa{label[::-1]}" for label in UNSEEN)
    write_text(tmp_path / "data/splits/train_75_test_25/Tiny/test/split_0.list", names)
    assert_same_runs(train(tiny_config(renamed), tmp_path / "run"), run)


def test_segments_of_unseen_classes_are_not_background(data: Path, run: RunFolder, tmp_path: Path) -> None:
    def test_only(item: dict) -> dict | None:
        return None

    without = with_unseen(data, tmp_path / "data", test_only)
    content = read_json(tmp_path / "data/annotations.json", "annotations")
    entries = [entry for entry in content["database"].values() if entry["subset"] == "Test"]
    for entry, label in zip(entries, UNSEEN, strict=False):
        entry["annotations"] = [{"segment": [0, 1], "label": label}]
    write_json(tmp_path / "data/annotations.json", content)
    assert history(train(tiny_config(without), tmp_path / "run"))[0] != history(run)[0]


def test_training_reads_the_names_of_seen_classes_alone(data: Path, tmp_path: Path) -> None:
    read: set[str] = set()
    tokenize = TextEncoder.tokenize

    def listening(self: TextEncoder, phrases: list[str]) -> Any:
        read.update(phrases)
        return tokenize(self, phrases)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "tokenize", listening)
        train(tiny_config(data, "train.epochs=1"), tmp_path / "run")
    assert read == {phrase(label) for label in SEEN}


# Detection


def check_detections(path: Path, classes: tuple[str, ...], durations: dict[str, float]) -> dict[str, Any]:
    """ActivityNet's results JSON, an entry for every video, sound values; returns the content."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert {"version", "results", "external_data", "protocol"} == set(content)
    assert content["external_data"]["used"] is False
    assert content["protocol"]["classes"] == sorted(classes)
    assert set(content["results"]) == set(durations)
    for video, rows in content["results"].items():
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
        for row in rows:
            assert set(row) == {"segment", "label", "score"}
            start, end = row["segment"]
            assert 0 <= start < end <= durations[video] + 1e-3
            assert row["label"] in classes
            assert 0 < row["score"] <= 1
    read_results(path)
    return content


def durations_of(data: Path, classes: tuple[str, ...]) -> dict[str, float]:
    """The test videos with an instance of ``classes``."""
    database = read_json(data.parent / "annotations.json", "annotations")["database"]
    return {
        video: entry["duration"]
        for video, entry in database.items()
        if entry["subset"] == "Test" and any(item["label"] in classes for item in entry["annotations"])
    }


def test_detections_are_activitynet_results_for_every_video(data: Path, run: RunFolder) -> None:
    durations = durations_of(data, UNSEEN)
    assert len(durations) == NUM_TEST // 4
    content = check_detections(run.detections("unseen"), UNSEEN, durations)
    assert sum(map(len, content["results"].values())) > len(durations)
    assert content["protocol"]["setting"] == "75_25"
    assert content["protocol"]["checkpoint_chosen_on"].startswith("mAP of held-out training videos, seen classes")
    for row in ("whole_video", "snippets"):
        assert check_detections(run.untrained(row, "unseen"), UNSEEN, durations)["protocol"]["checkpoint"] == "none"


@pytest.mark.parametrize(("vocabulary", "classes"), [("seen", SEEN), ("all", (*SEEN, *UNSEEN))])
def test_a_checkpoint_of_seen_names_loads_under_other_vocabularies(
    data: Path, run: RunFolder, vocabulary: str, classes: tuple[str, ...]
) -> None:
    infer(run, "last", vocabulary)
    content = check_detections(run.path / f"detections_{vocabulary}.json", classes, durations_of(data, classes))
    assert content["protocol"]["vocabulary"] == vocabulary
    assert content["protocol"]["checkpoint_chosen_on"] == "nothing: epoch 2"
    assert (run.path / "untrained" / f"snippets_{vocabulary}.json").is_file()


def test_a_checkpoint_holds_no_vocabulary(run: RunFolder) -> None:
    state = load_checkpoint(run.checkpoint("last"))
    state.pop("optimizer")

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from (str(key), *texts(item))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value

    words = " ".join(texts(state)).lower()
    assert not any(label.lower() in words or phrase(label) in words for label in SEEN)
    assert all(len(SEEN) not in tensor.shape for tensor in state["model"].values())


def test_text_features_are_computed_once_a_vocabulary(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, prompts: (calls.append(1), forward(self, prompts))[1])
    config = run.load_config()
    config.detection.batch_size = 1
    monkeypatch.setattr(RunFolder, "load_config", lambda self: config)
    infer(run)
    assert len(calls) == 2, "once for the trained encoder, once for the untrained rows"


def test_batches_do_not_change_detections(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def detected() -> dict[str, list[tuple]]:
        results = read_json(run.detections("unseen"), "detections")["results"]
        return {video: [(*row["segment"], row["label"]) for row in rows[:5]] for video, rows in results.items()}

    infer(run)
    together, config = detected(), run.load_config()
    config.detection.batch_size = 3
    monkeypatch.setattr(RunFolder, "load_config", lambda self: config)
    infer(run)
    assert detected() == together


def test_a_checkpoint_file_can_be_named(run: RunFolder, tmp_path: Path) -> None:
    shutil.copy(run.checkpoint("last"), tmp_path / "other.pt")
    infer(run, str(tmp_path / "other.pt"))
    assert read_json(run.detections("unseen"), "detections")["protocol"]["checkpoint"] == str(tmp_path / "other.pt")
    with pytest.raises(StaleError, match=r"checkpoint not found.*absent\.pt"):
        infer(run, str(tmp_path / "absent.pt"))


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match="no run in"):
        infer(RunFolder(tmp_path))


def test_a_checkpoint_of_another_model_is_an_error(data: Path, run: RunFolder) -> None:
    state = load_checkpoint(run.checkpoint("last"))
    with pytest.raises(StaleError, match="does not fit this run's configuration") as error:
        restore_model(tiny_config(data, "model.masking.queries=9"), state, "some.pt")
    assert "\n" not in str(error.value)


def test_the_restored_model_is_the_saved_one(data: Path, run: RunFolder) -> None:
    state = load_checkpoint(run.checkpoint("best"))
    assert_same(dict(restore_model(tiny_config(data), state).state_dict()), dict(state["model"]))


# Other settings end to end


def test_features_of_another_width_are_refused_or_projected(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "data")
    with h5py.File(tmp_path / "data/features.h5", "r+") as file:
        for name in list(file):
            narrow = file[name][:, :24]
            del file[name]
            file[name] = narrow
    features = f"data.features={tmp_path / 'data/features.h5'}"
    with pytest.raises(StaleError, match="24 wide.*visual_projection"):
        train(tiny_config(data, features), tmp_path / "refused")
    assert not (tmp_path / "refused").exists(), "nothing is left behind"
    run = train(tiny_config(data, features, "model.visual_projection=true", "train.epochs=1"), tmp_path / "run")
    infer(run)
    check_detections(run.detections("unseen"), UNSEEN, durations_of(data, UNSEEN))
    assert not run.untrained("snippets", "unseen").exists()
    assert "untrained rows left out" in run.log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "assignments",
    [
        ("data.setting=closed",),
        ("data.setting=50_50", "data.splits=null"),
        ("model.text.prompt=template", "model.text.encoder=frozen"),
        ("model.masking.kind=none", "model.adaptation.enabled=false"),
        ("model.localizer.kind=plain", "model.localizer.coordinates=relative", "model.temporal.kind=conv"),
        ("loss.consistency=0", "train.clip_norm=0", "train.text_learning_rate=1e-5"),
    ],
    ids=" ".join,
)
def test_other_settings_train_and_detect(data: Path, tmp_path: Path, assignments: tuple[str, ...]) -> None:
    run = train(tiny_config(data, *assignments, "train.epochs=1"), tmp_path / "run")
    infer(run)
    records = history(run)
    assert ("consistency" in records[0]) == ("loss.consistency=0" not in assignments)
    assert ("foreground" in records[0]) == ("model.masking.kind=none" not in assignments)
    results = read_json(run.detections("unseen"), "detections")
    assert len(results["protocol"]["classes"]) == {"closed": 8, "50_50": 4}.get(run.load_config().data.setting, 2)


# The commands


def command(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(REPOSITORY / script), *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_commands(data: Path, run: RunFolder, tmp_path: Path) -> None:
    steps = [
        ("train.py", "--config", str(data), "--set", "data.setting=75_25", "data.split=0", "--output", "run"),
        ("inference.py", "--run", "run"),
        ("eval.py", "--run", "run"),
    ]
    for script, *arguments in steps:
        result = command(script, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    made = RunFolder(tmp_path / "run")
    assert_same_runs(made, run)
    metrics = read_json(made.metrics("unseen"), "metrics")
    assert 0 <= metrics["average_mAP"] <= 1
    assert metrics["num_classes"] == len(UNSEEN)
    assert set(metrics["untrained"]) >= {"whole_video", "snippets"}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["--set", "train.epoch=3", "--output", "run"], "unknown key 'train.epoch'.*train.epochs"),
        ("train.py", ["--output", "run"], "not set: data.annotations, data.features, model.text.weights"),
        ("inference.py", ["--run", "run"], "no run in run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, script: str, arguments: list[str], message: str) -> None:
    result = command(script, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


def test_everything_is_read_with_plain_loading(run: RunFolder) -> None:
    """Tensors and plain values only: torch loads them without running any code."""
    for name in ("last", "best"):
        content = torch.load(run.checkpoint(name), weights_only=True)
        assert content["model"]["localizer.layers.2.bias"].shape[1] == SNIPPETS
