"""Get a data set ready, check one, or change the layout of its annotations.

    python scripts/prepare_data.py activitynet --root data            download, verify, normalise; say what is missing
    python scripts/prepare_data.py thumos14 --root data --from DIR    the same from copies in DIR, or a mirror's address
    python scripts/prepare_data.py thumos14 --root data --check       report on what is there
    python scripts/prepare_data.py custom --root data/mine --check    report on a data set of your own
    python scripts/prepare_data.py convert IN.csv OUT.json --to activitynet

Running it again changes nothing. SHA-256 of all that was fetched and made: ROOT/manifest.json. The exit code of --check
is 0 if all is ready, 1 if something is missing, 3 if something is faulty. Layouts and sources: data/README.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from stale.errors import run_command

if TYPE_CHECKING:
    from stale.preparation.checks import Places


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="activitynet|thumos14|custom|convert")
    for name in ("activitynet", "thumos14", "custom"):
        command = commands.add_parser(name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("--root", type=Path, required=True, metavar="DIR", help="where the data lie or shall lie")
        command.add_argument("--check", action="store_true", required=name == "custom", help="only report")
        command.add_argument("--json", type=Path, metavar="OUT", help="with --check: write the report as JSON")
        command.add_argument("--sample", type=int, metavar="N", help="with --check: read features of N videos a subset")
        for what in ("annotations", "features", "splits"):
            command.add_argument(f"--{what}", type=Path, metavar="PATH", help="with --check: not where it is expected")
        if name == "custom":
            command.add_argument("--name", help="of the data set and its splits' folder; default the root's name")
        else:
            command.add_argument("--from", dest="place", metavar="DIR|URL", help="folder of copies, or a mirror")
    convert = commands.add_parser("convert", description="Change the layout of an annotation file.")
    convert.add_argument("input", type=Path)
    convert.add_argument("output", type=Path)
    convert.add_argument("--to", required=True, metavar="activitynet|actionformer|opentad|t3al|csv")
    convert.add_argument("--fps", type=float, help="frames a second of videos whose file does not say")
    options = parser.parse_args(arguments)
    if options.command != "convert":
        refuse_idle_options(parser, options)
    return options


def refuse_idle_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """An option that would do nothing is a mistake."""
    if options.check and getattr(options, "place", None):
        parser.error("--from does not go with --check")
    if options.sample is not None and options.sample < 1:
        parser.error("--sample must be at least 1")
    for name in ("json", "sample", "annotations", "features", "splits"):
        if not options.check and getattr(options, name) is not None:
            parser.error(f"--{name} goes with --check")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = convert if options.command == "convert" else check if options.check else prepare
    command(options)


def prepare(options: argparse.Namespace) -> None:
    """Make a public data set ready and say what was done."""
    from stale.preparation.catalog import DATA_SETS  # after parsing: --help answers at once
    from stale.preparation.prepare import prepare as prepare_data_set

    for step in prepare_data_set(DATA_SETS[options.command], options.root, options.place):
        print(f"{step.name:<12} {step.state:<8} {step.detail}")


def check(options: argparse.Namespace) -> None:
    """Report on a root; the exit code is the verdict."""
    from stale.files import write_json
    from stale.preparation.catalog import DATA_SETS
    from stale.preparation.checks import EXIT_CODES, as_text
    from stale.preparation.checks import check as check_data_set

    known = DATA_SETS.get(options.command)
    name = known.name if known else options.name or options.root.resolve().name
    report = check_data_set(name, find_places(options), known, options.sample)
    print(as_text(report))
    if options.json:
        write_json(options.json, report.as_dict(), indent=1)
    if EXIT_CODES[report.verdict]:
        raise SystemExit(EXIT_CODES[report.verdict])


def find_places(options: argparse.Namespace) -> Places:
    """Where the things to check are: as given, or where they are expected below the root."""
    from stale.preparation.catalog import DATA_SETS
    from stale.preparation.checks import Places, find_features

    known = DATA_SETS.get(options.command)
    folder = options.root / known.name if known else options.root
    return Places(
        options.annotations or folder / (known.annotations if known else "annotations.json"),
        options.features or find_features(folder),
        options.splits or options.root / "splits",
    )


def convert(options: argparse.Namespace) -> None:
    """Read any layout, write another."""
    from stale.preparation.converters import Annotations, read_any, write_as

    found = read_any(options.input)
    rates = dict.fromkeys(found.videos, options.fps) | found.fps if options.fps else found.fps
    for path in write_as(options.to, Annotations(found.videos, rates), options.output):
        print(f"{path}: {len(found.videos):,} videos")


if __name__ == "__main__":
    run_command(main)
