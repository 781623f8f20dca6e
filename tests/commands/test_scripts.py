"""Every command answers --help at once; the benchmarks run at a tiny size; the demo's own steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench, plot_video
from scripts.demo import MARK, clear
from stale.errors import StaleError
from tests.helpers import REPOSITORY, make_clip

COMMANDS = ["train.py", "inference.py", "eval.py", *(f"scripts/{x.name}" for x in REPOSITORY.glob("scripts/*.py"))]
# Prints of each command that is wrong about its help: heavy imports, options without a text, another end.
CHECK_HELP = """
import contextlib, io, runpy, sys
from stale.commands import CommandParser
parsers, start = [], CommandParser.__init__
CommandParser.__init__ = lambda self, **options: (start(self, **options), parsers.append(self))[0]
for command in sys.argv[1:]:
    sys.argv, said, code = [command, "--help"], io.StringIO(), None
    parsers.clear()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(command, run_name="__main__")
        except SystemExit as end:
            code = end.code
    heavy = {"torch", "pandas", "h5py", "matplotlib"} & set(sys.modules)
    silent = [action.dest for parser in parsers for action in parser._actions if not action.help]
    if heavy or silent or code or "exit codes: 0 done" not in said.getvalue():
        print(command, code, heavy, silent)
"""


def test_help_is_complete_and_quick() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # also where the package is not installed
    line = [sys.executable, "-c", CHECK_HELP, *COMMANDS]
    result = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "names", ["eval data", pytest.param("step parts growth inference pipeline", marks=pytest.mark.slow)]
)
def test_benchmarks_write_and_print_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str) -> None:
    bench.main([*names.split(), "--scale", "0.01", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    written, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert list(dict.fromkeys(row["name"].split(":")[0] for row in written)) == names.split()
    assert all(row["seconds"] > 0 and row["name"] in printed and row["size"] in printed for row in written)


def test_the_quickstart_notebook_runs(
    clip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    cells = json.loads((REPOSITORY / "scripts/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "clear all outputs"
    shutil.copytree(clip_run, tmp_path / "runs/demo")
    make_clip(tmp_path / "clip.mkv").rename(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), names)  # as a kernel does, in one namespace
    assert len(names["found"].class_scores) == 2, "those of the last cell's words"
    assert "detections" in capsys.readouterr().out
    assert (tmp_path / "runs/demo/metrics.json").is_file()


def test_the_demo_replaces_only_its_own_run(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    clear(run)
    (run / "old.txt").write_text("old")
    clear(run)
    assert [path.name for path in run.iterdir()] == [MARK]
    (tmp_path / "config.yaml").write_text("train: {}")
    with pytest.raises(StaleError, match="was not made by the demo"):
        clear(tmp_path)
    assert (tmp_path / "config.yaml").is_file()


def test_any_annotated_video_is_drawn(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "picture.png"
    plot_video.main(["--run", str(clip_run), "--video", "video_000", "--output", str(output)])
    assert capsys.readouterr().out == f"{output}\n" and output.stat().st_size > 5000
    with pytest.raises(StaleError, match="video 'video_00' is not in .*annotations.json"):
        plot_video.main(["--run", str(clip_run), "--video", "video_00", "--output", str(output)])
