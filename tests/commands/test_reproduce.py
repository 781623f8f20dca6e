"""The paper's tables in one command: the plan, running, resuming, and the report. On tiny data."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import inference
import train
from paper_tables.catalog import choose_rows, load_tables
from paper_tables.plan import Cell, Evaluation, Job, Sources, jobs_of, make_plan, missing_inputs, run_jobs
from paper_tables.report import Line, backbone_of, compare, make_lines, read_published, to_expected, to_markdown
from scripts import reproduce
from stale.config import differing_keys, load_config
from stale.errors import StaleError
from stale.run_folder import RunFolder
from synthetic_data import write_synthetic
from tests.helpers import REPOSITORY, SEEN, UNSEEN, write_folder

SMALL = ("train.epochs=1", "data.splits=null", "model.masking.layers=1", "data.num_snippets=16")
PUBLISHED = REPOSITORY / "configs" / "published.csv"
TABLES = load_tables(REPOSITORY / "configs" / "tables.yaml")
MAIN = {"train.py": train.main, "inference.py": inference.main, "eval.py": evaluation.main}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tables, so that they share their runs."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture
def run(data: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Run ``reproduce.py`` with its commands inside this process, and return the commands."""
    done: list[list[str]] = []

    def in_process(command: Sequence[str], *_: Any) -> int:
        done.append(list(command[1:]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(command[1:]))
            MAIN[Path(command[1]).name]()
        return 0

    def run_table(table: str, *more: str, folder: Path = output, settings: Sequence[str] = ()) -> list[list[str]]:
        done.clear()
        reproduce.main(arguments(table, data, folder, *more, settings=settings))
        return list(done)

    monkeypatch.setattr("paper_tables.plan.run_process", in_process)
    return run_table


def arguments(table: str, data: Path, output: Path, *more: str, settings: Sequence[str] = ()) -> list[str]:
    return [table, "--config", str(data), "--output", str(output), "--splits", "0", *more, "--set", *SMALL, *settings]


def plan(
    table: str, data: Path, output: Path, splits: Sequence[int] = (0,), rows: list[str] | None = None, config: Any = ()
) -> list[Cell]:
    sources = Sources(REPOSITORY, (data,), SMALL)
    settings, chosen = config or TABLES[table].settings, choose_rows(TABLES[table], rows)
    return make_plan(TABLES[table], chosen, settings, splits=splits, output=output, sources=sources)


def lines_of(table: str, cells: list[Cell], dataset: str = "tiny", **changes: str) -> list[Line]:
    return make_lines(TABLES[table], cells, dataset, [{**row, **changes} for row in read_published(PUBLISHED)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "rows", "lines"),
    [
        ("masking", ["--rows", "none", "gt", "q20"], 3),
        ("error_propagation", [], 6),
        ("closed_set", ["--rows", "stale", "effprompt"], 2),
        ("official_code", ["--rows", "stale", "fill_holes", "predicted_videos", "all_held_out", "all"], 5),
        ("directions", ["--rows", "stale", "schedule"], 2),
    ],
)
def test_every_table_runs(
    run: Callable, capsys: pytest.CaptureFixture[str], output: Path, table: str, rows: list[str], lines: int
) -> None:
    # A fold leaves five videos.
    settings = {"official_code": ["data.shrink=0.1", "data.drop_shorter=0.2"], "directions": ["data.holdout=0.5"]}
    more = settings.get(table, [])
    run(table, *rows, settings=more)
    text = (output / f"{table}.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert text.count("ours (1 run)") == lines
    assert ": tiny | 1 runs, splits 0 | tIoU" in text
    assert "epoch" not in text
    paired = {"closed_set": 0, "official_code": 2}.get(table, lines - 1)  # with STALE, where the protocol is the same
    assert text.count("paired with") == paired
    if table in ("masking", "error_propagation"):
        assert "oracle GROUND-TRUTH FOREGROUND MASKS L" in text
    assert not run(table, *rows, settings=more), "finished runs are skipped"


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "config"), [("long", "demo"), ("short", "demo_short")])
def test_the_main_tables_on_both_synthetic_profiles(run: Callable, tmp_path: Path, profile: str, config: str) -> None:
    """Every class in two training videos and one test video; the shipped configuration for an epoch."""
    write_synthetic(tmp_path, training_videos=2, validation_videos=1, profile=profile)
    paths = {"data.annotations": "annotations.json", "data.features": "features.h5"}
    paths["model.text.weights"] = "text_encoder.pt"
    settings = [f"{key}={tmp_path / name}" for key, name in paths.items()]
    for table, lines in (("zero_shot", 5), ("beyond", 5)):
        more = ("--config", str(REPOSITORY / "configs" / f"{config}.yaml"), "--settings", "75_25")
        run(table, *more, folder=tmp_path, settings=["data.holdout=0", *settings])
        text = (tmp_path / f"{table}.md").read_text(encoding="utf-8")
        assert text.count("ours (1 run)") == lines
        assert not re.search(r"\bnan\b", text)
    assert text.count("| paired with STALE |") == 1 and "vocabulary seen" in text


