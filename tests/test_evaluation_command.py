"""``eval.py`` end to end: predictions, run folders, many runs; the protocol line; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, needs_shared

import eval as command
from stale.errors import StaleError
from stale.evaluation.aggregate import aggregate, statistics, student_quantile
from stale.evaluation.protocol import check_tious, default_tious, format_tious

LABELS = ["Archery", "Ballet", "Curling"]
ROWS = ("whole_video", "snippets")


def annotations(folder, seed=0):
    """Eight test videos and one training video of three classes."""
    rng = np.random.default_rng(seed)
    database = {"train": {"subset": "training", "duration": 9.0, "annotations": []}}
    for index in range(8):
        starts = rng.uniform(0, 80, 3)
        items = [{"segment": [s, s + 10.0], "label": LABELS[(index + n) % 3]} for n, s in enumerate(starts)]
        database[f"v{index}"] = {"subset": "validation", "duration": 100.0, "annotations": items}
    path = folder / "annotations.json"
    path.write_text(json.dumps({"database": database}))
    return path, database


def detect(database, classes, seed, spread=4.0):
    """Noisy copies of the ground truth of ``classes``."""
    rng = np.random.default_rng(seed)
    results = {}
    for name, entry in database.items():
        for item in entry["annotations"]:
            if item["label"] in classes:
                segment = (np.sort(item["segment"] + rng.normal(0, spread, 2))).tolist()
                found = {"segment": segment, "label": item["label"], "score": float(rng.random())}
                results.setdefault(name, []).append(found)
    return results


def make_run(folder, split=0, vocabulary="unseen", seed=0, **protocol):
    """A run folder as inference.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    path, database = annotations(folder)
    classes = {"unseen": ["Curling"], "seen": ["Archery", "Ballet"], "all": LABELS}[vocabulary]
    stated = {
        "dataset": "activitynet",
        "setting": "75_25",
        "split": split,
        "split_source": "official lists",
        "subset": "validation",
        "vocabulary": vocabulary,
        "classes": classes,
        "tious": [0.3, 0.5],
        "annotations": str(path),
        "checkpoint": "best",
        "features": "random",
        "skipped_videos": 0,
        "checkpoint_chosen_on": f"mAP of held-out videos of seen classes, epoch {split}",
        **protocol,
    }
    files = {name: (f"untrained/{name}", 20.0) for name in ROWS}
    for stem, spread in [("detections", 3.0), *files.values()]:
        target = folder / command.file_name(stem, vocabulary)
        target.parent.mkdir(exist_ok=True)
        content = {"version": "stale", "external_data": {"used": False, "details": ""}, "protocol": stated}
        target.write_text(json.dumps({**content, "results": detect(database, classes, seed + split, spread)}))
    return folder


def evaluated(folder, *options, **settings):
    run = make_run(folder, **settings)
    command.main(["--run", str(run), *options])
    return run


def test_run_writes_metrics_and_prints_the_protocol(tmp_path, capsys):
    run = evaluated(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["mAP"]) == ["0.30", "0.50"] and set(metrics["per_class"]) == {"Curling"}
    assert metrics["average_mAP"] == pytest.approx(np.mean(list(metrics["mAP"].values())))
    assert (metrics["num_ground_truth"], metrics["num_videos"], metrics["num_classes"]) == (8, 8, 1)
    assert set(ROWS) < set(metrics["untrained"]) and set(metrics["average_recall"]) == {"1", "5", "10", "50", "100"}
    for row in metrics["untrained"].values():
        assert 0 <= row["average_mAP"] < metrics["average_mAP"] <= 1
    printed = capsys.readouterr().out
    tables = printed.strip().split("\n\n")
    assert len(tables) == 3 and all(table.startswith("protocol: activitynet") for table in tables)
    line = tables[0].splitlines()[0]
    parts = [
        *("setting 75_25, split 0 (official lists)", "subset validation: 8 videos, 8 instances, 1 classes (unseen)"),
        *("tIoU 0.30, 0.50", "duplicates kept", "external scores none"),
        "chosen on mAP of held-out videos of seen classes, epoch 0",
    ]
    assert all(part in line for part in parts) and metrics["protocol"]["line"] == line
    assert "untrained" in tables[0]


def test_run_without_detections_says_what_to_do(tmp_path):
    with pytest.raises(StaleError, match="run inference.py first"):
        command.main(["--run", str(tmp_path)])


def test_untrained_rows_left_out_by_inference_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "untrained" / "snippets.json").unlink()
    command.main(["--run", str(run)])
    assert set(json.loads((run / "metrics.json").read_text())["untrained"]) == {"chance", "whole_video"}
    assert "did not write" in capsys.readouterr().out


