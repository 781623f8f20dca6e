"""Ground truth in place of predictions is named wherever it is used, and used nowhere else."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stale.api import infer, load
from stale.config import load_config
from stale.data.annotations import Instance, Video
from stale.detection.run import class_features, propose, to_results
from stale.errors import StaleError
from stale.evaluation import evaluate_results
from stale.io import read_json
from stale.model.stale import build_model
from stale.run_folder import ORACLES, RunFolder
from stale.training.trainer import train
from tests.helpers import UNSEEN, WIDTH, tiny_config, tiny_text_transformer


@pytest.mark.parametrize(
    ("oracle", "words"),
    [
        (["masks"], "GROUND-TRUTH FOREGROUND MASKS L at test time"),
        (["labels", "localizer"], "GROUND-TRUTH INSTANCE MASKS M at test time, GROUND-TRUTH VIDEO LABELS at test time"),
        (["proposals"], "GROUND-TRUTH SEGMENTS at test time"),
    ],
)
def test_an_oracle_is_named_and_keeps_the_runs_detections(
    data: Path, run: RunFolder, oracle: list[str], words: str
) -> None:
    before = run.detections("unseen").read_bytes()
    infer(run, oracle=oracle)
    assert run.detections("unseen").read_bytes() == before
    content = read_json(run.detections("unseen", oracle), "detections")
    assert content["protocol"]["oracle"] == words
    assert json.loads(before)["protocol"]["oracle"] == "none"
    assert content["results"] != json.loads(before)["results"]
    database = read_json(data.parent / "annotations.json", "annotations")["database"]
    for video, rows in content["results"].items() if oracle == ["proposals"] else ():
        truth = [item["segment"] for item in database[video]["annotations"] if item["label"] in UNSEEN]
        assert rows
        assert all(any(row["segment"] == pytest.approx(one, abs=2e-3) for one in truth) for row in rows)


NAMES = ["diving", "high jump", "shot put"]
# Two instances of one class in each video, with edges between snippets.
LABELLED = [
    Video(str(n), "test", 16.0, tuple(Instance(*edges, NAMES[n]) for edges in ((1.0, 5.0), (8.0, 14.0))))
    for n in range(3)
]


def untrained(*assignments: str, videos: Sequence[Video] = LABELLED, names: Sequence[str] = NAMES) -> tuple:
    """Outputs, proposals and results of a model that was not trained."""
    torch.manual_seed(0)
    features = torch.randn(3, 16, WIDTH, generator=torch.Generator().manual_seed(1))
    config = load_config((), ["model.masking.layers=1", "model.masking.threshold=0", *assignments])
    model = build_model(config.model, 16, WIDTH, tiny_text_transformer(layers=1)).eval()
    with torch.inference_mode():
        found = propose(model, videos, features, class_features(model, names), options=config.detection)
    return *found, to_results(videos, found[1], names, config.detection)


def test_only_an_oracle_uses_ground_truth() -> None:
    """Detection takes annotated videos; without an oracle their instances must make no difference."""
    bare = [replace(video, instances=()) for video in LABELLED]
    assert torch.equal(untrained()[1].scores, untrained(videos=bare)[1].scores)
    for oracle in (*(f"detection.oracle=[{name}]" for name in ORACLES), "model.masking.kind=gt"):
        assert untrained(oracle)[1].scores.sum() > 0
        with pytest.raises(StaleError, match="no ground truth.* in 0, 1, 2"):
            untrained(oracle, videos=bare)


@pytest.mark.parametrize("oracle", ["masks, localizer, labels", "localizer, labels", "labels, proposals"])
@pytest.mark.parametrize("score", ["foreground_weight=true", "video_score=true", "classify_by=proposals"])
def test_true_parts_together_find_every_instance(oracle: str, score: str) -> None:
    if score == "classify_by=proposals" and "proposals" not in oracle:
        score = "nms_sigma=0.3"  # class-agnostic proposals choose one snippet's mask by L

    def average(*oracles: str) -> float:
        results = untrained(f"detection.{score}", f"detection.oracle=[{', '.join(oracles)}]")[2]
        return evaluate_results(LABELLED, results, NAMES, [0.5, 0.95]).average

    assert average(*oracle.split(", ")) == 1.0
    assert all(average(one) < 1.0 for one in (*oracle.split(", "), ""))


@pytest.mark.parametrize("score", ["foreground_weight=false", "video_score=true", "proposals=[masks, foreground]"])
@pytest.mark.parametrize("more", ["", ", proposals"])
def test_a_class_that_does_not_occur_is_never_detected_with_true_labels(score: str, more: str) -> None:
    results = untrained(f"detection.{score}", f"detection.oracle=[labels{more}]")[2]
    for video in LABELLED:
        assert {row["label"] for row in results[video.id]} == {video.instances[0].label}
    assert {row["label"] for rows in untrained(f"detection.{score}")[2].values() for row in rows} == {*NAMES}


def test_a_true_column_is_the_instance_around_its_snippet_in_any_vocabulary() -> None:
    expected = torch.zeros(3, 16, 16)
    expected[:, 1:5, 1:5] = expected[:, 8:14, 8:14] = 1
    for names in (NAMES, NAMES[::-1]):
        outputs = untrained("detection.oracle=[localizer]", names=names)[0]
        assert torch.equal(outputs.mask_logits.sigmoid(), expected)
        assert not torch.equal(outputs.foreground.round(), expected.amax(1)), "L is the prediction"


def test_a_run_with_ground_truth_masks_says_so(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, "model.masking.kind=gt", "train.epochs=1"), tmp_path / "run")
    assert "foreground" not in json.loads(run.history.read_text().splitlines()[0])
    infer(run)
    protocol = read_json(run.detections("unseen"), "detections")["protocol"]
    assert protocol["oracle"] == "GROUND-TRUTH FOREGROUND MASKS L in training and at test time"
    assert load(run.path).detect_annotated("video_000", "seen").foreground.max() == 1
