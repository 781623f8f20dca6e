"""Files that are never seen half-written, and JSON whose faults are reported in one line."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stale.errors import StaleError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes ``path``'s place only if the block succeeds."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise StaleError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise StaleError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write ``value`` as JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_text(path: str | Path, what: str) -> str:
    """The text of ``path`` (gzip understood by its first bytes); ``what`` names it in errors.

    Raises:
        StaleError: the file is missing, unreadable or not UTF-8 text.
    """
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise StaleError(f"{what} not found: {path}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise StaleError(f"{what} cannot be read: {path}: {error}") from error


def read_json(path: str | Path, what: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The JSON value in ``path``; ``what`` names the file in errors.

    Raises:
        StaleError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(read_text(path, what), object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number of thousands of digits
        raise StaleError(f"{what} is not valid JSON: {path}: {error}") from error
