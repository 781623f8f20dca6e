"""Prepare a public data set, check any data set, or convert annotations to another layout.

    python scripts/prepare_data.py activitynet --root data             download, verify, normalise; say what is missing
    python scripts/prepare_data.py thumos14 --root data --from FILE    the same from a file
    python scripts/prepare_data.py thumos14 --root data --check        report on what is there
    python scripts/prepare_data.py custom --root data/mine --check     report on a data set of your own
    python scripts/prepare_data.py convert IN.csv OUT.json --to activitynet

Running it again changes nothing. The exit code of --check is 0 if all is ready, 1 if something is missing, 3 if
something is faulty. Layouts and sources: data/README.md.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import run_command

SPLITS = Path(__file__).resolve().parents[1] / "data" / "splits"  # the official lists


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; an option that would have no effect is an error."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="activitynet|thumos14|custom|convert")
    for name in ("activitynet", "thumos14", "custom"):
        command = commands.add_parser(name, description=__doc__)
        command.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the data")
        command.add_argument("--check", action="store_true", required=name == "custom", help="only report")
        command.add_argument("--json", type=Path, metavar="OUT", help="with --check: write the report as JSON")
        command.add_argument("--sample", type=int, metavar="N", help="with --check: load features of N videos a subset")
        for what in ("annotations", "features", "splits"):
            command.add_argument(f"--{what}", type=Path, metavar="PATH", help="with --check: not the default path")
        if name == "custom":
            command.add_argument("--name", help="of the data set and its splits' folder; default: the root's name")
        else:
            command.add_argument("--from", dest="copy", type=Path, metavar="FILE", help="a copy of the annotations")
    convert = commands.add_parser("convert", description="Change the layout of an annotation file.")
    convert.add_argument("input", type=Path)
    convert.add_argument("output", type=Path)
    convert.add_argument("--to", required=True, metavar="activitynet|actionformer|opentad|csv")
    convert.add_argument("--fps", type=float, help="frames a second of videos whose file does not say")
    options = parser.parse_args(arguments)
    if options.command == "convert":
        if options.fps is not None and not 1e-3 <= options.fps <= 1e6:
            parser.error("--fps must lie between 0.001 and 1,000,000")
        return options
    if options.check and getattr(options, "copy", None):
        parser.error("--from does not go with --check")
    if options.sample is not None and options.sample < 1:
        parser.error("--sample must be at least 1")
    for name in ("json", "sample", "annotations", "features", "splits"):
        if not options.check and getattr(options, name) is not None:
            parser.error(f"--{name} goes with --check")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = convert if options.command == "convert" else check if options.check else prepare
    command(options)


def prepare(options: argparse.Namespace) -> None:
    """Prepare a public data set and print what was done."""
    from stale.preparation.prepare import SOURCES  # after parsing: --help answers at once
    from stale.preparation.prepare import prepare as prepare_data_set

    for step in prepare_data_set(SOURCES[options.command], options.root, options.copy):
        print(f"{step.name:<12} {step.state:<8} {step.detail}")


def check(options: argparse.Namespace) -> None:
    """Report on a data set; the exit code is the verdict."""
    from stale.io import write_json
    from stale.preparation import checks
    from stale.preparation.prepare import SOURCES, find_features

    source = SOURCES.get(options.command)
    folder = options.root / source.name if source else options.root
    own_splits = options.root / "splits"
    report = checks.check(
        source.name if source else options.name or options.root.resolve().name,
        options.annotations or folder / (source.annotations if source else "annotations.json"),
        features=options.features or find_features(folder),
        splits=options.splits or (SPLITS if source and not own_splits.exists() else own_splits),
        source=source,
        sample=options.sample,
    )
    print(checks.as_text(report))
    if options.json:
        write_json(options.json, report.as_dict(), indent=1)
    if code := checks.EXIT_CODES[report.verdict]:
        raise SystemExit(code)


def convert(options: argparse.Namespace) -> None:
    """Load annotations of any layout and write another."""
    from stale.preparation.converters import load_any_layout, write_as

    found = load_any_layout(options.input)
    rates = dict.fromkeys(found.videos, options.fps) | found.fps if options.fps else found.fps
    write_as(options.to, replace(found, fps=rates), options.output)
    print(f"{options.output}: {len(found.videos):,} videos")


if __name__ == "__main__":
    run_command(main)
