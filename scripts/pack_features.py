"""Check a data set's features and pack them into one folder, which loads in one go.

    python scripts/pack_features.py features/ packed --annotations activity_net.v1-3.json --snippets 100
    python scripts/pack_features.py clip.h5 packed --annotations thumos14.json --fps 30 --precision float32

Train on it with data.features=packed. With --snippets every video is rescaled to T, the data.num_snippets to train
with; without, its native rate is kept, and every T can be trained.
With --annotations exactly the annotated videos are packed, and their durations compared. Every problem is printed:
features that are missing, hold NaN, have another width or shape, are constant, are too large for half precision (all
left out), and features whose duration does not fit the annotation (packed). Exit code 1 if a video was left out.
"""

from collections.abc import Sequence
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of .npy, HDF5 file, or packed folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of features.npy and index.json")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="JSON in ActivityNet's layout")
    parser.add_argument("--subset", help="only this subset of the annotations")
    parser.add_argument("--snippets", type=int, metavar="T", help="rescale every video to T; default: the native rate")
    parser.add_argument("--precision", choices=("float16", "float32"), default="float16", help="of the copy")
    parser.add_argument("--fps", type=float, help="snippets a second, where the features do not record it")
    parser.add_argument("--id-pattern", default="{id}", metavar="TEXT", help="as data.id_pattern, such as {id}_clip")
    options = parser.parse_args(arguments)
    if options.snippets is not None and options.snippets < 2:
        parser.error("--snippets must be at least 2")
    if options.subset and not options.annotations:
        parser.error("--subset goes with --annotations")

    from data_preparation.pack import pack
    from stale.data.annotations import in_subset, read_annotations  # after parsing: --help answers at once
    from stale.data.features import open_features, recorded_number

    recorded_number(vars(options), "fps", "--fps")
    store, videos = open_features(options.source, options.id_pattern), None
    if options.annotations:
        videos = read_annotations(options.annotations)
        store.annotate(videos)
    if videos and options.subset:
        videos = {video.id: video for video in in_subset(videos.values(), options.subset)}
    settings = {"num_snippets": options.snippets, "precision": options.precision, "fps": options.fps}
    left_out, doubtful = pack(store, options.output, videos=videos, **settings)
    packed = open_features(options.output)
    print(f"{options.output}: {len(packed.ids):,} videos, {packed.width} wide, {options.precision}")
    for heading, problems in (("left out", left_out), ("packed", doubtful)):
        for video, problem in problems.items():
            print(f"{heading}: {video}: {problem}")
    if left_out:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
