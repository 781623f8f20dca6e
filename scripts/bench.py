"""Measure the fast paths against their obvious forms, both in one run.

    python scripts/bench.py eval                  print the table
    python scripts/bench.py eval --json OUT       also write its rows as JSON
    python scripts/bench.py eval --scale 0.05     a smaller copy of every size, for a quick look

Each bench is a function that takes the scale and gives rows; ``BENCHES`` names them. Set OMP_NUM_THREADS=1 for
figures of one core.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stale.errors import run_command  # noqa: E402
from stale.evaluation import Detections, GroundTruth, evaluate  # noqa: E402
from stale.evaluation.report import text_table  # noqa: E402
from stale.files import write_json  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of the obvious form (or of the allowance) and of ours, and at what size."""

    name: str
    reference_seconds: float
    seconds: float
    size: str

    @property
    def ratio(self) -> float:
        """How many times faster than the reference."""
        return self.reference_seconds / self.seconds


def best_of(function: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least of some times, in seconds: the one that others disturbed least.

    Args:
        clock: wall clock, or ``time.process_time`` for work of one thread, so that a busy machine matters less.
    """
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def bench_eval(scale: float) -> list[Row]:
    """The evaluator against the loop form, and its growth from one size to ten times that. CPU seconds."""
    tious = np.linspace(0.5, 0.95, 10)
    num_videos = max(int(4728 * scale), 20)
    truth, found = random_case(num_videos)
    seconds = best_of(lambda: evaluate(truth, found, tious), 7, time.process_time)
    start = time.process_time()
    expected = loop_form(truth, found, tious)
    loop_seconds = time.process_time() - start
    difference = np.nanmax(np.abs(expected - evaluate(truth, found, tious).ap))
    if difference > 1e-9:
        raise AssertionError(f"the two forms differ by {difference}")
    large = random_case(10 * num_videos)
    large_seconds = best_of(lambda: evaluate(*large, tious), 5, time.process_time)
    count = len(found)
    allowance = seconds * 10 * math.log(10 * count) / math.log(count)
    return [
        Row("eval: mAP against the loop form", loop_seconds, seconds, _size(truth, found, tious)),
        Row("eval: 10 times the size against n log n", allowance, large_seconds, _size(*large, tious)),
    ]


def random_case(
    num_videos: int, num_classes: int = 200, a_video: int = 100, seed: int = 0
) -> tuple[GroundTruth, Detections]:
    """Videos of one class with one to three instances, and detections about them, half of the right class."""
    rng = np.random.default_rng(seed)
    duration = rng.uniform(30.0, 240.0, num_videos)
    video_class = rng.integers(0, num_classes, num_videos)
    video = np.repeat(np.arange(num_videos), rng.choice([1, 2, 3], num_videos, p=[0.6, 0.3, 0.1]))
    segments = np.sort(rng.random((len(video), 2)), axis=1) * duration[video, None]
    names = tuple(f"video {i}" for i in range(num_videos)), tuple(f"class {i}" for i in range(num_classes))
    truth = GroundTruth(*names, duration, video, video_class[video], segments)
    owner = np.repeat(np.arange(num_videos), a_video)
    right = rng.random(len(owner)) < 0.5
    label = np.where(right, video_class[owner], rng.integers(0, num_classes, len(owner)))
    first_instance = np.searchsorted(video, owner)
    near = segments[first_instance] + rng.normal(0.0, 5.0, (len(owner), 2))
    far = rng.random((len(owner), 2)) * duration[owner, None]
    found = np.sort(np.where(rng.random((len(owner), 1)) < 0.3, near, far), axis=1)
    return truth, Detections(owner, label, found, rng.random(len(owner)))


def loop_form(truth: GroundTruth, found: Detections, tious: np.ndarray) -> np.ndarray:
    """AP (R, K) by the definition, one detection, threshold and instance after another, over pandas tables."""
    import pandas as pd

    columns = ["start", "end"]
    true = pd.DataFrame(truth.segments, columns=columns).assign(video=truth.video, label=truth.label)
    detected = pd.DataFrame(found.segments, columns=columns)
    detected = detected.assign(video=found.video, label=found.label, score=found.scores)
    table = np.full((len(tious), len(truth.classes)), np.nan)
    found_of_class = detected.groupby("label")
    for label, of_class in true.groupby("label"):
        of_class = of_class.reset_index(drop=True)
        if label in found_of_class.groups:
            table[:, label] = _loop_over_class(of_class, found_of_class.get_group(label), tious)
        else:
            table[:, label] = 0.0
    return table


def _loop_over_class(true, detected, tious: np.ndarray) -> list[float]:
    """AP at each threshold (R) of one class, from its two tables."""
    ranked = detected.iloc[np.argsort(detected["score"].to_numpy(), kind="stable")[::-1]].reset_index(drop=True)
    by_video = true.groupby("video")
    taken = np.zeros((len(tious), len(true)), dtype=bool)
    correct = np.zeros((len(tious), len(ranked)), dtype=bool)
    for place, row in ranked.iterrows():
        try:
            here = by_video.get_group(row["video"])
        except KeyError:
            continue
        overlaps = _tious_with(row, here)
        preference = np.argsort(overlaps, kind="stable")[::-1]
        for threshold, least in enumerate(tious):
            for choice in preference:
                instance = here.index[choice]
                if overlaps[choice] < least:
                    break
                if not taken[threshold, instance]:
                    taken[threshold, instance] = correct[threshold, place] = True
                    break
    return [_area(of_threshold, len(true)) for of_threshold in correct]


def _tious_with(row, here) -> np.ndarray:
    shared = np.minimum(row["end"], here["end"]) - np.maximum(row["start"], here["start"])
    shared = shared.to_numpy().clip(0)
    return shared / ((here["end"] - here["start"]).to_numpy() + (row["end"] - row["start"]) - shared)


def _area(correct: np.ndarray, num_instances: int) -> float:
    precision = np.cumsum(correct) / np.arange(1, len(correct) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[correct].sum() / num_instances)


def _size(truth: GroundTruth, found: Detections, tious: np.ndarray) -> str:
    sizes = (len(truth.videos), "videos"), (len(found), "detections"), (len(truth.classes), "classes")
    return ", ".join(f"{count:,} {what}" for count, what in sizes) + f", {len(tious)} tIoUs"


BENCHES: dict[str, Callable[[float], list[Row]]] = {"eval": bench_eval}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benches named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="+", choices=sorted(BENCHES))
    parser.add_argument("--json", metavar="OUT", help="write the rows as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the problems; 1 is the stated one")
    options = parser.parse_args(arguments)
    rows = [row for name in options.benches for row in BENCHES[name](options.scale)]
    cells = [
        [row.name, f"{row.reference_seconds:.3f}", f"{row.seconds:.3f}", f"{row.ratio:.1f}", row.size] for row in rows
    ]
    machine = f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    print(text_table(machine, ["bench", "reference s", "ours s", "ratio", "size"], cells))
    if options.json:
        write_json(options.json, [{**asdict(row), "ratio": row.ratio} for row in rows], indent=1)


if __name__ == "__main__":
    run_command(main)
