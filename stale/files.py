"""Files that are never seen half-written, and JSON whose faults are reported in one line."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stale.errors import StaleError

HARMLESS = 64 << 20  # bytes that an unpacked file may have in any case
MAX_RATIO = 100  # and how many times its packed size beyond; JSON packs tenfold, a bomb a thousandfold

# Half of a UTF-16 pair: JSON can spell it, but it is no character and cannot be written or printed.
_HALF = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


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
        _onto_disk(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise StaleError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files that killed processes left beside ``path``; nothing may be writing there."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.{'?' * 8}{glob.escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)


def file_name(name: str) -> str:
    """A video's id as the stem of a file: it cannot leave its folder, hide, or be another's.

    Separators, control characters and what Windows forbids are spelt as in addresses; usual ids stay as they are.
    """

    def spell(character: str) -> str:
        return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))

    spelt = "".join(c if c.isprintable() and c not in '%/\\:*?"<>|' else spell(c) for c in name)
    return spell(".") + spelt[1:] if spelt.startswith(".") else spelt


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: str | Path, text: str) -> None:
    """Write ``text`` to the end of ``path``, in UTF-8; what a full disk cuts off is for the reader to pass over."""
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StaleError(f"cannot write {path}: {error.strerror or error}") from error


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
            raw = _unpack(raw, f"{what} {path}")
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
    text = read_text(path, what)
    if "\\ud" in text or "\\uD" in text:
        half = _HALF.search(text)
        if half:
            raise StaleError(f"{what} is not valid JSON: {path}: {half[0]} is half a character")
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number of thousands of digits
        raise StaleError(f"{what} is not valid JSON: {path}: {error}") from error


def refuse_zip_bomb(path: str | Path, what: str, ratio: int = MAX_RATIO) -> None:
    """Stop before a zip archive, as torch's files are, is unpacked to much more than it has; others pass.

    Raises:
        StaleError: its directory names more than ``ratio`` times its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return  # whoever reads it says what is wrong
    packed = Path(path).stat().st_size
    if unpacked > max(HARMLESS, ratio * packed):
        raise StaleError(f"{what} {path} unpacks from {packed:,} to {unpacked:,} bytes: refused")


def _unpack(raw: bytes, where: str) -> bytes:
    """Gunzip, no further than a file of honest text can go."""
    limit, parts, size = max(HARMLESS, MAX_RATIO * len(raw)), [], 0
    with gzip.open(io.BytesIO(raw)) as file:
        while part := file.read(1 << 20):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise StaleError(f"{where} unpacks to more than {limit >> 20} MB, {MAX_RATIO} times its size: refused")
    return b"".join(parts)


def _onto_disk(path: Path) -> None:
    """Without this a power cut soon after the exchange of names could leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
