"""The paper's tables, ours beside the published figures, in one command.

    python scripts/reproduce.py zero_shot --dataset thumos14                    # plan, run what is left, print
    python scripts/reproduce.py masking --dataset activitynet --splits 0 1 --rows none q20
    python scripts/reproduce.py zero_shot --dataset thumos14 --devices 0,1      # a job at a time on each GPU
    python scripts/reproduce.py zero_shot --dataset thumos14 --list             # what is left, a job a line
    python scripts/reproduce.py zero_shot --dataset thumos14 --check            # 1: out of what was measured before

TABLE is zero_shot, masking, text_encoder, error_propagation, closed_set, official_code, beyond or directions. A data
set is one of configs/*.yaml; --config names other files. Every job is one training with its tests, by train.py,
inference.py and eval.py: a finished one is skipped, one that was killed goes on. Writes OUTPUT/runs/ and
OUTPUT/TABLE.md, .csv and .png. Differences from published figures are printed for configs/activitynet.yaml and
thumos14.yaml alone, whose features are the paper's.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from stale.data.splits import NUM_SPLITS  # noqa: E402
from stale.errors import StaleError, run_command  # noqa: E402
from stale.files import read_json, write_json, write_text  # noqa: E402
from stale.reproduce.catalog import TABLES, Table, choose_rows  # noqa: E402
from stale.reproduce.plan import Cell, Sources, jobs_of, make_plan, missing_inputs, shell_line  # noqa: E402
from stale.reproduce.tables import (  # noqa: E402
    SETTINGS,
    Line,
    compare,
    make_lines,
    read_expected,
    read_published,
    to_csv,
    to_expected,
    to_markdown,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", default="thumos14", metavar="NAME", help="of configs/NAME.yaml; default thumos14")
    source.add_argument("--config", nargs="+", type=Path, metavar="FILE", help="YAML files in its place")
    parser.add_argument("--features", nargs="+", metavar="PATH", help="in place of the configuration's; several: both")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", dest="assignments"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="only these settings of classes")
    parser.add_argument(
        "--splits", nargs="+", type=int, choices=range(NUM_SPLITS), default=list(range(NUM_SPLITS)), metavar="N"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), metavar="DIR")
    parser.add_argument("--devices", default="", metavar="0,1|cpu,cpu", help="that many jobs at once, one on each")
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--list", action="store_true", help="print what is left to run, an independent job a line")
    act.add_argument("--report", action="store_true", help="run nothing: the table as far as it is finished")
    parser.add_argument("--check", action="store_true", help="exit 1 where ours differ from what was measured before")
    parser.add_argument("--record", action="store_true", help="keep the finished rows as what later runs must match")
    parser.add_argument("--expected", type=Path, metavar="FILE", help="of --check and --record; default by table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    table = TABLES[options.table]
    cells = plan(table, options)
    if options.list:
        list_jobs(cells)
        return
    failures = {} if options.report else run(cells, options)
    dataset = cells[0].jobs[0].config.data.dataset
    published = read_published(ROOT / "configs" / "published.csv")
    lines = make_lines(table, cells, dataset, published, comparable=source_name(options) == dataset)
    write_table(table, lines, dataset, options.output)
    for name, fault in failures.items():
        print(f"failed: {name}: {fault}", file=sys.stderr)
    expected = options.expected or ROOT / "configs" / "expected" / f"{table.name}.{source_name(options)}.json"
    if options.record:
        command = shlex.join(["python", "scripts/reproduce.py", *(sys.argv[1:] if arguments is None else arguments)])
        record(lines, expected, {"seed": cells[0].jobs[0].config.train.seed, "command": command})
    faults = check(lines, expected) if options.check else []
    if failures or faults:
        raise SystemExit(1)


def plan(table: Table, options: argparse.Namespace) -> list[Cell]:
    """The cells that the options ask for."""
    configs = options.config or [ROOT / "configs" / f"{options.dataset}.yaml"]
    settings = [setting for setting in table.settings if setting in (options.settings or table.settings)]
    if not settings:
        raise StaleError(f"table {table.name} has the settings {', '.join(table.settings)} alone")
    features = [f"data.features=[{', '.join(options.features)}]"] if options.features else []
    sources = Sources(ROOT, tuple(configs), (*options.assignments, *features))
    rows = choose_rows(table, options.rows)
    return make_plan(table, rows, settings, sorted(set(options.splits)), options.output, sources)


def list_jobs(cells: Sequence[Cell]) -> None:
    """Print what is left, a job a line; what is missing goes to stderr, for the jobs may run elsewhere."""
    left = [job for job in jobs_of(cells) if job.unfinished()]
    for line in missing_inputs(left):
        print(f"missing here: {line}", file=sys.stderr)
    for job in left:
        print(shell_line(job.commands(ROOT)))


def run(cells: Sequence[Cell], options: argparse.Namespace) -> dict[str, str]:
    """Say what is planned and what is missing, then run what is left; what failed."""
    from stale.reproduce.runner import Runner

    jobs = jobs_of(cells)
    left = [job for job in jobs if job.unfinished()]
    print(f"{len(cells)} rows, {len(jobs)} runs, {len(jobs) - len(left)} of them finished: {options.output}")
    missing = missing_inputs(left)
    if missing:
        raise StaleError("missing: " + "; ".join(missing))
    return Runner(ROOT, options.devices.split(",")).run(jobs)


def write_table(table: Table, lines: Sequence[Line], dataset: str, output: Path) -> None:
    """Print the table, and write it as Markdown, CSV and PNG."""
    from stale.reproduce.picture import draw_table

    text = to_markdown(table, lines, dataset)
    write_text(output / f"{table.name}.md", text)
    write_text(output / f"{table.name}.csv", to_csv(table, lines, dataset))
    draw_table(table, lines, dataset, output / f"{table.name}.png")
    print(f"\n{text}\n{output / table.name}.md, .csv, .png")


def source_name(options: argparse.Namespace) -> str:
    """What the table was made from, for the name of its file of expected figures."""
    return "_".join(file.stem for file in options.config) if options.config else options.dataset


def record(lines: Sequence[Line], path: Path, about: dict[str, Any]) -> None:
    """Keep complete rows as expected figures, with where they come from; rows that are the same keep their origin."""
    earlier = read_json(path, "expected figures")["rows"] if path.is_file() else {}
    measured = to_expected(lines)
    changed = {
        name: row
        for name, row in measured.items()
        if any(earlier.get(name, {}).get(key) != value for key, value in row.items())
    }
    origin = {"machine": machine(), **about}
    rows = {**earlier, **{name: {**row, **origin} for name, row in changed.items()}}
    write_json(path, {"rows": rows}, indent=1)
    print(f"recorded: {len(changed)} rows in {path}")


def machine() -> str:
    """What the figures were computed on."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(gpus) or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def check(lines: Sequence[Line], path: Path) -> list[str]:
    """Compare with the expected figures and say how it went."""
    known = read_expected(path)["rows"]
    faults = compare(lines, known)
    for fault in faults:
        print(f"out of tolerance: {fault}", file=sys.stderr)
    held = sum(f"{line.setting}/{line.key}" in known for line in lines)
    print(f"check: {held - len(faults)} of {held} rows within tolerance of {path}, {len(lines) - held} never measured")
    return faults


if __name__ == "__main__":
    run_command(main)
