"""From features to detections: the one loop, streamed from disk, in batches of any size."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stale.api import infer, load
from stale.config import DetectionConfig, load_config
from stale.data import dataset
from stale.data.annotations import Video
from stale.data.dataset import load_features
from stale.data.selection import load_test_data
from stale.detection.decode import Proposals
from stale.detection.run import class_features, detect, to_results
from stale.detection.writers import results_json
from stale.io import read_json
from stale.run_folder import RunFolder
from tests.helpers import WIDTH


def copy_with_batches(run: RunFolder, folder: Path, size: int) -> RunFolder:
    """A copy of a run that detects in batches of ``size`` videos."""
    copied = RunFolder(shutil.copytree(run.path, folder))
    text = copied.config.read_text()
    copied.config.write_text(text.replace("batch_size: 32", f"batch_size: {size}"))
    assert copied.load_config().detection.batch_size == size
    return copied


@pytest.mark.parametrize("size", [3, 32])
def test_files_are_those_of_features_in_memory(run: RunFolder, tmp_path: Path, size: int) -> None:
    """To the byte: batches loaded from disk against features in one block."""
    copied = copy_with_batches(run, tmp_path / "run", size)
    infer(copied, vocabulary="all")
    detector = load(copied.path)
    test, config = load_test_data(detector.config, "all"), detector.config
    features = load_features([video.id for video in test.videos], test.store, config.data.num_snippets)
    classes = class_features(detector.model, test.classes)
    found = detect(detector.model, test.videos, features, classes, options=config.detection, progress=False)
    written = copied.detections("all").read_text(encoding="utf-8")
    whole = results_json(found, protocol=json.loads(written)["protocol"])
    assert written == json.dumps(whole, ensure_ascii=False) + "\n"

    one_by_one = config.detection.model_copy(update={"batch_size": 1})
    other = detect(detector.model, test.videos, features, classes, options=one_by_one, progress=False)
    for video, rows in found.items():  # a matrix product of another batch rounds in another way
        assert [row["score"] for row in other[video]] == pytest.approx([row["score"] for row in rows], rel=1e-4)


def test_a_few_batches_are_in_memory_at_once(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 batches of features."""
    own_run = copy_with_batches(run, tmp_path / "run", 1)
    alive: set[int] = set()
    loaded, held = [], []

    def counted(ids: list[str], *others: Any) -> Tensor:
        features = load_features(ids, *others)
        loaded.extend(ids)
        alive.add(len(loaded))
        weakref.finalize(features, alive.discard, len(loaded))
        held.append(len(alive))
        return features

    monkeypatch.setattr(dataset, "load_features", counted)
    leftover = own_run.path / ".detections_all.a1b2c3d4.json"
    leftover.write_text('{"version": ')
    infer(own_run, vocabulary="all")
    assert len(loaded) == len(read_json(own_run.detections("all"), "detections")["results"]) == 16
    assert max(held) <= 3
    assert not leftover.exists(), "what a killed process left is removed"


def test_a_mask_that_passes_nothing_is_reported(run: RunFolder, log: pytest.LogCaptureFixture) -> None:
    detector, features = load(run.path), torch.randn(20, WIDTH).numpy()
    detector.detect(features, 2.0, ["Diving", "GolfSwing"], name="a")
    assert not log.text
    detector.model.config = load_config([run.config], ["model.masking.threshold=1"]).model
    detector.detect(features, 2.0, ["Diving", "GolfSwing"], name="a")
    assert "no snippet passes L (model.masking.threshold), and labels mean nothing, in a" in log.text


def test_results_are_in_seconds_sorted_and_complete() -> None:
    videos = [Video("long", "test", 80.0, ()), Video("empty", "test", 10.0, ())]
    proposals = Proposals(
        torch.tensor([[[2.0, 4.0], [0.0, 8.0], [0.0, 0.0]], [[0.0, 0.0]] * 3]),
        torch.tensor([[0.9, 0.5, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1, 0, 0], [0, 0, 0]]),
        num_snippets=8,
    )
    results = to_results(videos, proposals, ["a", "b"], DetectionConfig())
    assert results["empty"] == []
    assert [(row["segment"], row["label"]) for row in results["long"]] == [([20.0, 40.0], "b"), ([0.0, 80.0], "a")]
    assert [row["score"] for row in results["long"]] == pytest.approx([0.9, 0.5])
    assert all(type(row["score"]) is float for row in results["long"])
    proposals.segments[0, 2], proposals.scores[0, 2], proposals.labels[0, 2] = torch.tensor([2.0, 5.0]), 0.3, 1
    voted = to_results(videos, proposals, ["a", "b"], DetectionConfig(voting=0.6))
    assert [row["segment"] for row in voted["long"]][:2] == [[20.0, 42.5], [0.0, 80.0]]
    assert [row["score"] for row in voted["long"]][:2] == pytest.approx([0.9, 0.5])
    few = to_results(videos, proposals, ["a", "b"], DetectionConfig(max_detections=1))
    assert few["long"] == results["long"][:1]
