"""The demo's own steps; the commands it calls are tested elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo import MARK, clear, table
from stale.errors import StaleError
from tests.conftest import REPOSITORY


def test_replaces_its_own_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    clear(run)
    (run / "old.txt").write_text("old")
    clear(run)
    assert [path.name for path in run.iterdir()] == [MARK]


def test_leaves_a_run_that_no_demo_made(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {}")
    with pytest.raises(StaleError, match="was not made by the demo"):
        clear(tmp_path)
    assert (tmp_path / "config.yaml").is_file()


def test_the_table_sets_the_model_beside_the_untrained_rows() -> None:
    untrained = {"whole_video": {"average_mAP": 0.05}, "snippets": {"average_mAP": 0.1}, "chance": {"average_mAP": 0.0}}
    seen = {"average_mAP": 0.5, "num_classes": 15, "untrained": untrained}
    lines = table(seen, {**seen, "average_mAP": 0.4321, "num_classes": 5}).splitlines()
    assert lines[3].split()[-2:] == ["50.0", "43.2"]
    assert [line.split()[-1] for line in lines[4:6]] == ["5.0", "10.0"]
    assert "Synthetic" in lines[-1]


def test_the_data_script_runs_from_anywhere(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "make_demo_data.py"
    done = subprocess.run([sys.executable, script, "--output", "here"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"annotations.json", "features.h5", "text_tower.pt"}


def test_the_plot_script_says_what_is_wrong(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "plot_video.py"
    for output, problem in (("x.txt", "end the name in .png"), ("x.png", "no run in")):
        command = [sys.executable, script, "--run", tmp_path, "--video", "v", "--output", tmp_path / output]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert problem in done.stderr
