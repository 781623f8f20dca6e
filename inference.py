"""Detect actions with a trained run: in its test videos, or in any video with any class names.

    python inference.py --run runs/anet                     # the unseen classes
    python inference.py --run runs/anet --vocabulary seen    # the seen classes
    python inference.py --run runs/anet --test-config configs/thumos14.yaml
    torchrun --nproc_per_node=4 inference.py --run runs/anet     # on four GPUs

    python inference.py --run runs/anet --video clip.mp4 --classes "high jump" diving
    python inference.py --run runs/anet --video clips/ --classes-file names.txt --vtt
    python inference.py --run runs/anet --features clip.npy --fps 5 --classes diving

The first form writes RUN/detections.json (ActivityNet results JSON), and the training-free baselines in RUN/baselines/.

The second form needs no annotation. Videos and features are files, or folders of them (features also HDF5). A class
is a name, or "name | another phrase | ..." whose phrases are averaged; a classes file holds one a line (# is a
comment), or is JSON: a list of names, or {"label": ["phrase", ...]}. All detections are written as ActivityNet results
JSON, and a table of the best is printed by time. Files go to runs/NAME/, named after the first source, unless an option
says where; all are listed at the end. Broken videos are listed too; the exit code is then 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stale.commands import CommandParser
from stale.errors import StaleError, counted, printable, run_command

OWN = ("classes", "classes_file", "template", "fps", "duration", "image_weights")
OWN += ("output", "csv", "vtt", "picture", "top", "min_score")
PICTURES = (".png", ".pdf", ".svg")


def utf8(text: str) -> str:
    """An argument that is text; Python decodes others to surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; an option that would do nothing is an error."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--run", required=True, type=Path, help="folder of train.py; with --video or --features also a package"
    )
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE", help="weights of the run")
    tested = parser.add_argument_group("test videos of the run")
    tested.add_argument("--vocabulary", choices=("unseen", "seen", "all"), help="classes to detect; default unseen")
    tested.add_argument(
        "--oracle",
        nargs="+",
        default=[],
        choices=("masks", "localizer", "labels", "proposals"),
        metavar="PART",
        help="ground truth in place of L (masks), M (localizer), the video's classes (labels) or all proposals: writes "
        "detections_oracle_….json",
    )
    tested.add_argument(
        "--test-config",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="another data set, its unseen classes",
    )
    tested.add_argument("--curves", action="store_true", help="save foreground and scores for the report page")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: the device of the training")
    parser.add_argument(
        "--classes-embeddings", metavar="FILE", help="of embed_classes.py, in place of the run's; without --classes all"
    )
    own = parser.add_argument_group("your own videos")
    source = own.add_mutually_exclusive_group()
    source.add_argument("--video", nargs="+", type=Path, metavar="FILE|FOLDER", help="videos")
    source.add_argument("--features", nargs="+", type=Path, metavar="FILE|FOLDER", help=".npy, .npz, .pt or HDF5")
    names = own.add_mutually_exclusive_group()
    names.add_argument("--classes", nargs="+", type=utf8, metavar="NAME", help="any class names")
    names.add_argument("--classes-file", type=Path, metavar="FILE", help="class names, one a line or as JSON")
    own.add_argument(
        "--template", nargs="+", type=utf8, metavar="TEXT", help='e.g. "a video of {}"; default: the run\'s'
    )
    own.add_argument("--fps", type=float, help="of --video: snippets a second, default 5; of --features: their rate")
    own.add_argument("--duration", type=float, metavar="SECONDS", help="of the video of one file of --features")
    own.add_argument("--image-weights", metavar="NAME|FILE", help="image encoder; default that of the run's CLIP")
    files = parser.add_argument_group("files of your own videos; without a place they go to runs/NAME/")
    files.add_argument("--output", type=Path, metavar="FILE.json", help="default runs/NAME/NAME.detections.json")
    optional: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path()}
    files.add_argument("--csv", **optional, metavar="FILE", help="detections as a table")
    files.add_argument("--vtt", **optional, metavar="FILE|FOLDER", help="WebVTT subtitles; of several videos a folder")
    files.add_argument("--picture", **optional, metavar="FILE|FOLDER", help="timelines, png, pdf or svg")
    files.add_argument(
        "--top", type=int, metavar="N", help="detections a video in all of them but --output; default 10"
    )
    files.add_argument("--min-score", type=float, metavar="S", help="leave weaker ones out of them")
    options = parser.parse_args(arguments)

    sources = options.video or options.features
    given = [f"--{name.replace('_', '-')}" for name in OWN if getattr(options, name) is not None]
    problems = {
        f"{''.join(given[:1])} goes with --video or --features": not sources and given,
        "--vocabulary is of the run's test videos; name your own classes with --classes": sources
        and options.vocabulary,
        "--oracle needs ground truth: it is for the run's test videos": sources and options.oracle,
        "--curves is of the run's test videos, without --oracle and --test-config": options.curves
        and (sources or options.oracle or options.test_config),
        "name the classes with --classes or --classes-file": sources
        and not (options.classes or options.classes_file or options.classes_embeddings),
        "--image-weights goes with --video": options.features and options.image_weights,
        "--duration is above 0, of one file of --features, in place of --fps": options.duration is not None
        and (len(options.features or ()) != 1 or options.fps is not None or not options.duration > 0),
        "--test-config is a data set, without --vocabulary and own videos": options.test_config
        and (sources or options.vocabulary),
        "--top must be at least 1": options.top is not None and options.top < 1,
    }
    for message, wrong in problems.items():
        if wrong:
            parser.error(message)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)

    from stale.run_folder import RunFolder

    run = RunFolder(options.run)
    if not (options.video or options.features):
        run.load_config()  # its errors come before torch is imported

    from stale.api import infer
    from stale.distributed import process_group, world_size

    with process_group():
        if not (options.video or options.features):
            vocabulary = options.vocabulary or "unseen"
            infer(
                run,
                options.checkpoint,
                vocabulary,
                options.device,
                oracle=options.oracle,
                embeddings=options.classes_embeddings,
                test_config=options.test_config,
                curves=options.curves,
            )
        elif world_size() > 1:
            raise StaleError("--video and --features are the work of one process: start it without torchrun")
        else:
            detect_own_videos(options)


