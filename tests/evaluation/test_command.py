"""``eval.py`` end to end: predictions, run folders, many runs; the protocol; what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import eval as command
from stale.config import load_config, save_config
from stale.data.datasets import facts
from stale.errors import StaleError
from stale.evaluation.aggregate import aggregate, statistics
from stale.evaluation.tables import check_tious, format_tious, render
from stale.run_folder import BASELINES, RunFolder
from tests.helpers import SHARED, needs_shared

LABELS = ["Archery", "Ballet", "Curling"]


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
    stated = {"dataset": "activitynet", "setting": "75_25", "split": split, "split_source": "official lists"}
    stated |= {"subset": "validation", "vocabulary": vocabulary, "classes": classes, "tious": [0.3, 0.5]}
    stated |= {"annotations": str(path), "checkpoint": "best", "features": "random", "skipped_videos": 0}
    stated |= {"checkpoint_chosen_on": f"mAP of held-out videos of seen classes, epoch {split}", **protocol}
    run = RunFolder(folder)
    files = {run.detections(vocabulary): 3.0, **{run.baselines(name, vocabulary): 20.0 for name in BASELINES}}
    for target, spread in files.items():
        target.parent.mkdir(exist_ok=True)
        content = {"version": "stale", "external_data": {"used": False, "details": ""}, "protocol": stated}
        target.write_text(json.dumps({**content, "results": detect(database, classes, seed + split, spread)}))
    return folder


def evaluated(folder, *options, **settings):
    run = make_run(folder, **settings)
    command.main(["--run", str(run), *options])
    return run


def configure(run, *assignments):
    save_config(load_config([], ["model.text.weights=one/c.pt", *assignments]), RunFolder(Path(run)).config)


def load(path):
    return json.loads(Path(path).read_text())


def test_run_writes_metrics_and_prints_the_protocol_once(tmp_path, capsys):
    run = evaluated(tmp_path / "run")
    metrics = load(run / "metrics.json")
    assert list(metrics["mAP"]) == ["0.30", "0.50"] and set(metrics["per_class"]) == {"Curling"}
    assert metrics["average_mAP"] == pytest.approx(np.mean(list(metrics["mAP"].values())))
    assert (metrics["num_ground_truth"], metrics["num_videos"], metrics["num_classes"]) == (8, 8, 1)
    assert set(metrics["baselines"]) == {"random", *BASELINES}
    assert set(metrics["average_recall"]) == {"1", "5", "10", "50", "100"}
    for row in metrics["baselines"].values():
        assert 0 <= row["average_mAP"] < metrics["average_mAP"] <= 1
    printed = capsys.readouterr().out
    assert printed.startswith("protocol: activitynet, test\n") and printed.count("protocol:") == 1
    parts = [
        *("setting 75_25, split 0 (official lists)", "subset validation: 8 videos, 8 instances, 1 class (unseen)"),
        *("tIoU 0.30, 0.50", "duplicates kept", "external scores none"),
        "checkpoint best, chosen on mAP of held-out videos of seen classes, epoch 0",
    ]
    assert all(f"\n  {part}\n" in printed for part in parts)
    assert metrics["protocol"]["line"].split(" | ")[1] == parts[0]
    rows = ("random", "training-free: top-1 label, whole video", "detected segments with true labels", "class-agnostic")
    assert all(f"\n{row}  " in printed for row in rows) and "95 %" not in printed and "Curling" not in printed


def test_printed_lines_have_at_most_100_columns(tmp_path, capsys):
    stated = {"tious": list(facts("activitynet").tious), "features": "features/" * 30, "unseen_classes": ["Curling"]}
    run = make_run(tmp_path / ("long" * 30), vocabulary="all", **stated)
    path = RunFolder(run).detections("all")
    content = load(path)
    content["results"]["v0"] += [{"segment": [0, 1], "label": f"{n} unknown" * 9, "score": 1} for n in range(9)]
    path.write_text(json.dumps(content))
    scores = {"class": LABELS, "kind": "oracle", "results": {f"v{index}": [0.5, 0.1, 0.2] for index in range(8)}}
    (tmp_path / "s.json").write_text(json.dumps(scores))
    command.main(["--run", str(run), "--protocol", "generalized", "--video-scores", str(tmp_path / "s.json"), "-v"])
    printed = capsys.readouterr().out
    rows = ("detections, external scores", "top-1 external label, whole video")
    assert all(f"\n{name}" in printed for name in ("Curling (8)", "harmonic mean", "warning", *rows))
    assert "external scores s.json" in printed and "95 %" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("form", "row", "text"),
    [("markdown", "| detections | {} | {} | {} |", ""), ("latex", r"detections & {} & {} & {} \\", "% ")]
    + [("csv", "detections,{},{},{}", "# ")],
)
def test_every_format_has_the_values_in_per_cent(tmp_path, capsys, form, row, text):
    metrics = load(evaluated(tmp_path / "run", "--format", form) / "metrics.json")
    values = [f"{100 * value:.2f}" for value in (*metrics["mAP"].values(), metrics["average_mAP"])]
    lines = capsys.readouterr().out.splitlines()
    assert row.format(*values) in lines and lines[0] == f"{text}protocol: activitynet, test"
    special = render([(["a_b", "50 %"], [["x|y", "1 ± 2"]])], form)
    kept = {"markdown": r"x\|y | 1 ± 2", "latex": r"a\_b & 50 \%", "csv": "x|y,1 ± 2"}
    assert kept[form] in special


def test_a_closed_set_has_no_unseen_classes_and_durations_are_not_needed(tmp_path, capsys):
    run = evaluated(tmp_path / "run", setting="closed")
    assert "1 class (all seen in training)" in capsys.readouterr().out
    expected, annotated = load(run / "metrics.json"), load(run / "annotations.json")
    for entry in annotated["database"].values():
        del entry["duration"]
    (run / "annotations.json").write_text(json.dumps(annotated))
    command.main(["--run", str(run)])
    assert "not all durations are annotated" in capsys.readouterr().err
    assert load(run / "metrics.json")["per_class"] == expected["per_class"]


def test_absent_files_of_a_run_are_named(tmp_path, capsys):
    with pytest.raises(StaleError, match="run inference.py first"):
        command.main(["--run", str(tmp_path)])
    run = make_run(tmp_path / "run")
    RunFolder(run).baselines("snippets", "unseen").unlink()
    command.main(["--run", str(run)])
    assert set(load(run / "metrics.json")["baselines"]) == {"random", *BASELINES} - {"snippets"}
    assert "did not write" in capsys.readouterr().err


def test_generalised_run_shows_seen_unseen_and_all(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    evaluated(run, "--protocol", "generalized", vocabulary="all")
    metrics = load(run / "metrics_all.json")
    averages = {label: row["average"] for label, row in metrics["per_class"].items()}
    seen, unseen = (averages["Archery"] + averages["Ballet"]) / 2, averages["Curling"]
    mean = 2 * seen * unseen / (seen + unseen)
    expected = {"seen classes": seen, "unseen classes": unseen, "harmonic mean": mean}
    assert {name: row["average_mAP"] for name, row in metrics["groups"].items()} == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert printed.startswith("protocol: activitynet, generalized\n")
    assert all(f"\n{name}" in printed for name in ("all classes", *expected))
    (tmp_path / "list").write_text("Curling\n")
    source = ["--predictions", str(RunFolder(run).detections("all")), "--annotations", str(run / "annotations.json")]
    listed = ["--split-file", str(tmp_path / "list"), "--json", str(tmp_path / "out.json")]
    command.main([*source, *listed, "--protocol", "generalized"])
    assert load(tmp_path / "out.json")["groups"] == metrics["groups"]
    with pytest.raises(StaleError, match="needs seen and unseen classes; the run has one group"):
        evaluated(tmp_path / "closed", "--protocol", "generalized", vocabulary="all", unseen_classes=[])


@needs_shared
@pytest.mark.parametrize(("setting", "split"), [("75", 0), ("75", 9), ("50", 3)])
def test_validation_and_test_videos_together_are_those_of_freezad(tmp_path, setting, split):
    """Their ground truth is that of the official annotations, without instances after the end of the video."""
    golden, folder = SHARED / "golden/freezad", f"train_{setting}_test_{100 - int(setting)}"
    unseen = SHARED / "data/splits" / folder / f"THUMOS14/test/split_{split}.list"
    options = ["--predictions", str(golden / f"detections_{setting}_{split}.json"), "--split-file", str(unseen)]
    options += ["--annotations", str(SHARED / "data/annotations/thumos14.json"), "--json", str(tmp_path / "out.json")]
    command.main([*options, "--protocol", "val+test"])
    metrics = load(tmp_path / "out.json")
    theirs = load(golden / f"ground_truth_{setting}_{split}.json")["database"].values()
    assert metrics["num_videos"] == len(theirs) and metrics["protocol"]["name"] == "val+test"
    assert 0 <= metrics["num_ground_truth"] - sum(len(entry["annotations"]) for entry in theirs) <= 30
    assert not metrics["problems"]


def test_a_run_of_test_videos_is_not_evaluated_on_others(tmp_path):
    with pytest.raises(StaleError, match=r"subset validation alone: set data.test_subset=training\+validation"):
        evaluated(tmp_path / "run", "--protocol", "val+test")
    with pytest.raises(StaleError, match="detections of subset validation alone"):
        command.main(["--run", str(tmp_path / "run"), "--subset", "training+validation"])
    run = evaluated(tmp_path / "both", "--protocol", "val+test", subset="training+validation")
    assert load(run / "metrics.json")["protocol"]["name"] == "val+test"


def test_predictions_from_anywhere(tmp_path, capsys):
    path, database = annotations(tmp_path)
    results = detect(database, LABELS, 0)
    results["v0"].append({"segment": [3, 1], "label": "Ballet", "score": 0.1})
    (tmp_path / "p.json").write_text(json.dumps({"results": results}))
    (tmp_path / "list").write_text("Ballet\r\nCurling")
    base = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(path)]
    command.main([*base, "--split-file", str(tmp_path / "list"), "--json", str(tmp_path / "out.json")])
    metrics = load(tmp_path / "out.json")
    assert set(metrics["per_class"]) == {"Ballet", "Curling"} and set(metrics["baselines"]) == {"random"}
    kinds = {"a segment of negative length", "a label outside the vocabulary"}
    assert {one["kind"] for one in metrics["problems"]} == kinds
    with pytest.raises(StaleError, match=". with a segment of negative length .*; correct it or leave out --strict"):
        command.main([*base, "--strict"])
    printed = capsys.readouterr().out
    assert "external scores none here, the file does not state its own" in printed
    assert "1 of 25 detections with a segment of negative length: v0" in printed


def test_runs_are_aggregated(tmp_path, capsys):
    runs = [str(evaluated(tmp_path / "a" / str(split), split=split)) for split in range(3)]
    other = [str(evaluated(tmp_path / "b" / str(split), split=split, seed=50)) for split in range(3)]
    capsys.readouterr()
    command.main(["--runs", *runs, "--versus", *other, "--json", str(tmp_path / "out.json")])
    content = load(tmp_path / "out.json")
    values = [load(Path(run, "metrics.json"))["average_mAP"] for run in runs]
    cell = content["rows"]["detections"]["average"]
    assert cell["mean"] == pytest.approx(np.mean(values)) and cell["std"] == pytest.approx(np.std(values, ddof=1))
    half = 4.3027 * np.std(values, ddof=1) / np.sqrt(3)
    assert cell["ci95"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert set(content["paired"]) == {"versus", "random", *BASELINES}
    gap = content["paired"]["versus"]["average"]["values"]
    assert gap == pytest.approx(np.subtract(values, content["rows"]["versus"]["average"]["values"]).tolist())
    printed = capsys.readouterr().out
    assert printed.startswith("protocol: activitynet\n  3 runs, splits 0, 1, 2\n") and "detections − row" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.startswith(("0", "1", "2"))] == ["0", "1", "2"]
    assert max(map(len, printed.splitlines())) <= 100 and printed.count("95 % interval") == 1
    command.main(["--runs", *runs, "--versus", *other, "-v"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and printed.count("95 % interval") == 2


def test_runs_that_cannot_be_aggregated(tmp_path):
    first, again, second = (str(evaluated(tmp_path / str(i), split=s)) for i, s in enumerate((0, 0, 1)))
    different = {"setting": "50_50", "tious": [0.5], "checkpoint_chosen_on": "the unseen loss", "features": "other"}
    configure(first)
    configure(again)
    configure(second, "data.split=1", "model.text.weights=another/c.pt", "model.points.levels=5")
    cases = [([first, again, second], "split 0 with seed 0 given more than once: .*0, .*1")]
    cases.append(([first, second], r"/0 and .*/2: protocols differ in model.points.levels \('6' and '5'\)$"))
    cases.append(([str(tmp_path)], "evaluate the run first: python eval.py --run [^ ]*$"))
    cases.append(([str(tmp_path), "--vocabulary", "seen"], "evaluate the run first: .* --vocabulary seen$"))
    cases.append(([first, "--versus", second], "need the same splits"))
    cases.append(([first, first], "run folder given twice"))
    fewer = load(Path(again, "metrics.json"))
    fewer["protocol"]["num_videos"] -= 1
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "metrics.json").write_text(json.dumps(fewer))
    cases.append(([first, "--versus", str(tmp_path / "fewer")], "protocols differ in num_videos"))
    for key, value in different.items():
        other = str(evaluated(tmp_path / key, split=1, **{key: value}))
        cases.append(([first, other], f"protocols differ in {key}"))
    for arguments, message in cases:
        with pytest.raises(StaleError, match=message):
            command.main(["--runs", *arguments])
    configure(again, "train.seed=1", "train.device=cpu")
    configure(second, "data.split=1")
    command.main(["--runs", first, again, second])


def test_runs_share_external_scores_that_lack_other_numbers_of_videos(tmp_path):
    metrics = load(evaluated(tmp_path / "run") / "metrics.json")

    def with_scores(split, source):
        return {**metrics, "protocol": {**metrics["protocol"], "split": split, "external_scores": source}}

    first = with_scores(0, "s.json")
    assert aggregate({"a": first, "b": with_scores(1, "s.json, nothing for 1 of 8 videos")})["splits"] == [0, 1]
    with pytest.raises(StaleError, match="protocols differ in external_scores"):
        aggregate({"a": first, "b": with_scores(1, "other.json")})


def test_statistics():
    assert statistics(np.array([0.5])) == {"mean": 0.5, "std": None, "ci95": None, "values": [0.5]}
    values = np.arange(41.0)
    half = statistics(values)["ci95"][1] - values.mean()
    assert half / values.std(ddof=1) * 41**0.5 == pytest.approx(2.0211, abs=1e-3)


def test_thresholds():
    assert format_tious(facts("activitynet").tious) == "0.50:0.05:0.95" and format_tious([0.5]) == "0.50"
    assert facts("thumos14", [0.1]).tious == (0.1,) and facts("thumos14", None).tious == (0.3, 0.4, 0.5, 0.6, 0.7)
    for wrong in ([], [0.0], [50], [0.5, 0.5]):
        with pytest.raises(StaleError):
            check_tious(wrong)


def test_another_protocol_leaves_the_metrics_of_the_run_alone(tmp_path, capsys):
    run = evaluated(tmp_path / "run")
    before = (run / "metrics.json").read_text()
    other = annotations(tmp_path, seed=9)[0]
    for options in (["--annotations", str(other)], ["--tiou", "0.9"], ["--duplicates", "drop"]):
        command.main(["--run", str(run), *options, "--json", str(tmp_path / "out.json")])
        assert (run / "metrics.json").read_text() == before
        printed = capsys.readouterr()
        assert f"metrics.json is not written: {options[0]}" in printed.err
    assert "duplicates dropped (0)" in printed.out
    (run / "annotations.json").rename(other)  # of a run from another machine
    (run / "metrics.json").unlink()
    command.main(["--run", str(run), "--annotations", str(other)])
    assert (run / "metrics.json").read_text() == before


def test_ground_truth_of_predicted_videos_alone_is_stated(tmp_path, capsys):
    path = RunFolder(make_run(tmp_path / "run")).detections("unseen")
    content = load(path)
    content["results"]["v0"] = []
    path.write_text(json.dumps(content))
    command.main(["--run", str(tmp_path / "run")])
    assert "ground truth" not in capsys.readouterr().out
    command.main(["--run", str(tmp_path / "run"), "--ground-truth", "predicted-videos"])
    assert "\n  ground truth ONLY IN VIDEOS WITH PREDICTIONS (7 of 8)\n" in capsys.readouterr().out
    (tmp_path / "list").write_text("Curling\n")
    annotated = load(source := tmp_path / "run" / "annotations.json")
    annotated["database"]["v1"]["annotations"] = [{"segment": [1, 9], "label": "Ballet"}]  # of no class under test
    source.write_text(json.dumps(annotated))
    options = ["--annotations", str(source), "--split-file", str(tmp_path / "list"), "--strict"]
    command.main(["--predictions", str(path), *options, "--ground-truth", "predicted-videos"])
    assert "ONLY IN VIDEOS WITH PREDICTIONS (6 of 7)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "--predictions p", "--predictions p --vocabulary all", "--run r --versus q", "--run r --split-file l"),
        *("--runs r --tiou 0.5", "--runs r --report d", "--runs r --protocol val+test", "--run r --videos v"),
        *("--run r --allow-unseen-supervision", "--run r --protocol generalized --vocabulary seen"),
        "--predictions p --annotations a --protocol generalized",
    ],
)
def test_options_without_effect_are_refused(arguments):
    with pytest.raises(SystemExit):
        command.main(arguments.split())


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
