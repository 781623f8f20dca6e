"""Running out of memory as one line that names the setting to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stale.errors import StaleError


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