@pytest.mark.slow
def test_rows_that_differ_in_detection_alone_share_their_training(run: Callable, tmp_path: Path) -> None:
    rows = ("stale", "max_detections", "calibrated")
    run("directions", "--rows", *rows, folder=tmp_path, settings=["data.holdout=0.5"])
    runs = sorted(tmp_path.glob("runs/*/seen_cv_0"), key=lambda path: (path / "config.yaml").stat().st_mtime)
    first, *others = (load_config([path / "config.yaml"]) for path in runs)
    assert first.detection.classify_by == "calibrated", "its checkpoint serves all rows"
    changed = sorted(key for other in others for key in differing_keys(other, first))
    assert changed == ["detection.classify_by", "detection.classify_by", "detection.max_detections"]
    for path in runs[1:]:
        assert (path / "checkpoints/best.pt").read_bytes() == (runs[0] / "checkpoints/best.pt").read_bytes()
        assert (path / "log.txt").read_text(encoding="utf-8").count("epoch 1/") == 1, "trained once"
        assert (path / "metrics.json").exists()


def test_a_run_is_planned_to_be_tested_on_another_data_set(data: Path, tmp_path: Path) -> None:
    (job,) = jobs_of(plan("cross_dataset", data, tmp_path, rows=["stale_on_thumos14"]))
    _, inference, evaluation = job.commands(REPOSITORY)
    assert inference[-2] == "--test-config" and inference[-1].endswith("configs/thumos14.yaml")
    assert evaluation[2].endswith("detections_thumos14.json")
    assert evaluation[evaluation.index("--annotations") + 1] == "data/thumos14/thumos14.json"
    assert evaluation[-1].endswith("metrics_on_thumos14.json")
    there = Path("data/thumos14/thumos14.json").exists()
    assert ("thumos14: data.annotations" in missing_inputs([job], REPOSITORY)[0]) != there


def test_the_plan_has_ten_splits_and_rows_of_the_same_training_share_their_run(data: Path, tmp_path: Path) -> None:
    assert len(jobs_of(plan("zero_shot", data, tmp_path, range(10), ["stale"]))) == 2 * 10
    assert len(jobs_of(plan("closed_set", data, tmp_path, range(10), ["stale"]))) == 1
    folds = jobs_of(plan("directions", data, tmp_path, range(10), ["stale"]))
    assert [job.config.data.fold for job in folds] == [0, 1, 2]
    assert len({job.folder for job in folds}) == 3
    rows = ["plus", "plus_snippets", "plus_confidence", "plus_voting"]
    plus = jobs_of(plan("directions", data, tmp_path, rows=rows))
    assert [job.twin for job in plus] == [None, plus[0], None, plus[0]], "the calibration depends on the confidence"
    jobs = jobs_of(plan("error_propagation", data, tmp_path))
    assert len(jobs) == 2
    assert jobs[0].tests == [Evaluation(("proposals",)), Evaluation()]
    both = {job.folder for name in ("zero_shot", "error_propagation") for job in jobs_of(plan(name, data, tmp_path))}
    assert len(both) == 10, "runs are shared between tables"


