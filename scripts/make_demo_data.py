"""Make the synthetic data set of the demo: annotations.json, features.h5 and text_tower.pt.

    python scripts/make_demo_data.py                         # into data/demo
    python scripts/make_demo_data.py --output FOLDER --seed 7

The same seed gives the same files, byte for byte on one machine. What they are made of: stale/data/synthetic.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from stale.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/demo"), metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from stale.data.synthetic import CLASSES, Recipe, write_synthetic  # after parsing: --help answers at once

    videos, paths = write_synthetic(arguments.output, Recipe(seed=arguments.seed))
    instances = sum(len(video.instances) for video in videos)
    print(f"{len(videos)} synthetic videos, {instances} instances of {len(CLASSES)} classes:")
    for path in paths.values():
        print(f"  {path}")


if __name__ == "__main__":
    run_command(main)
