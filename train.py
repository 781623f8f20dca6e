"""Train STALE on the seen classes of a data set.

    python train.py --config configs/thumos14.yaml --set data.split=3 --output runs/thumos14_3
    python train.py --config configs/thumos14.yaml --set data.split=3 --output runs/thumos14_3 --resume

    torchrun --nproc_per_node=4 train.py --config configs/activitynet.yaml --output runs/anet_0    # four GPUs

Writes into the output folder: config.yaml (resolved), split.json, log.txt, history.jsonl, checkpoints/best.pt and
last.pt, tensorboard/ where it is installed. Settings and their defaults: stale/config.py. Ctrl-C and SIGTERM save
first; however a run was stopped, --resume ends with the weights of a run that was not.
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
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    arguments = parser.parse_args()
    if arguments.resume and arguments.overwrite:
        parser.error("--resume goes on with a run, --overwrite replaces it: give one of them")

    from stale.parallel import joined  # after parsing: --help and a typo in the arguments answer at once

    with joined():
        from stale.config import load_config
        from stale.training.trainer import train

        config = load_config(arguments.config, arguments.assignments)
        train(config, arguments.output, arguments.resume, arguments.overwrite)


if __name__ == "__main__":
    run_command(main)
