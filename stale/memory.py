"""How much memory is free, and running out of it as one line that names the setting to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stale.errors import StaleError


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on ``device``, and below what the system grants this process; None where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    amounts = [amount for amount in (_available(), _granted()) if amount is not None]
    return min(amounts, default=None)


@contextmanager
def names_knob(setting: str, value: int, advice: str = "") -> Iterator[None]:
    """Inside, what does not fit into memory is a :class:`StaleError` that says to lower ``setting``, now ``value``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        where = _which_memory(error)
        if where is None:
            raise
        raise StaleError(f"out of {where} memory: lower {setting} (now {value}){advice}") from error


def _which_memory(error: Exception) -> str | None:
    """The memory that ran out, None where that is not what happened."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "GPU"
    on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)  # a plain RuntimeError
    return "main" if on_cpu else None


def _available(table: Path = Path("/proc/meminfo")) -> int | None:
    """Of the whole machine, by Linux, which counts what it only caches as free."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _granted(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of the limit that a container or a scheduler set (Linux's control groups, version 2)."""
    try:
        group = root / own.read_text(encoding="utf-8").strip().rpartition("::/")[2]
        left = []
        for folder in (group, *group.parents):
            if (folder / "memory.max").is_file() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                left.append(int(limit) - int((folder / "memory.current").read_text()))
        return max(min(left), 0) if left else None
    except (OSError, ValueError):
        return None