def detect_own_videos(options: argparse.Namespace) -> None:
    """Detect in ``--video`` or ``--features``, write the files and name what is broken."""
    from stale.api import load
    from stale.data.classes import parse_classes, read_classes
    from stale.data.features import SUFFIXES
    from stale.detection.writers import OutputFiles, write_detections
    from stale.io import file_name
    from stale.video.frames import find_videos

    classes = parse_classes(options.classes) if options.classes else []
    if options.classes_file:
        classes = read_classes(options.classes_file)
    detector = load(options.run, options.checkpoint, options.device)
    text = {"templates": options.template or (), "embeddings": options.classes_embeddings}
    if options.video:
        videos = find_videos(options.video)
        fps, weights = 5.0 if options.fps is None else options.fps, options.image_weights
        found = detector.detect_videos(videos, classes, fps, image_weights=weights, **text)
        single = len(videos) == 1
    else:
        found = detector.detect_stored(options.features, classes, options.fps, options.duration, **text)
        single = len(options.features) == 1 and options.features[0].suffix in SUFFIXES
    name = file_name((options.video or options.features)[0].resolve().stem)

    def place(kind: str, suffix: str, many: bool = False) -> Path | None:
        """Where a kind of file goes: as the option says, in runs/NAME, or nowhere."""
        given = getattr(options, kind)
        default = Path("runs") / name / ("" if many and not single else f"{name}{suffix}")
        return default if given == Path() else given

    picture = place("picture", ".png", many=True)
    if picture is not None and single and picture.suffix not in PICTURES:
        raise StaleError(f"--picture {picture}: end the name in {', '.join(PICTURES)}")
    files = OutputFiles(
        results=options.output or Path("runs") / name / f"{name}.detections.json",
        csv=place("csv", ".csv"),
        vtt=place("vtt", ".vtt", many=True),
        picture=picture,
        single=single,
        top=options.top or 10,
        min_score=options.min_score or 0.0,
    )
    made_by = {
        "run": printable(str(options.run)),
        "checkpoint": printable(options.checkpoint),
        "classes": {item.label: item.phrases for item in classes},
        "templates": list(options.template or ()),
        "class_embeddings": options.classes_embeddings,
    }
    results, broken = write_detections(found, files, made_by)
    if results:
        print(f"\n{sum(map(len, results.values()))} detections in {counted(len(results), 'video')}; written:")
        for path in filter(None, (files.results, files.csv, files.vtt, files.picture)):
            print(f"  {printable(str(path))}")
    for video, reason in broken.items():
        print(f"broken: {video}: {reason}", file=sys.stderr)
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
