"""Make simulated features over real annotations, to rehearse a run at full size before the real features are there.

    python scripts/simulate_features.py --annotations data/activitynet/activity_net.v1-3.json --text-weights ViT-B/16
    python scripts/simulate_features.py --annotations FILE --text-weights FILE --rate 10 --output NAME_simulated.h5

Writes an HDF5 file with 100 snippets a video (--snippets), or so many a second (--rate), in the joint space of the text
tower. Results on them say how long a run takes and whether it is correct, nothing about the data set: the file says
that it is simulated, and its name must say so too. What the features are made of: stale/preparation/simulate.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from stale.errors import run_command

STRENGTHS = {
    "common": "what all image features share",
    "gap": "between the modalities: 0 none, 1 at right angles",
    "video": "a video's own direction",
    "inside": "the class inside its instances",
    "outside": "the class in the rest of its video",
    "confusion": "each of all classes, in every video",
    "noise": "noise that drifts",
    "smoothness": "seconds that the drift remembers",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, metavar="FILE")
    parser.add_argument("--text-weights", required=True, metavar="FILE", help="or a CLIP model such as ViT-B/16")
    parser.add_argument("--output", metavar="FILE", help="default: features_simulated.h5 beside the annotations")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--snippets", type=int, metavar="T", help="of every video (one packed block); default 100")
    length.add_argument("--rate", type=float, help="snippets a second (a dataset a video)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all-videos", action="store_true", help="also those without a segment")
    for name, meaning in STRENGTHS.items():
        parser.add_argument(f"--{name}", type=float, metavar="X", help=meaning)
    options = parser.parse_args(arguments)
    if (options.snippets is not None and options.snippets < 1) or (options.rate is not None and not options.rate > 0):
        parser.error("--snippets and --rate must be above 0")
    if options.seed < 0:
        parser.error("--seed must be at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    from stale.preparation.simulate import Grid, Strengths, simulate  # after parsing: --help answers at once

    given = {name: getattr(options, name) for name in STRENGTHS if getattr(options, name) is not None}
    grid = Grid(rate=options.rate) if options.rate else Grid(count=options.snippets or 100)
    output = options.output or Path(options.annotations).with_name("features_simulated.h5")
    found = simulate(
        options.annotations, options.text_weights, output, grid, Strengths(**given), options.seed, options.all_videos
    )
    print(f"{output}: SIMULATED features")
    for name, value in found.items():
        print(f"  {name:<32}{value:6.3f}")


if __name__ == "__main__":
    run_command(main)
