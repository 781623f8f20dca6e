"""The whole system on synthetic data, in minutes on a CPU: make data, train, detect, evaluate, draw.

    make demo
    python scripts/demo.py          # the same, in an environment of your own

Every step is one of the project's commands and is printed as it could be typed. Writes data/demo and runs/demo; an
earlier demo's runs/demo is replaced, a run of anybody else's there is not touched.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from stale.errors import StaleError, run_command  # noqa: E402
from stale.evaluation.assess import ROW_NAMES  # noqa: E402
from stale.files import read_json, write_text  # noqa: E402
from stale.run import RunFolder  # noqa: E402

RUN = Path("runs/demo")
MARK = "MADE_BY_DEMO"
UNTRAINED = ("whole_video", "snippets")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.perf_counter()
    clear(ROOT / RUN)
    step("scripts/make_demo_data.py")
    step("train.py", "--config", "configs/demo.yaml", "--output", str(RUN))
    for vocabulary in ("unseen", "seen"):
        step("inference.py", "--run", str(RUN), "--vocabulary", vocabulary)
        step("eval.py", "--run", str(RUN), "--vocabulary", vocabulary)
    run = RunFolder(ROOT / RUN)
    unseen, seen = (read_json(run.metrics(vocabulary), "metrics file") for vocabulary in ("unseen", "seen"))
    video = busiest_video(read_json(run.detections("unseen"), "detections file"))
    picture = RUN / f"{video}.png"
    step("scripts/plot_video.py", "--run", str(RUN), "--video", video, "--output", str(picture))
    print(f"\n{table(seen, unseen)}\n\n{places(picture)}\n\n{(time.perf_counter() - started) / 60:.1f} minutes")


def clear(run: Path) -> None:
    """Make an empty, marked run folder.

    Raises:
        StaleError: something lies there that no demo made.
    """
    if run.exists():
        if not (run / MARK).is_file():
            raise StaleError(f"{run} was not made by the demo: move it away, the demo writes there")
        shutil.rmtree(run)
    write_text(run / MARK, "The demo replaces this folder each time it runs.\n")


def step(script: str, *arguments: str) -> None:
    """Run one command of the project in its root; stop with its exit code if it fails."""
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, script, *arguments], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


def busiest_video(detections: dict[str, Any]) -> str:
    """The test video with most instances of the classes under test; of equals the first."""
    protocol = detections["protocol"]
    database = read_json(ROOT / protocol["annotations"], "annotation file")["database"]

    def count(video: str) -> int:
        return sum(item["label"] in protocol["classes"] for item in database[video]["annotations"])

    return max(sorted(detections["results"]), key=count)


def table(seen: dict[str, Any], unseen: dict[str, Any]) -> str:
    """Average mAP of the model and of the untrained rows, in per cent."""
    head = f"{'average mAP, %':<48}{'seen classes':>14}{'unseen classes':>16}"
    count = f"{'':<48}{seen['num_classes']:>14}{unseen['num_classes']:>16}"
    rows = {"STALE, trained on the seen classes": (seen, unseen)}
    rows.update({ROW_NAMES[row]: (seen["untrained"][row], unseen["untrained"][row]) for row in UNTRAINED})
    lines = [
        f"{name:<48}{100 * a['average_mAP']:>14.1f}{100 * b['average_mAP']:>16.1f}" for name, (a, b) in rows.items()
    ]
    rule = "-" * len(head)
    note = "Synthetic data: the figures show that the system works, not how well it does on videos."
    return "\n".join([head, count, rule, *lines, rule, note])


def places(picture: Path) -> str:
    """What lies where."""
    kinds = {
        "data": "data/demo/ (annotations.json, features.h5, text_tower.pt)",
        "run": f"{RUN}/ (config.yaml, checkpoints/, history.jsonl, log.txt)",
        "detections": f"{RUN}/detections.json (unseen), {RUN}/detections_seen.json, {RUN}/untrained/",
        "metrics": f"{RUN}/metrics.json (unseen), {RUN}/metrics_seen.json",
        "timeline": str(picture),
    }
    return "\n".join(f"{kind:<12}{place}" for kind, place in kinds.items())


if __name__ == "__main__":
    run_command(main)
