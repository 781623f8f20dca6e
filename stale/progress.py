"""Progress of long work on stderr: a bar on a terminal, and elsewhere, as in a log file, a plain line a minute."""

import sys
import time
from typing import Any

from tqdm import tqdm

_INTERVAL = 60.0  # seconds


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A ``tqdm`` of the same arguments."""
    form: dict[str, Any] = {"dynamic_ncols": True} if sys.stderr.isatty() else {"file": _Lines(), "ncols": 0}
    return tqdm(*arguments, **options, **form)


class _Lines:
    """Takes all that a bar writes, and passes on a line a minute."""

    def __init__(self) -> None:
        self._due = time.monotonic() + _INTERVAL

    def write(self, text: str) -> None:
        if text.strip() and time.monotonic() >= self._due:
            self._due = time.monotonic() + _INTERVAL
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()