def test_generalised_run_shows_seen_unseen_and_all(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    evaluated(run, "--vocabulary", "all", vocabulary="all")
    metrics = json.loads((run / "metrics_all.json").read_text())
    groups = metrics["groups"]
    averages = {label: row["average"] for label, row in metrics["per_class"].items()}
    assert groups["unseen classes"]["average_mAP"] == pytest.approx(averages["Curling"])
    seen, unseen = (averages["Archery"] + averages["Ballet"]) / 2, averages["Curling"]
    assert groups["seen classes"]["average_mAP"] == pytest.approx(seen)
    assert groups["harmonic mean"]["average_mAP"] == pytest.approx(2 * seen * unseen / (seen + unseen))
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("all classes", "seen classes", "unseen classes", "harmonic mean"))


def test_predictions_from_anywhere(tmp_path, capsys):
    path, database = annotations(tmp_path)
    results = detect(database, LABELS, 0)
    results["v0"].append({"segment": [3, 1], "label": "Ballet", "score": 0.1})
    (tmp_path / "p.json").write_text(json.dumps({"results": results}))
    (tmp_path / "list").write_text("Ballet\r\nCurling")
    base = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(path)]
    command.main([*base, "--split-file", str(tmp_path / "list"), "--json", str(tmp_path / "out.json")])
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert set(metrics["per_class"]) == {"Ballet", "Curling"} and "chance" in metrics["untrained"]
    assert {one["kind"] for one in metrics["problems"]} == {
        "a segment of negative length",
        "a label outside the vocabulary",
    }
    printed = capsys.readouterr().out
    assert (
        "external scores none here, the file does not state its own" in printed
        and "1 with a segment of negative length: v0" in printed
    )
    with pytest.raises(StaleError, match="negative length"):
        command.main([*base, "--strict"])


