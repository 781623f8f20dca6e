"""Train and test the rows of one of the paper's tables, and compare the results with the published ones.

    python scripts/reproduce.py zero_shot --dataset thumos14                    # run what is unfinished
    python scripts/reproduce.py masking --dataset activitynet --splits 0 1 --rows none q20
    python scripts/reproduce.py zero_shot --dataset thumos14 --devices 0,1      # one run at a time on each GPU
    python scripts/reproduce.py zero_shot --dataset thumos14 --list             # unfinished runs as shell lines
    python scripts/reproduce.py zero_shot --dataset thumos14 --check            # exit 1 if a result is out of tolerance

TABLE is one of configs/tables.yaml, which takes rows and tables of your own: zero_shot, masking, text_encoder,
error_propagation, temporal, prompt, loss_terms, backbone, parts, external_scores, closed_set, official_code, beyond,
directions, cross_dataset. A data set is a file configs/NAME.yaml; --config names other files. Each run is one training
with its tests, by train.py, inference.py and eval.py: a finished run is skipped, and one that was killed resumes.
Writes OUTPUT/runs/, OUTPUT/TABLE.md and a picture a setting. Differences from published results are shown where the
features are of the same backbone, unless external scores are known to be used on one side only.
"""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stale.commands import CommandParser, add_set
from stale.errors import StaleError, run_command

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("table", metavar="TABLE", help="see above")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", default="thumos14", metavar="NAME", help="configs/NAME.yaml; default thumos14")
    source.add_argument("--config", nargs="+", type=Path, metavar="FILE", help="YAML files instead")
    parser.add_argument("--features", nargs="+", metavar="PATH", help="instead of data.features; several are combined")
    parser.add_argument("--i3d-features", default="", metavar="PATH", help="of the row i3d of the table backbone")
    parser.add_argument("--video-scores", default="", metavar="FILE", help="of the rows that use external scores")
    add_set(parser, "single settings of all runs, as section.key=value")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help="only these of 75_25, 50_50, closed, seen_cv")
    parser.add_argument(
        "--splits",
        nargs="+",
        type=int,
        choices=range(10),
        default=list(range(10)),
        metavar="N",
        help="only these splits",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="folder of the runs and tables"
    )
    parser.add_argument("--devices", default="", metavar="0,1|cpu,cpu", help="one run at a time on each")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="print the unfinished runs, one shell line each")
    action.add_argument("--report", action="store_true", help="run nothing; print the table of the finished runs")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 if a result is out of tolerance")
    parser.add_argument("--record", action="store_true", help="save the finished rows as the expected results")
    parser.add_argument("--expected", type=Path, metavar="FILE", help="expected results; default configs/expected/...")
    options = parser.parse_args(arguments)
    if options.list and (options.check or options.record):
        parser.error("--list does not go with --check and --record")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)

    from paper_tables import report  # after parsing: --help answers at once
    from paper_tables.catalog import choose_rows, load_tables
    from paper_tables.plan import Sources, jobs_of, make_plan, missing_inputs, run_jobs, shell_line
    from stale.io import write_text

    tables = load_tables(ROOT / "configs" / "tables.yaml")
    if options.table not in tables:
        raise StaleError(f"there is no table {options.table}; use one of {', '.join(tables)}")
    table = tables[options.table]
    source = "_".join(file.stem for file in options.config) if options.config else options.dataset
    expected = options.expected or ROOT / "configs" / "expected" / f"{table.name}.{source}.json"
    if options.check:
        report.read_expected(expected)  # fails at once where there is nothing to check against
    settings = [setting for setting in table.settings if setting in (options.settings or table.settings)]
    if not {*table.settings}.issuperset(options.settings or ()):
        raise StaleError(f"table {table.name} has only the settings {', '.join(table.settings)}")
    features = [f"data.features=[{', '.join(options.features)}]"] if options.features else []
    configs = options.config or [ROOT / "configs" / f"{options.dataset}.yaml"]
    assignments = (*options.assignments, *features)
    sources = Sources(ROOT, tuple(configs), assignments, options.i3d_features, options.video_scores)
    rows = choose_rows(table, options.rows)
    cells = make_plan(table, rows, settings, splits=sorted(set(options.splits)), output=options.output, sources=sources)
    jobs = jobs_of(cells)
    if not jobs:
        raise StaleError(f"table {table.name} has no run of these rows, settings and splits on {options.dataset}")
    left = [job for job in jobs if job.unfinished()]

    if options.list:
        for line in missing_inputs(left, ROOT):  # on stderr, for the jobs may run on another machine
            print(f"missing here: {line}", file=sys.stderr)
        print("".join(f"{shell_line(job.commands(ROOT))}\n" for job in left), end="")
        return
    failures = {}
    if not options.report and not options.check:
        print(f"{len(cells)} rows, {len(jobs)} runs, {len(jobs) - len(left)} of them finished: {options.output}")
        if missing := missing_inputs(left, ROOT):
            raise StaleError("missing: " + "; ".join(missing))
        failures = run_jobs(jobs, ROOT, options.devices.split(","))

    data = jobs[0].config.data
    published = report.read_published(ROOT / "configs" / "published.csv")
    lines = report.make_lines(table, cells, data.dataset, published)
    known = report.read_expected(expected) if expected.is_file() else {"rows": {}}
    text = report.to_markdown(table, lines, data.dataset, data.tious)
    target = options.output / f"{table.name}.md"
    print(f"\n{text}")
    if options.check or (target.exists() and not any(line.runs for line in lines)):
        print(f"{target} is not written: {'--check only reports' if options.check else 'no run is finished'}")
    else:
        write_text(target, text)
        print(target)
        for setting in dict.fromkeys(line.setting for line in lines if line.ours):
            print(draw(lines, f"{table.title}: {data.dataset}", setting, target.with_suffix(f".{setting}.png")))
    for name, fault in failures.items():
        print(f"failed: {name}: {fault}", file=sys.stderr)
    if options.record:
        command = shlex.join(["python", "scripts/reproduce.py", *(sys.argv[1:] if arguments is None else arguments)])
        about = {"machine": machine(), "seed": jobs[0].config.train.seed, "command": command}
        print(f"recorded: {report.record(lines, known, expected, about)} rows in {expected}")
    faults = report.compare(lines, known["rows"]) if options.check else []
    for fault in faults:
        print(f"out of tolerance: {fault}", file=sys.stderr)
    if options.check:
        checked = sum(f"{line.setting}/{line.row.key}" in known["rows"] for line in lines)
        missing = f"{len(lines) - checked} without an expected result"
        print(f"check: {checked - len(faults)} of {checked} rows within tolerance of {expected}, {missing}")
    if failures or faults:
        raise SystemExit(1)


