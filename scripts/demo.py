"""Run the whole system on synthetic data: make the data, train, detect, evaluate, draw, diagnose. Minutes on a CPU.

    make demo
    python scripts/demo.py          # the same, in your own environment

Each step is one of the project's commands and is printed before it runs. Writes data/demo and runs/demo. An earlier
demo in runs/demo is replaced; a run that the demo did not make is left alone.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stale.commands import CommandParser
from stale.errors import StaleError, run_command
from stale.evaluation.tables import ROW_NAMES
from stale.io import read_json, write_text
from stale.run_folder import BASELINES, RunFolder

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("runs/demo")
MARK = "MADE_BY_DEMO"


def main() -> None:
    """Run the command."""
    CommandParser(description=__doc__).parse_args()
    started = time.perf_counter()
    clear(ROOT / RUN)
    step("scripts/make_demo_data.py")
    step("train.py", "--config", "configs/demo.yaml", "--output", str(RUN))
    for vocabulary in ("unseen", "seen"):
        step("inference.py", "--run", str(RUN), "--vocabulary", vocabulary, "--curves")
        step("eval.py", "--run", str(RUN), "--vocabulary", vocabulary)
    run = RunFolder(ROOT / RUN)
    unseen, seen = (read_json(run.metrics(vocabulary), "metrics file") for vocabulary in ("unseen", "seen"))
    video = busiest_video(read_json(run.detections("unseen"), "detections file"))
    picture = RUN / f"{video}.png"
    step("scripts/plot_video.py", "--run", str(RUN), "--video", video, "--output", str(picture))
    step("scripts/diagnose.py", "--run", str(RUN))
    step("scripts/report.py", str(RUN))
    print(f"\n{table(seen, unseen)}\n\n{written_files(picture)}\n")
    print(f"The demo took {(time.perf_counter() - started) / 60:.1f} minutes.")


def clear(run: Path) -> None:
    """Make an empty run folder with the demo's mark.

    Raises:
        StaleError: the folder exists and the demo did not make it.
    """
    if run.exists():
        if not (run / MARK).is_file():
            raise StaleError(f"{run} was not made by the demo; move it, because the demo writes there")
        shutil.rmtree(run)
    write_text(run / MARK, "The demo replaces this folder each time it runs.\n")


def step(script: str, *arguments: str) -> None:
    """Run one of the project's commands; exit with its code if it fails."""
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, script, *arguments], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


def busiest_video(detections: dict[str, Any]) -> str:
    """Return the test video with the most instances of the classes under test."""
    protocol = detections["protocol"]
    database = read_json(ROOT / protocol["annotations"], "annotation file")["database"]

    def count(video: str) -> int:
        return sum(item["label"] in protocol["classes"] for item in database[video]["annotations"])

    return max(sorted(detections["results"]), key=count)


def table(seen: dict[str, Any], unseen: dict[str, Any]) -> str:
    """Format the average mAP of the model and of the training-free baselines, in per cent."""
    head = f"{'average mAP, %':<48}{'seen classes':>14}{'unseen classes':>16}"
    count = f"{'':<48}{seen['num_classes']:>14}{unseen['num_classes']:>16}"
    rows = {"STALE, trained on the seen classes": (seen, unseen)}
    rows.update({ROW_NAMES[row]: (seen["baselines"][row], unseen["baselines"][row]) for row in BASELINES})
    lines = [
        f"{name:<48}{100 * a['average_mAP']:>14.1f}{100 * b['average_mAP']:>16.1f}" for name, (a, b) in rows.items()
    ]
    rule = "-" * len(head)
    note = "Synthetic data: the results show that the system works, not how well it does on real videos."
    return "\n".join([head, count, rule, *lines, rule, note])


def written_files(picture: Path) -> str:
    """List the files that the demo wrote."""
    kinds = {
        "data": "data/demo/ (annotations.json, features.h5, text_encoder.pt)",
        "run": f"{RUN}/ (config.yaml, checkpoints/, history.jsonl, log.txt)",
        "detections": f"{RUN}/detections.json (unseen), {RUN}/detections_seen.json, {RUN}/baselines/",
        "metrics": f"{RUN}/metrics.json (unseen), {RUN}/metrics_seen.json",
        "diagnosis": f"{RUN}/diagnosis.json",
        "timeline": str(picture),
        "report": f"{RUN}/report/index.html (a page to open in a browser: results, errors, every video)",
    }
    return "\n".join(f"{kind:<12}{files}" for kind, files in kinds.items())


if __name__ == "__main__":
    run_command(main)
