"""Draw one video's timeline: ground truth, detections, foreground mask and snippet scores.

    python scripts/plot_video.py --run runs/demo --video demo_0336 --output timeline.png
    python scripts/plot_video.py --run runs/demo --video demo_0336 --vocabulary all --output timeline.pdf

The trained model is run on the video; no detections need to have been written. Any annotated video will do.
"""

from collections.abc import Sequence
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import StaleError, counted, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="folder that train.py wrote")
    parser.add_argument("--video", required=True, metavar="ID", help="id of an annotated video")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), default="unseen", help="classes to detect")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE", help="weights of the run")
    parser.add_argument("--top", type=int, default=10, help="detections to draw")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="png, pdf or svg")
    options = parser.parse_args(arguments)
    if options.output.suffix not in (".png", ".pdf", ".svg"):
        raise StaleError(f"--output {options.output}: end the name in .png, .pdf or .svg")

    import stale  # after parsing: --help answers at once
    from stale.io import read_json
    from stale.run_folder import RunFolder

    detector = stale.load(options.run, options.checkpoint)
    found = detector.detect_annotated(options.video, options.vocabulary)
    title = (
        f"{found.video.id}: {options.run.resolve().name}, {counted(len(found.classes), options.vocabulary + ' class')}"
    )
    metrics = RunFolder(options.run).metrics(options.vocabulary)
    content = read_json(metrics, "metrics file") if metrics.is_file() else {"protocol": {}}
    if content["protocol"].get("checkpoint") == options.checkpoint and content["average_mAP"] is not None:
        title += f", average mAP {100 * content['average_mAP']:.1f} %"
    stale.plot(found, options.output, options.top, title)
    print(options.output)


if __name__ == "__main__":
    run_command(main)
