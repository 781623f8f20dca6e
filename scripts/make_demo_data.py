"""Make the synthetic data set of the demo: annotations.json, features.h5 and text_encoder.pt.

    python scripts/make_demo_data.py                         # into data/demo
    python scripts/make_demo_data.py --profile short         # short videos of many classes, into data/demo_short
    python scripts/make_demo_data.py --output FOLDER --seed 7

The same seed gives the same files, byte for byte on one machine. What they are made of: scripts/synthetic_data.
"""

from pathlib import Path

from stale.commands import CommandParser
from stale.errors import run_command


def main() -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--profile", choices=("long", "short"), default="long", help="default: long, the demo's")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: data/demo, data/demo_short")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    options = parser.parse_args()
    if options.seed < 0:
        parser.error("--seed must be at least 0")

    from synthetic_data import CLASSES, write_synthetic  # after parsing: --help answers at once

    output = options.output or Path("data/demo" if options.profile == "long" else "data/demo_short")
    videos = write_synthetic(output, options.seed, profile=options.profile)
    instances = sum(len(video.instances) for video in videos)
    print(f"{output}: {len(videos)} synthetic videos, {instances} instances of {len(CLASSES)} classes")


if __name__ == "__main__":
    run_command(main)
