"""Progress of long work on stderr: a bar on a terminal, and elsewhere, as in a log file, a plain line a minute."""

import sys
from typing import Any

from tqdm import tqdm

_INTERVAL = 60  # seconds


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A ``tqdm`` of the same arguments."""
    if sys.stderr.isatty():
        return tqdm(*arguments, **options, dynamic_ncols=True)
    often = dict.fromkeys(("delay", "mininterval", "maxinterval"), _INTERVAL)
    return tqdm(*arguments, **options, **often, ncols=0, file=_Lines())


class _Lines:
    """Passes on what a bar writes as lines, which do not overwrite one another."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()
