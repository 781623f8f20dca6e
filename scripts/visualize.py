"""Look at a run's test videos: a timeline each, and one HTML page to browse them.

    python scripts/visualize.py --run runs/thumos14_3                      # into RUN/pictures
    python scripts/visualize.py --run runs/thumos14_3 --vocabulary seen --pictures 0 --output seen/

index.html holds everything (no network, no other file): sort by AP, filter by class, open a video's timeline of ground
truth, detections, foreground mask and snippet scores; all of it by keyboard too. The pictures are PNGs of the same.
The trained model is run; no detections need to have been written.
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
    parser.add_argument("--run", required=True, type=Path, help="folder that train.py wrote")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), default="unseen")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: the device of the training")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default RUN/pictures")
    parser.add_argument("--pictures", type=int, metavar="N", help="PNGs of the first N videos only; default all")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N videos only")
    options = parser.parse_args(arguments)
    if (options.pictures or 0) < 0 or (options.limit is not None and options.limit < 1):
        parser.error("--pictures must be at least 0 and --limit at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)

    from stale.detection.library import Detector  # after parsing: --help answers at once
    from stale.detection.visualize import visualize

    detector = Detector(options.run, options.checkpoint, options.device)
    folder = options.output or options.run / "pictures"
    page, count = visualize(detector, folder, options.vocabulary, options.pictures, options.limit)
    print(f"{count} videos: {page}")


if __name__ == "__main__":
    run_command(main)