def test_actionformers_columns_with_numbered_labels(tmp_path):
    path, database = annotations(tmp_path)
    for entry in database.values():
        for item in entry["annotations"]:
            item["label_id"] = LABELS.index(item["label"])
    path.write_text(json.dumps({"database": database}))
    rows = [(name, *i["segment"], i["label_id"], 0.5) for name, v in database.items() for i in v["annotations"]]
    columns = dict(zip(("video-id", "t-start", "t-end", "label", "score"), zip(*rows, strict=True), strict=True))
    (tmp_path / "p.json").write_text(json.dumps(columns))
    files = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(path)]
    command.main([*files, "--strict", "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["average_mAP"] == pytest.approx(1.0)


def test_external_scores_are_labelled(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    scores = {f"v{index}": ["Curling", 0.5] for index in range(8)}
    (tmp_path / "s.json").write_text(json.dumps(scores))
    command.main(["--run", str(run), "--video-scores", str(tmp_path / "s.json")])
    printed = capsys.readouterr().out
    assert "external scores s.json" in printed and "detections, external scores" in printed
    assert "trivial: the external label on the whole video" in printed
    scores["v0"] = ["Archery", 0.9]
    (tmp_path / "s.json").write_text(json.dumps(scores))
    with pytest.raises(StaleError, match="--allow-unseen-supervision"):
        command.main(["--run", str(run), "--video-scores", str(tmp_path / "s.json")])
    command.main(["--run", str(run), "--video-scores", str(tmp_path / "s.json"), "--allow-unseen-supervision"])
    assert "external scores s.json with --allow-unseen-supervision" in capsys.readouterr().out


@needs_shared
@pytest.mark.parametrize("counting", ["keep", "drop"])
def test_golden_files_by_command(tmp_path, capsys, counting):
    folder = SHARED / "golden" / "anet13_mini"
    expected = json.loads((folder / "expected.json").read_text())
    files = ["--predictions", str(folder / "pred.json"), "--annotations", str(folder / "gt.json")]
    tious = [str(value) for value in expected["tiou"]]
    command.main([*files, "--duplicates", counting, "--tiou", *tious, "--json", str(tmp_path / "out.json")])
    metrics = json.loads((tmp_path / "out.json").read_text())
    evaluator = expected["evaluators"]["activitynet_official" if counting == "keep" else "actionformer"]
    np.testing.assert_allclose(list(metrics["mAP"].values()), evaluator["mAP"], rtol=0, atol=1e-9)
    assert f"duplicates {'kept' if counting == 'keep' else 'dropped (1)'}" in capsys.readouterr().out


def test_runs_are_aggregated(tmp_path, capsys):
    runs = [str(evaluated(tmp_path / "a" / str(split), split=split)) for split in range(3)]
    other = [str(evaluated(tmp_path / "b" / str(split), split=split, seed=50)) for split in range(3)]
    capsys.readouterr()
    command.main(["--runs", *runs, "--versus", *other, "--json", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    values = [json.loads(Path(run, "metrics.json").read_text())["average_mAP"] for run in runs]
    cell = content["rows"]["detections"]["average"]
    assert cell["mean"] == pytest.approx(np.mean(values)) and cell["std"] == pytest.approx(np.std(values, ddof=1))
    half = 4.3027 * np.std(values, ddof=1) / np.sqrt(3)
    assert cell["ci95"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert {"versus", *ROWS} < set(content["paired"])
    gap = content["paired"]["versus"]["average"]["values"]
    theirs = content["rows"]["versus"]["average"]["values"]
    assert gap == pytest.approx(np.subtract(values, theirs).tolist())
    printed = capsys.readouterr().out
    assert printed.startswith("protocol: activitynet | 3 runs, splits 0, 1, 2") and "detections − versus" in printed


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"setting": "50_50"}, "setting"),
        ({"tious": [0.5]}, "tious"),
        ({"checkpoint_chosen_on": "loss on unseen classes"}, "checkpoint_chosen_on"),
        ({"features": "other"}, "features"),
    ],
)
def test_protocols_are_not_mixed(tmp_path, change, key):
    first, second = evaluated(tmp_path / "0"), evaluated(tmp_path / "1", split=1, **change)
    with pytest.raises(StaleError, match=f"protocols differ in {key}"):
        command.main(["--runs", str(first), str(second)])


def test_runs_that_cannot_be_aggregated(tmp_path):
    first, again, second = (evaluated(tmp_path / str(i), split=s) for i, s in enumerate((0, 0, 1)))
    with pytest.raises(StaleError, match="split 0 given more than once"):
        command.main(["--runs", str(first), str(again), str(second)])
    with pytest.raises(StaleError, match="need the same splits"):
        command.main(["--runs", str(first), "--versus", str(second)])
    with pytest.raises(StaleError, match="evaluate the run first"):
        command.main(["--runs", str(tmp_path)])
    command.main(["--runs", str(first), str(again)])  # seeds of one split


def test_generalised_runs_are_aggregated(tmp_path, capsys):
    unseen = {"unseen_classes": ["Curling"]}
    runs = [
        str(evaluated(tmp_path / str(split), "--vocabulary", "all", split=split, vocabulary="all", **unseen))
        for split in range(2)
    ]
    command.main(["--runs", *runs, "--vocabulary", "all", "--json", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert {"seen classes", "unseen classes", "harmonic mean"} < set(content["rows"])
    assert set(content["paired"]) == {"chance", *ROWS}


def test_one_run_has_a_mean_alone(tmp_path):
    run = evaluated(tmp_path / "run")
    content = aggregate({"run": json.loads((run / "metrics.json").read_text())})
    assert content["rows"]["detections"]["average"]["std"] is None


def test_student_quantiles():
    assert student_quantile(1) == 12.7062 and student_quantile(9) == 2.2622
    assert student_quantile(40) == pytest.approx(2.0211, abs=1e-3)
    assert statistics(np.array([1.0, 2.0, 3.0]))["std"] == 1.0


def test_thresholds():
    assert default_tious("THUMOS14") == (0.3, 0.4, 0.5, 0.6, 0.7)
    assert default_tious("other") == default_tious("activitynet") and len(default_tious("other")) == 10
    assert format_tious(default_tious("activitynet")) == "0.50:0.05:0.95" and format_tious([0.5]) == "0.50"
    for wrong in ([], [0.0], [50], [0.5, 0.5]):
        with pytest.raises(StaleError):
            check_tious(wrong)


def test_anothers_protocol_leaves_the_metrics_of_the_run_alone(tmp_path, capsys):
    run = evaluated(tmp_path / "run")
    before = (run / "metrics.json").read_text()
    command.main(["--run", str(run), "--duplicates", "drop", "--tiou", "0.9", "--json", str(tmp_path / "out.json")])
    assert (run / "metrics.json").read_text() == before
    assert list(json.loads((tmp_path / "out.json").read_text())["mAP"]) == ["0.90"]
    assert "metrics.json is not written" in capsys.readouterr().out


def test_command_line_is_checked(tmp_path):
    wrong = [["--predictions", "p"], [], ["--run", "r", "--versus", "q"], ["--runs", "r", "--tiou", "0.5"]]
    for arguments in (*wrong, ["--run", "r", "--split-file", "l"], ["--predictions", "p", "--vocabulary", "all"]):
        with pytest.raises(SystemExit):
            command.main(arguments)


def test_subset_and_list_are_checked(tmp_path):
    path, _ = annotations(tmp_path)
    (tmp_path / "p.json").write_text('{"results": {}}')
    (tmp_path / "list").write_text("Juggling\n")
    base = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(path)]
    with pytest.raises(StaleError, match="no video in subset 'test'"):
        command.main([*base, "--subset", "test"])
    with pytest.raises(StaleError, match="not in the annotations: Juggling"):
        command.main([*base, "--split-file", str(tmp_path / "list")])
    command.main(base)
