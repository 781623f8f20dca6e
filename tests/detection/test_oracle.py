"""Ground truth in place of predictions is named wherever it is used, and used nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stale.api import infer, load
from stale.config import load_config
from stale.data.annotations import Instance, Video
from stale.detection.run import class_features, propose
from stale.errors import StaleError
from stale.io import read_json
from stale.model.stale import build_model
from stale.run_folder import RunFolder
from stale.training.trainer import train
from tests.helpers import UNSEEN, WIDTH, tiny_config, tiny_text_transformer


@pytest.mark.parametrize(
    ("oracle", "words"), [("masks", "GROUND-TRUTH MASKS at test time"), ("proposals", "GROUND-TRUTH SEGMENTS")]
)
def test_an_oracle_is_named_and_keeps_the_runs_detections(data: Path, run: RunFolder, oracle: str, words: str) -> None:
    before = run.detections("unseen").read_bytes()
    infer(run, oracle=oracle)
    assert run.detections("unseen").read_bytes() == before
    content = read_json(run.detections("unseen", oracle), "detections")
    assert words in content["protocol"]["oracle"]
    assert json.loads(before)["protocol"]["oracle"] == "none"
    assert content["results"] != json.loads(before)["results"]
    database = read_json(data.parent / "annotations.json", "annotations")["database"]
    for video, rows in content["results"].items() if oracle == "proposals" else ():
        truth = [item["segment"] for item in database[video]["annotations"] if item["label"] in UNSEEN]
        assert rows
        assert all(any(row["segment"] == pytest.approx(one, abs=2e-3) for one in truth) for row in rows)


def test_only_an_oracle_uses_ground_truth() -> None:
    """Detection takes annotated videos; without an oracle their instances must make no difference."""
    names, T = ["diving", "high jump", "shot put"], 16
    features = torch.randn(3, T, WIDTH, generator=torch.Generator().manual_seed(1))
    labelled = [Video(str(n), "test", 16.0, (Instance(1.0, 5.0, names[0]),)) for n in range(3)]
    bare = [replace(video, instances=()) for video in labelled]

    def scores(videos: list[Video], *assignments: str) -> Tensor:
        torch.manual_seed(0)
        config = load_config((), ["model.masking.layers=1", "model.masking.threshold=0", *assignments])
        model = build_model(config.model, T, WIDTH, tiny_text_transformer(layers=1)).eval()
        with torch.inference_mode():
            return propose(model, videos, features, class_features(model, names), options=config.detection)[1].scores

    assert torch.equal(scores(labelled), scores(bare))
    for oracle in ("detection.oracle=masks", "detection.oracle=proposals", "model.masking.kind=gt"):
        assert scores(labelled, oracle).sum() > 0
        with pytest.raises(StaleError, match="no ground truth.* in 0, 1, 2"):
            scores(bare, oracle)


def test_a_run_with_ground_truth_masks_says_so(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, "model.masking.kind=gt", "train.epochs=1"), tmp_path / "run")
    assert "foreground" not in json.loads(run.history.read_text().splitlines()[0])
    infer(run)
    assert "GROUND-TRUTH MASKS in training" in read_json(run.detections("unseen"), "detections")["protocol"]["oracle"]
    assert load(run.path).detect_annotated("video_000", "seen").foreground.max() == 1
