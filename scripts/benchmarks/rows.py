"""What all benches share: rows, clocks, the check that both sides agree, the table."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from stale.evaluation.report import text_table

Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of the plain reference (or of an allowance) and of ours, and at what size."""

    name: str
    reference_seconds: float
    seconds: float
    size: str

    @property
    def ratio(self) -> float:
        """How many times faster than the reference."""
        return self.reference_seconds / self.seconds


Clock = Callable[[], float]


def clock_of(device: torch.device) -> Clock:
    """What ``device`` is timed with, in seconds: on a GPU a clock that waits for what it was given to do.

    On a CPU with one thread the time of the process, which others on the same machine disturb less; with several the
    time on the wall.
    """
    if device.type != "cuda":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def timed(function: Callable[[], Result], clock: Clock) -> tuple[float, Result]:
    """Seconds of one call, and what it returned: for work that takes long enough to be timed once."""
    start = clock()
    result = function()
    return clock() - start, result


def best_of(function: Callable[[], object], repeats: int, clock: Clock) -> float:
    """The least of some times, in seconds: the one that others disturbed least."""
    return min(timed(function, clock)[0] for _ in range(repeats))


def require_equal(what: str, ours: Any, reference: Any, tolerance: float = 0.0) -> None:
    """Stop unless two arrays (or numbers) differ by at most ``tolerance`` times the reference's largest value.

    Raises:
        AssertionError: they differ by more, or in shape.
    """
    ours, reference = (np.asarray(value, dtype=np.float64) for value in (ours, reference))
    if ours.shape != reference.shape:
        raise AssertionError(f"{what}: shapes {ours.shape} and {reference.shape} differ")
    difference = np.abs(ours - reference).max(initial=0.0)
    allowed = tolerance * np.abs(reference).max(initial=0.0)
    if not difference <= allowed:
        raise AssertionError(f"{what}: ours and the reference differ by {difference:.3g}, allowed are {allowed:.3g}")


def table(rows: Sequence[Row]) -> str:
    """All rows with the machine above them."""
    cells = [
        [row.name, f"{row.reference_seconds:.4g}", f"{row.seconds:.4g}", f"{row.ratio:.1f}", row.size] for row in rows
    ]
    return text_table(machine(), ["bench", "reference s", "ours s", "ratio", "size"], cells)


def machine() -> str:
    """Processor, GPU, threads, versions, and by which clock, in a line."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    clock = "1 thread, CPU seconds" if threads == 1 else f"{threads} threads, seconds on the wall"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{_processor()}{gpu}, {clock}, {versions}"


def _processor() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
