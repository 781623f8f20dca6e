"""Detect actions with a trained run: in its test videos, or in any video with any class names.

    python inference.py --run runs/thumos14_3                       # the unseen classes, in the test subset
    python inference.py --run runs/thumos14_3 --vocabulary seen     # the seen classes: detections_seen.json
    torchrun --nproc_per_node=4 inference.py --run runs/anet_0      # on four GPUs, the same file

    python inference.py --run runs/thumos14_3 --video clip.mp4 --classes "high jump" "tennis swing"
    python inference.py --run runs/thumos14_3 --video clips/ --classes-file classes.txt --csv out.csv --vtt subtitles/
    python inference.py --run runs/thumos14_3 --features clip.npy --fps 5 --classes "high jump" --picture clip.png

The first form writes RUN/detections.json (ActivityNet results JSON), and the untrained rows' under RUN/untrained/.

The second form needs no annotation. Videos and features are files, or folders of them (features also HDF5). A class
is a name, or "name | another phrase | ..." whose phrases are averaged; a classes file holds one a line (# is a
comment), or is JSON: a list of names, or {"label": ["phrase", ...]}. A table of the best detections is printed; all
detections are written as ActivityNet results JSON. What cannot be read is named at the end; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stale.errors import StaleError, run_command

OWN = ("classes", "classes_file", "template", "fps", "image_weights", "output", "csv", "vtt", "srt", "picture")
PICTURES = (".png", ".pdf", ".svg")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked for options that do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="folder that train.py wrote")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), help="of the test videos; default unseen")
    parser.add_argument(
        "--oracle",
        choices=("masks", "proposals"),
        help="ground truth in place of the predicted mask or of all candidates: writes detections_oracle_….json",
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: the device of the training")
    own = parser.add_argument_group("your own videos")
    source = own.add_mutually_exclusive_group()
    source.add_argument("--video", nargs="+", type=Path, metavar="FILE|FOLDER", help="videos")
    source.add_argument("--features", nargs="+", type=Path, metavar="FILE|FOLDER", help=".npy or HDF5 features")
    names = own.add_mutually_exclusive_group()
    names.add_argument("--classes", nargs="+", metavar="NAME", help="what to look for, in your words")
    names.add_argument("--classes-file", type=Path, metavar="FILE")
    own.add_argument("--template", nargs="+", metavar="TEXT", help='e.g. "a video of {}"; default the run\'s prompt')
    own.add_argument("--fps", type=float, help="of --video: snippets a second, default 5; of --features: their rate")
    own.add_argument("--image-weights", metavar="NAME|FILE", help="CLIP's image tower; default that of the run's text")
    own.add_argument("--output", type=Path, metavar="FILE.json", help="default NAME.detections.json")
    own.add_argument("--csv", type=Path, metavar="FILE")
    own.add_argument("--vtt", type=Path, metavar="FILE|FOLDER", help="WebVTT subtitles; of several videos a folder")
    own.add_argument("--srt", type=Path, metavar="FILE|FOLDER", help="SubRip subtitles")
    own.add_argument("--picture", type=Path, metavar="FILE|FOLDER", help="timelines, png, pdf or svg")
    own.add_argument("--top", type=int, default=20, help="detections a video in table, CSV, subtitles and picture")
    own.add_argument("--min-score", type=float, default=0.0, help="leave weaker ones out of them")
    options = parser.parse_args(arguments)
    refuse_idle_options(parser, options)
    return options


def refuse_idle_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """An option that would do nothing is a mistake."""
    sources = options.video or options.features
    given = [f"--{name.replace('_', '-')}" for name in OWN if getattr(options, name) is not None]
    if not sources and given:
        parser.error(f"{given[0]} goes with --video or --features")
    if sources and options.vocabulary:
        parser.error("--vocabulary is of the run's test videos; name your own classes with --classes")
    if sources and options.oracle:
        parser.error("--oracle needs ground truth: it is for the run's test videos")
    if sources and not (options.classes or options.classes_file):
        parser.error("say what to look for with --classes or --classes-file")
    if options.features and options.image_weights:
        parser.error("--image-weights goes with --video")
    if options.top < 1:
        parser.error("--top must be at least 1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)

    from stale.parallel import joined, size  # after parsing: --help answers at once

    with joined():
        if options.video or options.features:
            if size() > 1:
                raise StaleError("--video and --features are the work of one process: start it without torchrun")
            detect_own(options)
        else:
            detect_tested(options)


def detect_tested(options: argparse.Namespace) -> None:
    """The run's test videos."""
    from stale.detection.inference import infer
    from stale.run import RunFolder

    infer(RunFolder(options.run), options.checkpoint, options.vocabulary or "unseen", options.device, options.oracle)


def detect_own(options: argparse.Namespace) -> None:
    """``--video`` and ``--features``."""
    from stale.data.vocabulary import parse_classes, read_classes
    from stale.detection.library import Detector
    from stale.detection.own import Writing, write_detections
    from stale.video.decode import find_videos
    from stale.video.extract import Sampling

    classes = read_classes(options.classes_file) if options.classes_file else parse_classes(options.classes)
    detector = Detector(options.run, options.checkpoint, options.device)
    templates = options.template or ()
    if options.video:
        videos = find_videos(options.video)
        encoder = detector.load_encoder(options.image_weights)
        found = detector.detect_videos(videos, encoder, classes, Sampling(options.fps or 5.0), templates)
        single = len(videos) == 1
    else:
        found = detector.detect_stored(options.features, classes, options.fps, templates)
        single = len(options.features) == 1 and options.features[0].suffix == ".npy"
    check_picture(options.picture, single)
    output = options.output or Path(f"{(options.video or options.features)[0].stem}.detections.json")
    writing = Writing(output, options.csv, options.vtt, options.srt, options.picture, options.top, options.min_score)
    made_by = {
        "run": str(options.run),
        "checkpoint": options.checkpoint,
        "classes": {item.label: item.phrases for item in classes},
        "templates": list(templates),
    }
    summary = write_detections(found, writing, single, made_by, print)
    finish(summary.results, summary.broken, output)


def check_picture(picture: Path | None, single: bool) -> None:
    """A single video's picture is a file whose ending is a format."""
    if picture is not None and single and picture.suffix not in PICTURES:
        raise StaleError(f"--picture {picture}: end the name in {', '.join(PICTURES)}")


def finish(results: dict, broken: dict[str, str], output: Path) -> None:
    """Say where the detections are, and what failed."""
    if results:
        print(f"\n{sum(map(len, results.values()))} detections in {len(results)} videos: {output}")
    for video, reason in broken.items():
        print(f"broken: {video}: {reason}", file=sys.stderr)
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
