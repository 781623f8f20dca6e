"""Detection of more videos than memory holds: the same files as all at once, and a few batches held at any time."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from stale.build import load_test_data, phrases, restore_model
from stale.checkpoint import load_checkpoint
from stale.data.dataset import load_features
from stale.detection import inference
from stale.detection.detector import detect, round_to_milliseconds
from stale.detection.formats import entries_json, results_file, results_json
from stale.detection.inference import infer
from stale.detection.stream import in_batches, read_ahead
from stale.errors import StaleError
from stale.files import read_json
from stale.run import RunFolder

ROW = {"segment": [0.5, 2.0], "label": "Größe „x“", "score": 0.25}


@pytest.fixture
def own_run(run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run to change: batches of a single video."""
    shutil.copytree(run.path, tmp_path / "run")
    copied = RunFolder(tmp_path / "run")
    text = copied.config.read_text(encoding="utf-8")
    assert "batch_size: 32" in text
    copied.config.write_text(text.replace("batch_size: 32", "batch_size: 1"), encoding="utf-8")
    return copied


# The file


@pytest.mark.parametrize(
    "parts",
    [[], [{}], [{"v": []}], [{"v": [ROW]}, {}, {"w": [ROW, ROW], "x": []}, {'quo"ted\n': [ROW]}]],
    ids=["no part", "an empty part", "a video of nothing", "several"],
)
def test_parts_make_the_file_that_all_at_once_make(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    extra = {"protocol": {"classes": ["a", "ü"], "results": {}}}
    with results_file(tmp_path / "r.json", **extra) as write:
        for part in parts:
            write(entries_json(part))
    whole = results_json({video: rows for part in parts for video, rows in part.items()}, **extra)
    assert (tmp_path / "r.json").read_text(encoding="utf-8") == json.dumps(whole, ensure_ascii=False) + "\n"


def test_a_file_that_is_not_finished_is_none(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match="stop"), results_file(tmp_path / "r.json") as write:
        write(entries_json({"v": [ROW]}))
        raise StaleError("stop")
    assert not list(tmp_path.iterdir())


# Batches


def test_batches_hold_everything_once() -> None:
    assert in_batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert in_batches([], 2) == []


def test_one_item_is_read_ahead_and_no_more() -> None:
    events: list[str] = []

    def read(item: int) -> int:
        events.append(f"read {item}")
        return 10 * item

    for item, value in read_ahead(read, [1, 2, 3, 4]):
        assert value == 10 * item
        assert sum(event.startswith("read") for event in events) <= item + 1
        events.append(f"use {item}")
    assert [event for event in events if event.startswith("use")] == ["use 1", "use 2", "use 3", "use 4"]
    assert list(read_ahead(read, [])) == []


def test_an_error_of_reading_is_raised_at_its_item() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise StaleError("broken")
        return item

    done = []
    with pytest.raises(StaleError, match="broken"):
        for item, _ in read_ahead(read, [1, 2, 3]):
            done.append(item)
    assert done == [1]


# Seconds


def test_milliseconds_are_rounded_as_python_rounds() -> None:
    """At halves too, where 16.9965 is a little more or less than it says."""
    rng = np.random.default_rng(0)
    durations = rng.uniform(1, 300, 2000).round(2)
    seconds = np.concatenate([durations * rng.integers(0, 101, 2000) / 100, rng.uniform(0, 300, 2000), [0.0005, 2.675]])
    assert round_to_milliseconds(seconds).tolist() == [round(x, 3) for x in seconds.tolist()]
    assert seconds.round(3).tolist() != [round(x, 3) for x in seconds.tolist()]


# A run's detections


def test_the_file_is_that_of_all_videos_at_once(own_run: RunFolder) -> None:
    """Against features in one block, detections in one dictionary and one dump."""
    infer(own_run, vocabulary="all")
    config, state = own_run.load_config(), load_checkpoint(own_run.checkpoint("best"))
    test, model = load_test_data(config, "all"), restore_model(config, state)
    features = load_features([video.id for video in test.videos], test.store, config.data.num_snippets)
    found = detect(model, test.videos, features, test.classes, phrases(test.classes), config.detection)
    written = own_run.detections("all").read_text(encoding="utf-8")
    whole = results_json(found, protocol=json.loads(written)["protocol"])
    assert written == json.dumps(whole, ensure_ascii=False) + "\n"


def test_a_few_batches_are_held_at_once(own_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 batches of features; and what was found in one is written before the second next is read."""
    alive: set[int] = set()
    read, written, held, ahead = [], [], [], []

    def counted(ids: list[str], *others: Any) -> Tensor:
        features = load_features(ids, *others)
        read.extend(ids)
        alive.add(len(read))
        weakref.finalize(features, alive.discard, len(read))
        held.append(len(alive))
        ahead.append(len(read) - len(set(written)))
        return features

    def listening(results: dict[str, Any]) -> str:
        written.extend(results)
        return entries_json(results)

    monkeypatch.setattr(inference, "load_features", counted)
    monkeypatch.setattr(inference, "entries_json", listening)
    infer(own_run, vocabulary="all")
    assert len(read) == len(read_json(own_run.detections("all"), "detections")["results"]) == 16
    assert max(held) <= 3
    assert max(ahead) <= 3


def test_what_a_killed_process_left_is_removed(own_run: RunFolder) -> None:
    leftover = own_run.path / ".detections.a1b2c3d4.json"
    leftover.write_text('{"version": ')
    infer(own_run)
    assert not leftover.exists()
