"""Draw one video's timeline: ground truth, detections, foreground mask and snippet scores.

    python scripts/plot_video.py --run runs/demo --video demo_0336 --output timeline.png
    python scripts/plot_video.py --run runs/demo --video demo_0336 --vocabulary all --output timeline.pdf

The trained model is run on the video; no detections need to have been written. Any annotated video will do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from stale.errors import StaleError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="folder that train.py wrote")
    parser.add_argument("--video", required=True, metavar="ID")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), default="unseen", help="classes to detect")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE")
    parser.add_argument("--top", type=int, default=10, help="detections to draw")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="png, pdf or svg")
    arguments = parser.parse_args()
    if arguments.output.suffix not in (".png", ".pdf", ".svg"):
        raise StaleError(f"--output {arguments.output}: end the name in .png, .pdf or .svg")

    import stale  # after parsing: --help answers at once
    from stale.detection.explain import explain
    from stale.run import RunFolder

    seen = explain(RunFolder(arguments.run), arguments.video, arguments.vocabulary, arguments.checkpoint)
    stale.plot(seen, arguments.output, arguments.top, f"{seen.video.id}, {arguments.vocabulary} classes")
    print(arguments.output)


if __name__ == "__main__":
    run_command(main)
