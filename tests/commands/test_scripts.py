"""Every command answers --help at once; the benchmarks run at a tiny size; the demo's own steps."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench, plot_video
from scripts.demo import MARK, clear
from stale.commands import CommandParser
from stale.errors import StaleError
from tests.helpers import REPOSITORY, make_clip

COMMANDS = [
    "train.py",
    "inference.py",
    "eval.py",
    *(f"scripts/{x.name}" for x in (REPOSITORY / "scripts").glob("*.py")),
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # also where the package is not installed


def run_python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_imports_nothing_heavy(command: str) -> None:
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print({'torch', 'pandas', 'h5py', 'matplotlib'} & set(sys.modules)))\n"
        f"sys.argv = [{command!r}, '--help']\n"
        f"runpy.run_path({command!r}, run_name='__main__')\n"
    )
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"scripts/diagnose.py", "scripts/demo.py"}))
def test_help_is_complete_and_fits_80_columns(command: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    parsers: list[CommandParser] = []
    start = CommandParser.__init__

    def kept(self: CommandParser, **options: object) -> None:
        start(self, **options)
        parsers.append(self)

    monkeypatch.setattr(CommandParser, "__init__", kept)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / command), run_name="__main__")
    shown = capsys.readouterr().out
    assert "exit codes: 0 done" in shown and "--version" in shown
    for parser in parsers:
        assert [action.dest for action in parser._actions if not action.help] == []
        after_usage = parser.format_help().partition("\n\n")[2]
        assert [line for line in after_usage.splitlines() if len(line) > 80] == []


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
    with pytest.raises(StaleError, match="did you mean 'video_0"):
        plot_video.main(["--run", str(clip_run), "--video", "video_00", "--output", str(output)])
