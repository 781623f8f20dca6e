"""Training and detection end to end on a tiny data set: vocabularies, detections of every video, the three commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stale.api import infer
from stale.checkpoint import load_checkpoint
from stale.data.classes import phrase
from stale.evaluation import read_results
from stale.io import read_json
from stale.run_folder import BASELINES, RunFolder
from stale.training.trainer import train
from tests.helpers import (
    NUM_TEST,
    REPOSITORY,
    SEEN,
    SNIPPETS,
    UNSEEN,
    history,
    tiny_config,
)


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
    for row in BASELINES:
        assert check_detections(run.baselines(row, "unseen"), UNSEEN, durations)["protocol"]["checkpoint"] == "none"


@pytest.mark.parametrize(("vocabulary", "classes"), [("seen", SEEN), ("all", (*SEEN, *UNSEEN))])
def test_a_checkpoint_of_seen_names_loads_under_other_vocabularies(
    data: Path, run: RunFolder, vocabulary: str, classes: tuple[str, ...]
) -> None:
    infer(run, "last", vocabulary)
    content = check_detections(run.path / f"detections_{vocabulary}.json", classes, durations_of(data, classes))
    assert content["protocol"]["vocabulary"] == vocabulary
    assert content["protocol"]["checkpoint_chosen_on"] == "nothing: epoch 2"
    assert all(run.baselines(row, vocabulary).is_file() for row in BASELINES)


def test_a_checkpoint_holds_no_vocabulary(run: RunFolder) -> None:
    content = run.checkpoint("last").read_bytes().lower()
    assert b"feature_width" in content, "texts are stored as they are"
    assert not any(text.lower().encode() in content for label in SEEN for text in (label, phrase(label)))
    weights = load_checkpoint(run.checkpoint("last"))["model"]
    assert all(len(SEEN) not in tensor.shape for tensor in weights.values())


@pytest.mark.parametrize(
    "assignments",
    [
        ("data.setting=closed",),
        ("data.setting=50_50", "data.splits=null"),
        ("model.text.prompt=template", "model.text.encoder=frozen"),
        ("model.masking.kind=none", "model.adaptation.enabled=false"),
        ("model.localizer.kind=plain", "model.localizer.coordinates=pairwise", "model.temporal.kind=conv"),
        ("loss.consistency=0", "train.clip_norm=0", "train.text_learning_rate=1e-5", "train.deterministic=true"),
    ],
    ids=" ".join,
)
def test_other_settings_train_and_detect(data: Path, tmp_path: Path, assignments: tuple[str, ...]) -> None:
    run = train(tiny_config(data, *assignments, "train.epochs=1"), tmp_path / "run")
    infer(run, curves=True)
    records = history(run)
    assert ("consistency" in records[0]) == ("loss.consistency=0" not in assignments)
    assert ("foreground" in records[0]) == ("model.masking.kind=none" not in assignments)
    results = read_json(run.detections("unseen"), "detections")
    masked = "model.masking.kind=none" not in assignments
    for video, curves in read_json(run.snippet_scores("unseen"), "curves")["results"].items():
        detected = [item["label"] for item in results["results"][video]]
        assert [curve["label"] for curve in curves] == [*list(dict.fromkeys(detected))[:5], *([""] if masked else [])]
        assert all(len(curve["percent"]) == SNIPPETS and min(curve["percent"]) >= 0 for curve in curves)
    assert len(results["protocol"]["classes"]) == {"closed": 8, "50_50": 4}.get(run.load_config().data.setting, 2)


def command(script: str, *arguments: str, cwd: Path, modules: Path | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(REPOSITORY / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(modules or "")}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--settings"], 0, r"\| `train.learning_rate` \| `0.0001` \|.*"),
        (["--set", "train.epoch=3", "--output", "run"], 2, "error: .*unknown key 'train.epoch'.*train.epochs.*\n"),
        (["--output", "run", "--resume", "--overwrite"], 2, ".*error: --resume continues a run, --overwrite .*"),
        ([], 2, ".*error: the following arguments are required: --output\n"),
    ],
)
def test_train_answers_before_torch_is_imported(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/torch.py").write_text("raise SystemExit('torch is imported')")
    result = command("train.py", *arguments, cwd=tmp_path, modules=tmp_path / "modules")
    assert result.returncode == code, result.stderr
    assert re.search(message, result.stderr or result.stdout, re.DOTALL), result.stderr
    assert len(list(tmp_path.iterdir())) == 1
