"""Prepare a public data set, check any data set, or convert annotations to another layout.

    python scripts/prepare_data.py activitynet --root data  # download, verify, normalize; say what is missing
    python scripts/prepare_data.py thumos14 --root data --from FILE  # the same from a file
    python scripts/prepare_data.py thumos14 --root data --check  # report on what is there
    python scripts/prepare_data.py custom --root data/mine  # annotations.csv to annotations.json, then report
    python scripts/prepare_data.py custom --root data/mine --check  # report on a data set of your own
    python scripts/prepare_data.py captions --root data --from FILE  # unpack and check features, text encoder and a run
    python scripts/prepare_data.py convert IN.csv OUT.json --to activitynet

A table of your own needs the columns video, start, end (seconds) and label. Durations are read from the videos in
ROOT/videos where it has no column duration; without a column subset every fifth video is for validation.

Running it again changes nothing. The exit code of --check is 0 if all is ready, 1 if something is missing, 3 if
something is faulty. Layouts and sources: data/README.md.
"""

import argparse
import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import StaleError, counted, name_some, run_command

SPLITS = Path(__file__).resolve().parents[1] / "data" / "splits"  # the official lists


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; an option that would have no effect is an error."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="activitynet|thumos14|custom|captions|convert", help="what to do"
    )
    for name in ("activitynet", "thumos14", "custom"):
        command = commands.add_parser(name, description=__doc__)
        command.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the data")
        command.add_argument("--check", action="store_true", help="only report")
        command.add_argument("--json", type=Path, metavar="OUT", help="with --check: write the report as JSON")
        command.add_argument("--id-pattern", metavar="TEXT", help="with --check: as data.id_pattern")
        command.add_argument("--sample", type=int, metavar="N", help="with --check: load features of N videos a subset")
        for what in ("annotations", "features", "splits"):
            command.add_argument(f"--{what}", type=Path, metavar="PATH", help="with --check: not the default path")
        if name == "custom":
            command.add_argument("--name", default="custom", help="of the data set, as data.dataset")
        else:
            command.add_argument("--from", dest="copy", type=Path, metavar="FILE", help="a copy of the annotations")
    captions = commands.add_parser("captions", description="Unpack and check a package of scripts/pack_release.py.")
    captions.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the data")
    captions.add_argument("--from", dest="package", required=True, metavar="FILE|URL", help="the package")
    convert = commands.add_parser("convert", description="Change the layout of an annotation file.")
    convert.add_argument("input", type=Path, help="annotations of any layout")
    convert.add_argument("output", type=Path, help="the file to write")
    convert.add_argument("--to", required=True, metavar="activitynet|actionformer|opentad|csv", help="its layout")
    convert.add_argument("--fps", type=float, help="frames a second of videos whose file does not say")
    options = parser.parse_args(arguments)
    if options.command == "convert":
        return options
    if options.command == "captions":
        return options
    if options.check and getattr(options, "copy", None):
        parser.error("--from does not go with --check")
    if options.sample is not None and options.sample < 1:
        parser.error("--sample must be at least 1")
    for name in ("json", "sample", "annotations", "features", "splits", "id_pattern"):
        is_used = options.check or (options.command == "custom" and name != "annotations")
        if not is_used and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes with --check")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    own = {"convert": convert, "captions": unpack_captions, "custom": prepare_custom}
    check(options) if getattr(options, "check", False) else own.get(options.command, prepare)(options)


def prepare(options: argparse.Namespace) -> None:
    """Prepare a public data set and print what was done."""
    from data_preparation.prepare import prepare as prepare_data_set
    from stale.data.datasets import DATASETS  # after parsing: --help answers at once

    print("\n".join(prepare_data_set(DATASETS[options.command], options.root, options.copy)))


def unpack_captions(options: argparse.Namespace) -> None:
    """Unpack a package and say how to use it."""
    from stale.io import download
    from stale.release import FEATURES, RUN, TEXT_ENCODER, unpack

    is_url = options.package.startswith(("https://", "http://"))
    package = download(options.package, options.root / "downloads") if is_url else Path(options.package)
    folder = options.root / package.stem
    there = {path.name for path in folder.glob("[!.]*")}  # an interrupted unpacking can have left some
    if there - {FEATURES, TEXT_ENCODER, RUN}:
        raise StaleError(f"{folder} holds other data: rename the package, whose name the folder takes")
    try:
        manifest = unpack(package, folder)
    except StaleError:
        if is_url:
            package.unlink()  # or the next run would take it for a finished download
        raise
    print(f"{folder}: {len(manifest['files'])} files, {len(manifest['videos']):,} videos, checked by SHA-256")
    print(f"next: python inference.py --run {shlex.quote(str(folder / RUN))}")


def prepare_custom(options: argparse.Namespace) -> None:
    """Complete ROOT/annotations.csv, write it as ROOT/annotations.json, and report on the data set."""
    from data_preparation.converters import load_rows, parse_rows, write_as
    from stale.video.frames import find_videos, probe

    table = options.root / "annotations.csv"
    rows = load_rows(table, ("video", "start", "end", "label"))
    ids = sorted({row["video"] for _, row in rows})
    # What is given in any row of a video
    given = {key: {row["video"]: row[key] for _, row in rows if row.get(key)} for key in ("subset", "duration")}
    usual = {name: "validation" if number % 5 == 4 else "training" for number, name in enumerate(ids)}
    if not given["subset"] and len(ids) < 5:
        raise StaleError(f"{table}: of {counted(len(ids), 'video')} none is for validation: add a column subset")
    known = {"subset": usual | given["subset"], "duration": given["duration"]}
    without = {*ids} - known["duration"].keys()
    files = {path.stem: path for path in find_videos([options.root / "videos"])} if without else {}
    if absent := sorted(without - files.keys()):
        raise StaleError(f"{table}: no duration and no file in {options.root / 'videos'}: {name_some(absent)}")
    for name in sorted(without):
        known["duration"][name] = f"{probe(files[name]).duration:.3f}"
    for _, row in rows:
        row |= {column: row.get(column) or values[row["video"]] for column, values in known.items()}
    write_as("activitynet", parse_rows(rows, table), options.root / "annotations.json")
    check(options)


def check(options: argparse.Namespace) -> None:
    """Report on a data set; the exit code is the verdict."""
    from data_preparation import checks
    from data_preparation.prepare import find_features
    from stale.data.datasets import DATASETS
    from stale.io import write_json

    public = DATASETS.get(options.command)
    folder = options.root / options.command if public else options.root
    own_splits = options.root / "splits"
    report = checks.check(
        options.command if public else options.name,
        options.annotations or folder / (public.annotations if public else "annotations.json"),
        features=options.features or find_features(folder),
        splits=options.splits or (SPLITS if public and not own_splits.exists() else own_splits),
        public=public,
        sample=options.sample,
        id_pattern=options.id_pattern or "{id}",
    )
    print(report.as_text())
    if options.json:
        write_json(options.json, {"verdict": report.verdict, **asdict(report)}, indent=1)
    if code := checks.EXIT_CODES[report.verdict]:
        raise SystemExit(code)


def convert(options: argparse.Namespace) -> None:
    """Load annotations of any layout and write another."""
    from data_preparation.converters import load_any_layout, write_as
    from stale.data.features import recorded_number

    recorded_number(vars(options), "fps", "--fps")
    found = load_any_layout(options.input)
    videos = {name: replace(video, fps=video.fps or options.fps) for name, video in found.videos.items()}
    write_as(options.to, replace(found, videos=videos), options.output)
    print(f"{options.output}: {len(videos):,} videos")


if __name__ == "__main__":
    run_command(main)
