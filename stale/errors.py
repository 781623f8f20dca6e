"""The one error that users see, and how the commands report it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

BAD_INPUT, INTERRUPTED, TERMINATED, NO_READER = 2, 130, 143, 141  # exit codes; a shell's own for signals
_MOST = 4000  # characters of an error line


class StaleError(Exception):
    """Bad input: one clear line that names the file, key or video and the mend."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as from a scheduler: it takes the same way out as Ctrl-C."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``: bad input and signals become one line on stderr and an exit code.

    2 for a :class:`StaleError` and for what the operating system refuses, 130 for Ctrl-C, 143 for SIGTERM. ``--debug``
    anywhere on the command line, which every command so understands, shows the traceback as well.
    """
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with _terminable():
            main()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as head, has gone: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(NO_READER) from None
    except (StaleError, OSError) as error:
        _leave(f"error: {_describe(error)}", BAD_INPUT, error if debug else None)
    except Terminated as error:
        _leave("terminated", TERMINATED, error if debug else None)
    except KeyboardInterrupt as error:
        _leave("interrupted", INTERRUPTED, error if debug else None)


def interruption(number: int) -> KeyboardInterrupt:
    """What a signal is as an exception."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def name_some(names: object, limit: int = 5) -> str:
    """``a, b, c and 7 more``: a list of offenders that stays one line."""
    items = [str(name) for name in names]  # type: ignore[attr-defined]
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def printable(text: str) -> str:
    """``text`` on one line that no terminal obeys: line ends, escape codes and half characters are spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` inside."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    former = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _leave(line: str, code: int, shown: BaseException | None) -> None:
    if shown is not None:
        shown.__suppress_context__ = False  # the fault behind it is what a debugger wants
        traceback.print_exception(shown)
    line = printable(line)
    if len(line) > _MOST:  # what is quoted is long; what is wrong with it stands before and behind
        line = f"{line[: _MOST // 2]} … {line[-_MOST // 2 :]}"
    sys.stderr.write(line + "\n")
    raise SystemExit(code) from None
