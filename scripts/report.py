"""Write the report page of a run, or of two side by side: results, errors, and the timeline of every video.

    python scripts/report.py runs/a                   # runs/a/report/index.html
    python scripts/report.py runs/a --videos clips    # a click on a bar plays it
    python scripts/report.py runs/a runs/b            # with paired differences

The runs have detections: inference.py --run RUN, with --curves also foreground and scores for the timelines.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import run_command

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of eval.py


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that inference.py wrote into")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), default="unseen", help="default unseen")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="video files, named by their ids, to play")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default RUN/report, of the first run")
    options = parser.parse_args(arguments)
    if len(options.runs) > 2:
        parser.error("one run, or two to compare")

    from eval import evaluate_run, parse_arguments  # after parsing: --help answers at once
    from stale.reports import Subject, write_report
    from stale.run_folder import RunFolder

    tested = (parse_arguments(["--run", str(run), "--vocabulary", options.vocabulary]) for run in options.runs)
    subjects = [Subject(run, evaluate_run(each)[0]) for run, each in zip(options.runs, tested, strict=True)]
    print(write_report(subjects, options.output or RunFolder(options.runs[0]).report.parent, options.videos))


if __name__ == "__main__":
    run_command(main)