def test_rows_fit_every_configuration_and_differ(tmp_path: Path) -> None:
    for config in ("activitynet", "thumos14_captions"):
        sources = Sources(REPOSITORY, (REPOSITORY / "configs" / f"{config}.yaml",))
        for name, table in TABLES.items():
            cells = make_plan(table, table.rows, table.settings, splits=(0,), output=tmp_path, sources=sources)
            assert len({(cell.jobs[0].folder, cell.test, cell.row.trivial) for cell in cells}) == len(cells), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["directions", "--splits", "5"], "directions has no run of these rows, settings and splits"),
        (["zero_shot", "--rows", "b3"], "zero_shot has no row b3; its rows: b2, b1, effprompt, stale"),
        (["zero_shot", "--settings", "75_25", "closed"], "has only the settings 75_25, 50_50"),
        (["zero_shot", "--check"], "nothing to check against.*--record"),
    ],
)
def test_impossible_requests_are_refused_at_once(run: Callable, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(StaleError, match=message):
        run(*more, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_inputs_are_named_before_anything_starts(run: Callable, data: Path, tmp_path: Path) -> None:
    more = ["data.features=[nowhere.h5, neither.h5]", "model.text.weights=text.pt", "model.visual_projection=true"]
    with pytest.raises(
        StaleError, match="nowhere.h5 does not exist.*neither.h5.*model.text.weights: text.pt does not exist"
    ):
        run("zero_shot", "--rows", "stale", folder=tmp_path, settings=more)
    assert not (tmp_path / "runs").exists()
    config = load_config([data], [*SMALL, "model.text.weights=ViT-B/16"])
    found = missing_inputs([Job(tmp_path, config, (), ())], REPOSITORY)
    assert found == [], "the weights of a named model are downloaded"


def test_a_run_of_another_configuration_is_unfinished(run: Callable, data: Path, output: Path) -> None:
    run("masking", "--rows", "none")
    (job,) = jobs_of(plan("masking", data, output, rows=["none"]))
    config = job.folder / "config.yaml"
    written = config.read_text()
    for text, unfinished in ((written.replace("seed: 0", "seed: 1"), 1), ("train: {sede: 1}", 1), (written, 0)):
        config.write_text(text)
        assert job.unfinished() == [Evaluation()] * unfinished
        assert len(job.commands(REPOSITORY)) == 3 * unfinished, "it trains again, which train.py refuses"


def test_a_finished_training_is_not_begun_again(run: Callable, data: Path, tmp_path: Path) -> None:
    run("masking", "--rows", "none", folder=tmp_path)
    (job,) = jobs_of(plan("masking", data, tmp_path, rows=["none"]))
    for name in ("metrics.json", "checkpoints/last.pt"):
        (job.folder / name).unlink()
    commands = run("masking", "--rows", "none", folder=tmp_path)
    assert [Path(command[0]).name for command in commands] == ["inference.py", "eval.py"]


def test_listed_lines_are_the_commands_that_run(
    run: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = arguments("masking", data, tmp_path, "--rows", "none", "gt", "--list")
    reproduce.main(more)
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(command)[1:] for line in lines for command in line.split(" && ")]
    assert run("masking", "--rows", "none", folder=tmp_path) == commands[:3]
    capsys.readouterr()
    reproduce.main(more)
    assert capsys.readouterr().out.splitlines() == lines[1:], "a finished run is no longer listed"


@pytest.mark.slow
def test_a_killed_table_resumes(run: Callable, data: Path, tmp_path: Path) -> None:
    more = arguments("masking", data, tmp_path, "--rows", "conv1d")
    (job,) = jobs_of(plan("masking", data, tmp_path, rows=["conv1d"]))
    command = [sys.executable, str(REPOSITORY / "scripts" / "reproduce.py"), *more]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # also where the package is not installed
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True, env=environment)
    while not (job.folder / "checkpoints/last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the command and its children at once
    process.wait()
    with (job.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the children have ended
    run("masking", "--rows", "conv1d", folder=tmp_path)
    assert not job.unfinished()
    records = [json.loads(line) for line in RunFolder(job.folder).history.read_text().splitlines()]
    assert [record["step"] for record in records if "step" in record] == [1, 2]


def test_a_failed_run_does_not_stop_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(command: Sequence[str], device: str, files: tuple[Any, Any], *_: Any) -> int:
        files[0].write(b"error: no such thing\n")
        return 2 if "model.masking.kind=none" in command else 0

    monkeypatch.setattr("paper_tables.plan.run_process", half)
    with pytest.raises(SystemExit, match="^1$"):
        reproduce.main(arguments("masking", data, tmp_path, "--rows", "none", "conv1d"))
    printed = capsys.readouterr()
    assert "train.py failed (2): error: no such thing" in printed.err
    assert "no run is finished" in printed.out


def test_a_run_that_another_process_works_on_is_left_to_it(data: Path, tmp_path: Path) -> None:
    (job,) = jobs_of(plan("masking", data, tmp_path, rows=["conv1d"]))
    job.folder.mkdir(parents=True)
    with (job.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failures = run_jobs([job], REPOSITORY)
    assert failures == {job.name: f"another process is working in {job.folder}"}


def test_each_device_runs_one_job_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working, used = {"0": Lock(), "1": Lock()}, set()

    def pretend(command: Sequence[str], device: str, *_: Any) -> int:
        assert working[device].acquire(blocking=False)
        time.sleep(0.05)
        working[device].release()
        used.add(device)
        return 0

    monkeypatch.setattr("paper_tables.plan.run_process", pretend)
    assert run_jobs(jobs_of(plan("masking", data, tmp_path)), REPOSITORY, ["0", "1"]) == {}
    assert used == {"0", "1"}


def test_published_results_have_a_row_each() -> None:
    rows = [row for row in read_published(PUBLISHED) if row["table"] != "comparison"]  # with other methods
    assert len(rows) == 35
    assert all(row["source"].startswith(("poster", "computed", "TF-CADE")) for row in rows)
    assert {row["external_scores"] for row in rows} == {"yes", "no", "unknown"}
    for table in ("zero_shot", "masking", "text_encoder", "error_propagation"):
        wanted = {(row["method"], row["variant"]) for row in rows if row["table"] == table}
        rows_of_table = {(row.method, row.variant) for row in TABLES[table].rows}
        assert rows_of_table - wanted == ({("agnostic", "")} if table == "zero_shot" else set()), table
        assert wanted <= rows_of_table, table


def test_published_results_are_compared_where_the_features_are_the_same(
    run: Callable, data: Path, output: Path
) -> None:
    run("masking", "--rows", "none")
    cells = plan("masking", data, output, rows=["none"])
    (line,) = lines_of("masking", cells, "activitynet", features="")
    assert line.published == {"0.50": pytest.approx(0.217), "average": pytest.approx(0.109)}
    assert line.difference("average") == pytest.approx(line.ours["average"]["mean"] - 0.109)
    assert line.difference("0.75") is None
    text = to_markdown(TABLES["masking"], [line], "activitynet")
    assert "| **no mask** | published (poster; external scores: unknown) | 21.7 | – | – | 10.9 |" in text
    assert "| difference |" in text
    assert "|  | mAP, % | 0.10 | 0.20 | average |" in to_markdown(TABLES["masking"], [line], "mine", [0.1, 0.2])
    for changes, reason in (
        ({}, "it used ViT-B/16 features, ours are unknown"),
        ({"features": "", "external_scores": "yes"}, "ours did not use external scores"),
    ):
        (other,) = lines_of("masking", cells, "activitynet", **changes)
        assert other.difference("average") is None
        text = to_markdown(TABLES["masking"], [other], "activitynet")
        assert f"not comparable: {reason}" in text and "| difference |" not in text


def test_the_backbone_is_recorded_in_the_features_or_that_of_the_text_weights(tmp_path: Path) -> None:
    def backbone(folder: str, *settings: str) -> str:
        paths = f"data.features={tmp_path / folder}"
        return backbone_of(load_config([], [paths, "model.text.weights=ViT-B/16", *settings]))

    for name, recorded in (("plain", {}), ("large", {"backbone": "L"})):
        write_folder(tmp_path / name, {"v": np.ones((2, 4), np.float32)}, **recorded)
    assert backbone("large") == "L"
    assert backbone("plain") == backbone("absent") == "ViT-B/16"
    assert backbone("plain", "model.visual_projection=true") == "", "features of any kind are projected"
    assert backbone("plain", "model.text.weights=text.pt") == ""


def test_external_scores_stand_beside_the_trivial_row(
    run: Callable, data: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StaleError, match="video scores: not set; give the file by --video-scores"):
        run("external_scores", "--settings", "75_25")
    content = json.loads((data.parent / "annotations.json").read_text())["database"]
    labels = [*SEEN, *UNSEEN]
    scores = {
        name: [float(label == entry["annotations"][0]["label"]) for label in labels]
        for name, entry in content.items()
        if name != "video_030"
    }
    (tmp_path / "labels.json").write_text(json.dumps({"class": labels, "results": scores}))
    run("external_scores", "--settings", "75_25", "--video-scores", str(tmp_path / "labels.json"))
    text = capsys.readouterr().out
    assert text.count("ours (1 run)") == 5 and text.count("| paired with label file on the whole video") == 2
    assert "WITH EXTERNAL SCORES" in text and "external scores labels.json with --allow-unseen-supervision" in text
    sources = Sources(REPOSITORY, (data,), SMALL, video_scores=str(tmp_path / "labels.json"))
    table = TABLES["external_scores"]
    rows = choose_rows(table, ["stale", "stale_external", "trivial"])
    cells = make_plan(table, rows, ["75_25"], splits=[0], output=output, sources=sources)
    own, external, trivial = make_lines(table, cells, "activitynet", read_published(PUBLISHED))
    (job,) = jobs_of(cells)
    metrics = json.loads(next(job.folder.glob("metrics_external_labels_????????.json")).read_text())
    found, alone = (line.ours["average"]["mean"] for line in (external, trivial))
    assert found == metrics["average_mAP"]
    assert alone == metrics["trivial"]["external_label_whole_video"]["average_mAP"]
    assert external.paired["average"]["mean"] == pytest.approx(found - alone)
    assert [line.published["average"] for line in (own, external, trivial)] == pytest.approx([0.095, 0.249, 0.19])
    assert own.obstacle and external.obstacle and not trivial.obstacle, "only the trivial row needs no features"


def test_a_row_on_other_features_says_what_to_set(run: Callable, data: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleError, match="data.features: not set;.*--i3d-features"):
        run("backbone", "--rows", "i3d", folder=tmp_path)
    sources = Sources(REPOSITORY, (data,), (*SMALL, "data.features=clip.h5"), i3d_features="i3d.h5")
    table = TABLES["backbone"]
    cells = make_plan(table, table.rows, ["75_25"], splits=[0], output=tmp_path, sources=sources)
    assert [cell.jobs[0].config.data.features for cell in cells] == ["clip.h5", ["i3d.h5"]]
    assert cells[1].jobs[0].config.model.visual_projection


def test_a_finished_table_is_kept(run: Callable, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("masking", "--rows", "none")
    before = (output / "masking.md").read_text()
    assert Image.open(output / "masking.75_25.png").size == (900, 170)
    run("masking", "--rows", "none", "--report", settings=["train.seed=7"])
    assert (output / "masking.md").read_text() == before
    assert "masking.md is not written: no run is finished" in capsys.readouterr().out


def test_recorded_results_are_checked(
    run: Callable, data: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tmp_path / "expected.json"
    more = ("--rows", "none", "gt", "--expected", str(expected))
    run("masking", "--record", *more)
    content = json.loads(expected.read_text())
    assert set(content["rows"]) == {"75_25/none", "75_25/gt"}
    assert {"average_mAP", "tolerance", "seed", "commit", "machine", "splits"} <= set(content["rows"]["75_25/gt"])
    assert "--record" in content["rows"]["75_25/gt"]["command"]
    assert run("masking", "--check", *more) == []
    assert "2 of 2 rows within tolerance" in capsys.readouterr().out

    content["rows"]["75_25/none"]["average_mAP"] += 0.02
    expected.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="^1$"):
        run("masking", "--check", *more)
    assert "out of tolerance: 75/25 none" in capsys.readouterr().err

    content["rows"]["75_25/none"]["splits"] = [0, 1]
    expected.write_text(json.dumps(content))
    with pytest.raises(StaleError, match=r"75_25/none is recorded with splits \[1\] too"):
        run("masking", "--record", *more)
    two = lines_of("masking", plan("masking", data, output, (0, 1), ["none"]))
    assert to_expected(two) == {}, "incomplete rows are not recorded"
    assert "ours (1 of 2 runs)" in to_markdown(TABLES["masking"], two, "tiny")
    known = {"75_25/none": {"average_mAP": 0.5, "tolerance": 1.0, "splits": [0, 1]}}
    assert compare(two, known) == ["75/25 none: splits [0] are finished, [0, 1] are expected"]
    (one,) = lines_of("masking", plan("masking", data, output, (0,), ["none"]))
    for near, faults in ((one.ours["average"]["mean"] + 0.005, 0), (0.9, 1)):
        known["75_25/none"] |= {"tolerance": 0.01, "values": [near, 0.9]}
        assert len(compare([one], known)) == faults


def test_the_expected_results_of_the_repository_are_sound() -> None:
    for path in (REPOSITORY / "configs" / "expected").glob("*.json"):
        table, content = path.name.split(".")[0], json.loads(path.read_text())
        known = {f"{setting}/{row.key}" for setting in TABLES[table].settings for row in TABLES[table].rows}
        assert set(content["rows"]) <= known
        for row in content["rows"].values():
            assert 0 <= row["average_mAP"] <= 1
            assert {"tolerance", "splits", "values", "seed", "commit", "machine", "command"} <= set(row)
