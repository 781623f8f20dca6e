"""Train STALE on the seen classes of a data set.

    python train.py --config configs/thumos14.yaml --set data.split=3 --output runs/thumos14_3
    python train.py --config configs/thumos14.yaml --set data.split=3 --output runs/thumos14_3 --resume

Writes into the output folder: config.yaml (resolved), split.json, log.txt, history.jsonl, checkpoints/best.pt and
last.pt, tensorboard/ where it is installed. Settings and their defaults: stale/config.py.
"""

from __future__ import annotations

import argparse

from stale.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="YAML files; later ones win")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", dest="assignments"
    )
    parser.add_argument("--output", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on where the run in the output folder stopped")
    arguments = parser.parse_args()

    from stale.config import load_config  # after parsing: --help and a typo in the arguments answer at once
    from stale.training.trainer import train

    train(load_config(arguments.config, arguments.assignments), arguments.output, arguments.resume)


if __name__ == "__main__":
    run_command(main)
