"""Diagnose a trained run: what each part of the model contributes on the test videos, and where its mAP is lost.

    python scripts/diagnose.py --run runs/demo                          # seen and unseen classes
    python scripts/diagnose.py --run runs/demo --vocabulary unseen --checkpoint last

Prints accuracy by features and text, quality of the masks L and M, the size of the adaptation, the change of the
weights, and the oracle factorial: the average mAP with ground truth in place of L, M and the video's labels, alone and
together. The same is written to RUN/diagnosis.json, as fractions. Nothing of it is a result: it uses ground truth.
"""

from collections.abc import Sequence
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="folder that train.py wrote")
    parser.add_argument("--vocabulary", nargs="+", choices=("seen", "unseen", "all"), help="default: seen and unseen")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE", help="weights of the run")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: the device of the training")
    options = parser.parse_args(arguments)

    from stale.api import load  # after parsing: --help answers at once
    from stale.detection.diagnosis import diagnose, report
    from stale.io import require_writable, write_json
    from stale.run_folder import RunFolder

    path = RunFolder(options.run).diagnosis
    require_writable(path)
    detector = load(options.run, options.checkpoint, options.device)
    # Other settings test one vocabulary only.
    default = ["unseen"] if detector.config.data.setting in ("seen_cv", "closed") else ["seen", "unseen"]
    tests = {name: detector.test_data(name) for name in dict.fromkeys(options.vocabulary or default)}
    found = diagnose(detector.config, detector.model, tests)
    about = {"checkpoint": options.checkpoint, "checkpoint_chosen_on": detector.chosen_on}
    write_json(path, {**about, **found}, indent=1)
    print(f"{report(found)}\n\n{path}")


if __name__ == "__main__":
    run_command(main)
