"""The error that users see, and how commands report it: one line and an exit code."""

import atexit
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

BAD_INPUT, INTERRUPTED, TERMINATED, BROKEN_PIPE = 2, 130, 143, 141  # exit codes; of signals as a shell gives them
_MAX_LINE = 4000  # characters of an error line


class StaleError(Exception):
    """Bad input: one line that names the file, key or video and the fix."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it. It is handled as Ctrl-C is."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``; report errors and signals as a line and an exit code, with ``--debug`` a traceback."""
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may have characters that the terminal's encoding lacks
            # A line is one write, also by python -u as of torchrun, whose processes share a stream.
            stream.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)
    os.environ["MPLBACKEND"] = "agg"  # a notebook's would be inherited, and refused
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "true"  # looking for some takes as long as to load a configuration
    try:
        with _raise_terminated():
            main()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as head, has ended: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(BROKEN_PIPE) from None
    except (StaleError, OSError) as error:
        text = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        _report(f"error: {text}", error, debug)
    except KeyboardInterrupt as error:
        _report("terminated" if isinstance(error, Terminated) else "interrupted", error, debug)
    finally:
        # The work is over, and its exit code stays what it is.
        atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)])


def launched_together() -> bool:
    """Whether torchrun started this process as one of several."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"


def leave(error: BaseException) -> NoReturn:
    """End the process by the exit code of ``error``."""
    code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    code = code if isinstance(error, KeyboardInterrupt) else BAD_INPUT
    if launched_together():  # at once: destroying DDP and gloo can wait for a lost process
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code) from None


def name_some(names: Iterable[object], limit: int = 5) -> str:
    """``a, b, c and 7 more``: a list of names on one line."""
    words = (str(name) for name in names)
    items = [word if word == " ".join(word.split()) else repr(word) for word in words]  # blanks can be seen
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def counted(number: int, noun: str) -> str:
    """``1 video``, ``2 videos``, ``3 classes``."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def printable(text: str) -> str:
    """``text`` on one line without effect on a terminal: line ends, control characters and surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextmanager
def _raise_terminated() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` inside the block."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report(line: str, error: BaseException, debug: bool) -> None:
    if debug:
        error.__suppress_context__ = False  # whoever debugs wants the cause
        traceback.print_exception(error)
    line = printable(line)
    if len(line) > _MAX_LINE:  # a long quotation: what is wrong with it stands before and after it
        line = f"{line[: _MAX_LINE // 2]} … {line[-_MAX_LINE // 2 :]}"
    sys.stderr.write(line + "\n")
    leave(error)
