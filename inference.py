"""Detect actions with a trained run.

    python inference.py --run runs/thumos14_3                       # the unseen classes, in the test subset
    python inference.py --run runs/thumos14_3 --vocabulary seen     # the seen classes: detections_seen.json

Writes RUN/detections.json (ActivityNet results JSON), and the untrained rows' under RUN/untrained/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stale.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="folder that train.py wrote")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), default="unseen", help="classes to detect")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: the device of the training")
    arguments = parser.parse_args()

    from stale.detection.inference import infer  # after parsing: --help answers at once
    from stale.run import RunFolder

    infer(RunFolder(arguments.run), arguments.checkpoint, arguments.vocabulary, arguments.device)


if __name__ == "__main__":
    run_command(main)
