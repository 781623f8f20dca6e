"""The paper's tables in one command: the plan, running and going on, and what is printed. On tiny data."""

from __future__ import annotations

import csv
import fcntl
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from tiny import make_data_set

from stale.config import load_config
from stale.errors import StaleError
from stale.reproduce.catalog import TABLES, choose_rows
from stale.reproduce.plan import Job, Sources, Test, jobs_of, make_plan, missing_inputs, shell_line
from stale.reproduce.runner import Runner
from stale.reproduce.tables import compare, make_lines, read_published, to_expected, to_markdown
from stale.run import RunFolder

SMALL = ("train.epochs=1", "data.splits=null", "model.masking.layers=1", "data.num_snippets=16")
PUBLISHED = REPOSITORY / "configs" / "published.csv"
Commands = list[list[str]]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reproduce = load(REPOSITORY / "scripts" / "reproduce.py")
SCRIPTS = {name: load(REPOSITORY / name) for name in ("train.py", "inference.py", "eval.py")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny data set."""
    return make_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tables, so that they share their runs."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Run the commands inside this process, which is faster, and keep what was run."""
    done: Commands = []

    def in_process(self: Runner, command: Sequence[str], *_: Any) -> int:
        done.append(list(command[1:]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(command[1:]))
            SCRIPTS[Path(command[1]).name].main()
        return 0

    monkeypatch.setattr(Runner, "_run_command", in_process)
    return done


def arguments(table: str, data: Path, output: Path, *more: str) -> list[str]:
    return [table, "--config", str(data), "--output", str(output), "--splits", "0", *more, "--set", *SMALL]


def plan(table: str, data: Path, output: Path, splits: Sequence[int] = (0,), rows: list[str] | None = None) -> list:
    chosen = choose_rows(TABLES[table], rows)
    sources = Sources(REPOSITORY, (data,), SMALL)
    return make_plan(TABLES[table], chosen, TABLES[table].settings, splits, output, sources)


# The tables


@pytest.mark.parametrize(
    ("table", "rows", "lines"),
    [
        ("zero_shot", [], 8),
        ("masking", [], 6),
        ("text_encoder", [], 3),
        ("error_propagation", [], 4),
        ("closed_set", ["--rows", "stale", "b1"], 2),
        ("official_code", ["--rows", "stale", "fill_holes", "predicted_videos", "all_held_out", "all"], 5),
        ("beyond", ["--settings", "75_25"], 4),
        ("directions", ["--rows", "stale", "regions"], 2),
    ],
)
def test_every_table_runs(
    commands: Commands,
    capsys: pytest.CaptureFixture[str],
    data: Path,
    output: Path,
    table: str,
    rows: list[str],
    lines: int,
) -> None:
    more = {
        "official_code": ["data.shrink=0.1", "data.drop_shorter=0.2"],
        "directions": ["data.holdout=0.5"],  # five videos are left of a fold
    }.get(table, [])
    reproduce.main([*arguments(table, data, output, *rows), *more])
    printed = capsys.readouterr().out
    text = (output / f"{table}.md").read_text(encoding="utf-8")
    assert text in printed
    assert text.count("ours (1 run)") == lines
    assert ": tiny | 1 runs, splits 0 | tIoU" in text
    assert "epoch" not in text
    figures = list(csv.DictReader(io.StringIO((output / f"{table}.csv").read_text(encoding="utf-8"))))
    assert len(figures) == 4 * lines
    assert all(0 <= float(row["ours"]) <= 100 and row["protocol"] for row in figures)
    assert (output / f"{table}.png").stat().st_size > 5000
    if table in ("masking", "error_propagation"):
        assert "oracle GROUND-TRUTH MASKS" in text
        assert "an oracle, no result" in text
    if table == "official_code":
        assert "LOSS ON THE UNSEEN TEST CLASSES" in text
        assert "ONLY IN VIDEOS WITH PREDICTIONS" in text
    if table in ("zero_shot", "closed_set"):
        assert "in place of BMN" in text
    if table == "beyond":
        assert text.count("| paired with STALE |") == 1
        assert text.count("| paired with STALE, seen classes |") == 1
        assert "untrained: snippets alike to a class name, splits 0: average mAP" in text
        assert re.search(r"above it: STALE [+-][0-9.]+, STALE plus [+-][0-9.]+", text)
        assert "vocabulary seen" in text
    if table == "directions":
        assert "3 folds of the seen classes of split 0" in text

    commands.clear()
    reproduce.main([*arguments(table, data, output, *rows), *more])
    assert not commands, "what is finished is skipped"


def test_rows_that_train_the_same_share_their_run(data: Path, tmp_path: Path) -> None:
    cells = plan("error_propagation", data, tmp_path)
    assert len(cells) == 4
    assert len(jobs_of(cells)) == 2
    shared = {job.folder for name in ("zero_shot", "error_propagation") for job in jobs_of(plan(name, data, tmp_path))}
    assert len(shared) == 8, "and over tables"
    assert jobs_of(cells)[0].tests == [Test("proposals"), Test()]


def test_every_row_is_another_training_or_test(data: Path, tmp_path: Path) -> None:
    for name, table in TABLES.items():
        cells = make_plan(table, table.rows, table.settings, (0,), tmp_path, Sources(REPOSITORY, (data,)))
        assert len({(cell.jobs[0].folder, cell.test) for cell in cells}) == len(cells), name


def test_rows_fit_every_configuration(tmp_path: Path) -> None:
    for config in ("activitynet", "thumos14_captions"):
        for table in TABLES.values():
            sources = Sources(REPOSITORY, (REPOSITORY / "configs" / f"{config}.yaml",))
            make_plan(table, table.rows, table.settings, (0,), tmp_path, sources)


def test_the_plan_is_ten_splits_of_both_settings(data: Path, tmp_path: Path) -> None:
    jobs = jobs_of(plan("zero_shot", data, tmp_path, range(10)))
    assert len(jobs) == 4 * 2 * 10
    assert len(jobs_of(plan("closed_set", data, tmp_path, range(10)))) == 4, "there is nothing to split"


def test_unknown_rows_are_named() -> None:
    with pytest.raises(StaleError, match="zero_shot has no row b3; its rows: b2, b1, effprompt, stale"):
        choose_rows(TABLES["zero_shot"], ["b3"])


# What is missing


def test_what_is_missing_is_said_before_anything_starts(
    commands: Commands, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["data.features=[nowhere.h5, neither.h5]", "model.text.weights=tower.pt", "model.visual_projection=true"]
    with pytest.raises(StaleError, match="features: nowhere.h5 is not there; .*neither.h5.*text weights: tower.pt is"):
        reproduce.main([*arguments("zero_shot", data, tmp_path, "--rows", "stale"), *more])
    assert not commands
    assert not tmp_path.joinpath("runs").exists()


def test_a_models_name_is_no_missing_file(data: Path, tmp_path: Path) -> None:
    config = load_config([data], [*SMALL, "model.text.weights=ViT-B/16"])
    assert missing_inputs([Job(tmp_path, config, (), ())]) == []


# Finished, changed, broken off


def test_a_run_of_another_configuration_is_not_finished(
    commands: Commands, data: Path, output: Path, tmp_path: Path
) -> None:
    reproduce.main(arguments("masking", data, output, "--rows", "none"))
    (job,) = jobs_of(plan("masking", data, output, rows=["none"]))
    assert not job.unfinished()
    copied = Job(tmp_path / "run", job.config, job.files, job.settings, job.tests)
    shutil.copytree(job.folder, copied.folder)
    assert not copied.unfinished()
    (copied.folder / "config.yaml").write_text((job.folder / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert copied.unfinished() == [Test()]
    (copied.folder / "config.yaml").write_text("train: {sede: 1}")
    assert copied.unfinished() == [Test()]


def test_a_listed_line_does_the_whole_job(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = arguments("masking", data, tmp_path, "--rows", "none", "gt", "--list")
    reproduce.main(more)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].count(" && ") == 2
    line = lines[0].replace("python ", f"{shlex.quote(sys.executable)} ")
    subprocess.run(line, shell=True, check=True, capture_output=True, timeout=120)
    reproduce.main(more)
    assert capsys.readouterr().out.splitlines() == lines[1:], "what is done is no longer listed"


@pytest.mark.parametrize("wait_for", ["config.yaml", "checkpoints/last.pt", "detections.json"])
def test_a_killed_table_goes_on(data: Path, tmp_path: Path, wait_for: str, commands: Commands) -> None:
    more = arguments("masking", data, tmp_path, "--rows", "conv1d")
    (job,) = jobs_of(plan("masking", data, tmp_path, rows=["conv1d"]))
    command = [sys.executable, str(REPOSITORY / "scripts" / "reproduce.py"), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 60
    while not (job.folder / wait_for).exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the command and its children at once
    process.wait()
    reproduce.main(more)
    assert not job.unfinished()
    records = [json.loads(line) for line in RunFolder(job.folder).history.read_text().splitlines()]
    assert [record["step"] for record in records if "step" in record] == [1, 2]


def test_a_folder_at_work_is_left_alone(data: Path, tmp_path: Path) -> None:
    """A command that outlived its killed parent holds the lock."""
    (job,) = jobs_of(plan("masking", data, tmp_path, rows=["conv1d"]))
    job.folder.mkdir(parents=True)
    with (job.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        failures = Runner(REPOSITORY).run([job])
    assert "another process is at work" in failures[job.name]


def test_a_failed_run_does_not_stop_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(self: Runner, command: Sequence[str], device: str, log: Any, lock: Any) -> int:
        log.write(b"error: no such thing\n")
        return 2 if "model.masking.kind=none" in command else 0

    monkeypatch.setattr(Runner, "_run_command", half)
    monkeypatch.setattr("stale.reproduce.runner._figure", lambda job: "fine")
    with pytest.raises(SystemExit) as stop:
        reproduce.main(arguments("masking", data, tmp_path, "--rows", "none", "conv1d"))
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "train.py failed (2): error: no such thing" in printed.err
    assert "nothing is done yet" in printed.out


def test_devices_work_side_by_side(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job keeps to one device, and as many are at work as there are devices."""
    seen: dict[str, set[str]] = {}
    working: list[int] = [0]

    def pretend(self: Runner, command: Sequence[str], device: str, *_: Any) -> int:
        run = command[-2] if "--output" in command else command[command.index("--run") + 1]
        seen.setdefault(run, set()).add(device)
        working.append(working[-1] + 1)
        time.sleep(0.05)
        working.append(working[-1] - 1)
        return 0

    monkeypatch.setattr(Runner, "_run_command", pretend)
    monkeypatch.setattr("stale.reproduce.runner._figure", lambda job: "fine")
    jobs = jobs_of(plan("masking", data, tmp_path))
    assert Runner(REPOSITORY, ["0", "1"]).run(jobs) == {}
    assert len(seen) == len(jobs)
    assert all(len(devices) == 1 for devices in seen.values())
    assert set().union(*seen.values()) == {"0", "1"}
    assert max(working) == 2


def test_a_device_is_what_a_command_sees(tmp_path: Path) -> None:
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    for device, visible in (("3", "3"), ("cpu", "")):
        with (tmp_path / "log").open("wb") as log, (tmp_path / "lock").open("w") as lock:
            assert Runner(tmp_path)._run_command([sys.executable, "-c", code], device, log, lock) == 0
        assert (tmp_path / "log").read_text() == f"{visible}\n"


# Published and expected figures


def test_published_figures_are_of_the_poster_or_computed() -> None:
    rows = read_published(PUBLISHED)
    assert len(rows) == 33
    assert {row["source"].split()[0] for row in rows} <= {"poster", "computed", "split", "mean"}
    assert all(row["source"].startswith(("poster", "computed")) for row in rows)
    for table in ("zero_shot", "masking", "text_encoder", "error_propagation"):
        wanted = {(row["method"], row["variant"]) for row in rows if row["table"] == table}
        assert wanted == {(row.method, row.variant) for row in TABLES[table].rows}, table


def test_published_figures_stand_beside_ours(data: Path, output: Path, commands: Commands) -> None:
    reproduce.main(arguments("masking", data, output, "--rows", "none"))
    cells = plan("masking", data, output, rows=["none"])
    (line,) = make_lines(TABLES["masking"], cells, "activitynet", read_published(PUBLISHED))
    assert line.published == {"0.50": pytest.approx(0.217), "average": pytest.approx(0.109)}
    assert line.difference("average") == pytest.approx(line.ours["average"]["mean"] - 0.109)
    assert line.difference("0.75") is None
    text = to_markdown(TABLES["masking"], [line], "activitynet")
    assert "| **no mask** | published (poster) | 21.7 | – | – | 10.9 |" in text
    assert "| difference |" in text

    (other,) = make_lines(TABLES["masking"], cells, "activitynet", read_published(PUBLISHED), comparable=False)
    assert other.difference("average") is None
    text = to_markdown(TABLES["masking"], [other], "activitynet")
    assert "CLIP features, not comparable" in text
    assert "| difference |" not in text


def test_a_row_is_paired_with_its_baseline_over_the_splits_that_both_have(
    data: Path, output: Path, commands: Commands
) -> None:
    reproduce.main(arguments("beyond", data, output, "--settings", "75_25", "--rows", "stale", "plus"))
    table, rows = TABLES["beyond"], ["stale", "plus"]
    cells = make_plan(table, choose_rows(table, rows), ["75_25"], (0, 1), output, Sources(REPOSITORY, (data,), SMALL))
    stale, plus = make_lines(table, cells, "tiny", [])
    assert plus.baseline == "STALE"
    assert plus.paired["average"]["mean"] == pytest.approx(plus.ours["average"]["mean"] - stale.ours["average"]["mean"])
    assert plus.paired["average"]["values"] == [plus.paired["average"]["mean"]]  # split 1 is not there yet
    assert not stale.paired


def test_the_folds_of_the_seen_classes_are_runs_of_their_own(data: Path, output: Path) -> None:
    jobs = jobs_of(plan("directions", data, output, splits=range(10), rows=["stale"]))
    assert [job.config.data.fold for job in jobs] == [0, 1, 2]
    assert {(job.config.data.setting, job.config.data.split) for job in jobs} == {("seen_cv", 0)}
    assert len({job.folder for job in jobs}) == 3


def test_recorded_figures_are_checked(
    data: Path, output: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tmp_path / "expected.json"
    more = arguments("masking", data, output, "--rows", "none", "gt", "--expected", str(expected))
    with pytest.raises(StaleError, match="nothing to check against.*--record"):
        reproduce.main([*more[:-5], "--check", *more[-5:]])
    reproduce.main([*more[:-5], "--record", *more[-5:]])
    rows = json.loads(expected.read_text())["rows"]
    assert set(rows) == {"75_25/none", "75_25/gt"}
    assert {"average_mAP", "tolerance", "seed", "commit", "machine", "command", "splits"} <= set(rows["75_25/gt"])
    reproduce.main([*more[:-5], "--check", *more[-5:]])
    assert "2 of 2 rows within tolerance" in capsys.readouterr().out

    rows["75_25/none"]["average_mAP"] += 0.02
    expected.write_text(json.dumps({"rows": rows}))
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*more[:-5], "--check", "--report", *more[-5:]])
    assert stop.value.code == 1
    assert "out of tolerance: 75/25 none" in capsys.readouterr().err


def test_only_complete_rows_are_recorded_and_other_splits_do_not_pass(
    data: Path, output: Path, commands: Commands
) -> None:
    reproduce.main(arguments("masking", data, output, "--rows", "none"))
    two = plan("masking", data, output, splits=(0, 1), rows=["none"])
    lines = make_lines(TABLES["masking"], two, "tiny", [])
    assert lines[0].splits == (0,)
    assert to_expected(lines) == {}
    assert "ours (1 of 2 runs)" in to_markdown(TABLES["masking"], lines, "tiny")
    known = {"75_25/none": {"average_mAP": 0.5, "tolerance": 1.0, "splits": [0, 1]}}
    assert compare(lines, known) == ["75/25 none: splits [0] are done, [0, 1] are expected"]


def test_the_expected_figures_of_the_repository_are_sound() -> None:
    for path in (REPOSITORY / "configs" / "expected").glob("*.json"):
        table = path.name.split(".")[0]
        known = {f"{setting}/{row.key}" for setting in TABLES[table].settings for row in TABLES[table].rows}
        for name, row in json.loads(path.read_text())["rows"].items():
            assert name in known
            assert 0 <= row["average_mAP"] <= 1
            assert {"tolerance", "splits", "seed", "commit", "machine", "command"} <= set(row)


def test_a_shell_line_quotes_what_must_be() -> None:
    assert shell_line([["a.py", "x=[1, 2]"], ["b.py"]]) == "python a.py 'x=[1, 2]' && python b.py"
