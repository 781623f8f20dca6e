"""Train STALE on the seen classes of a data set.

    python train.py --config configs/thumos14.yaml --output runs/thumos14
    python train.py --config configs/thumos14.yaml --output runs/thumos14 --resume
    python train.py --config configs/thumos14.yaml --set data.split=3 --output runs/3
    torchrun --nproc_per_node=4 train.py --config FILE --output RUN    # four GPUs
    python train.py --settings                                     # all settings

Writes into the output folder: config.yaml (resolved), split.json, log.txt, history.jsonl, curves.png, model_card.md,
checkpoints/last.pt and best.pt after each epoch, tensorboard/ if it is installed. A run that was stopped, by Ctrl-C,
SIGTERM or a failure, continues after its last finished epoch with --resume, and ends with the weights of a run that was
not stopped.
"""

from stale.commands import CommandParser, add_set
from stale.config import load_config, settings_table
from stale.errors import run_command


def main() -> None:
    parser = CommandParser(description=__doc__)
    configuration = parser.add_argument_group("configuration")
    configuration.add_argument("--config", nargs="+", default=[], metavar="FILE", help="YAML files; later ones win")
    add_set(configuration, "single settings as section.key=value, which win over all files")
    configuration.add_argument("--settings", action="store_true", help="print every setting with default and range")
    run = parser.add_argument_group("run folder")
    run.add_argument("--output", metavar="RUN", help="folder of the run, required for training")
    run.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    run.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    arguments = parser.parse_args()
    if arguments.settings:
        print(settings_table(), end="")
        return
    if arguments.output is None:
        parser.error("the following arguments are required: --output")
    if arguments.resume and arguments.overwrite:
        parser.error("--resume continues a run, --overwrite replaces it: give one of them")
    config = load_config(arguments.config, arguments.assignments)

    from stale.distributed import process_group  # imports torch: errors in arguments and settings come before

    with process_group():
        from stale.training.trainer import train

        train(config, arguments.output, arguments.resume, arguments.overwrite)


if __name__ == "__main__":
    run_command(main)
