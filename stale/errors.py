"""The one error that users see, and how the commands report it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class StaleError(Exception):
    """Bad input: one clear line that names the file, key or video and the mend."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``; a :class:`StaleError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except StaleError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None


def name_some(names: object, limit: int = 5) -> str:
    """``a, b, c and 7 more``: a list of offenders that stays one line."""
    items = [str(name) for name in names]  # type: ignore[attr-defined]
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