def draw(lines: Sequence[Any], title: str, setting: str, path: Path) -> Path:
    """Draw the finished rows of a setting as bars, with values, numbers of runs and the best training-free baseline."""
    from matplotlib.figure import Figure

    from stale.evaluation.aggregate import AVERAGE
    from stale.plots import plain_text, save_figure

    done = [line for line in lines if line.setting == setting and line.ours]
    cells = [line.ours[AVERAGE] for line in done]
    means, errors = [100 * cell["mean"] for cell in cells], [100 * (cell["std"] or 0.0) for cell in cells]
    figure = Figure(figsize=(9, 1.3 + 0.4 * len(done)), layout="constrained", dpi=100)
    ax = figure.subplots()
    ax.barh(range(len(done)), means, xerr=errors, color="#0072B2", alpha=0.8, ecolor="#404040")
    for place, (mean, error) in enumerate(zip(means, errors, strict=True)):
        text = f" {mean:.1f} ± {error:.1f}" if error else f" {mean:.1f}"
        ax.text(mean + error, place, text, va="center", fontsize=9)
    if free := [100 * line.training_free for line in done if line.training_free is not None]:
        ax.axvline(max(free), color="#D55E00", linestyle="--", label=f"best training-free baseline: {max(free):.1f}")
        figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    names = [plain_text(f"{line.row.name} (n = {len(line.runs)})", 60) for line in done]
    ax.set_yticks(range(len(done)), names, fontsize=9)
    ax.invert_yaxis()
    longest = max(mean + error for mean, error in zip(means, errors, strict=True))
    ax.set(xlabel="average mAP, %", title=f"{title}, {setting.replace('_', '/')}", xlim=(0, 1.15 * max(longest, 1)))
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
    return path


def machine() -> str:
    """Describe what the results were computed on."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(gpus) or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    run_command(main)
