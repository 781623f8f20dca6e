"""Check a data set's features and pack them into one HDF5 block, rescaled to T snippets a video.

    python scripts/pack_features.py features/ packed.h5 --annotations activity_net.v1-3.json --snippets 100
    python scripts/pack_features.py clip.h5 packed.h5 --annotations thumos14.json --snippets 256 --fps 30 --full

A packed block loads in one go and is small: train on it with data.features=packed.h5 and the same data.num_snippets.
One larger than memory is read batch by batch, where it lies (data.resident).
With --annotations exactly the annotated videos are packed, and their durations compared. Reported: features that are
missing, hold NaN, have another width or shape, are constant, are too large for half precision (all left out), and
features whose duration does not fit the annotation (packed). Exit code 1 if a video was left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from stale.errors import run_command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, help="folder of .npy, or HDF5")
    parser.add_argument("output", type=Path, metavar="OUTPUT.h5")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="JSON in ActivityNet's layout")
    parser.add_argument("--subset", help="only this subset of the annotations")
    parser.add_argument("--snippets", type=int, default=100, metavar="T", help="data.num_snippets; default 100")
    parser.add_argument("--fps", type=float, help="snippets a second, where the features do not record it")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--half", dest="precision", action="store_const", const="float16", default="float16")
    precision.add_argument("--full", dest="precision", action="store_const", const="float32")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="every problem with its video")
    options = parser.parse_args(arguments)
    if options.snippets < 2 or (options.fps is not None and options.fps <= 0):
        parser.error("--snippets must be at least 2 and --fps above 0")
    if options.subset and not options.annotations:
        parser.error("--subset goes with --annotations")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)

    from stale.data.annotations import in_subset, read_annotations  # after parsing: --help answers at once
    from stale.data.features import open_features
    from stale.data.pack import pack
    from stale.files import write_json

    videos = read_annotations(options.annotations) if options.annotations else None
    if videos and options.subset:
        videos = {video.id: video for video in in_subset(videos.values(), options.subset)}
    store = open_features(options.features)
    report = pack(store, options.output, options.snippets, options.precision, videos, options.fps)
    print("\n".join(report.lines()))
    if options.report:
        problems = [{"video": video, "kind": kind, "detail": detail} for video, kind, detail in report.problems]
        write_json(options.report, {"shape": report.shape, "problems": problems}, indent=1)
    if report.left_out:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
