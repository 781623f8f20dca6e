"""Compressed files from strangers: read in memory within limits, never unpacked to disk."""

from __future__ import annotations

import gzip
import re
import stat
import zipfile
import zlib
from pathlib import Path

from stale.errors import StaleError, name_some

MAX_ENTRIES = 20_000
MAX_MEMBER = 8 << 20  # bytes of one unpacked member; the largest text file wanted has a tenth of a megabyte
MAX_TOTAL = 64 << 20  # bytes of all members that are read
MAX_JSON = 512 << 20  # bytes of an unpacked annotation file; ActivityNet's has 11 MB with all its addresses


def read_members(path: str | Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """The members of a zip archive whose whole name matches ``wanted``, by name.

    Sizes are judged by the archive's directory before anything is unpacked, and again while unpacking, for a directory
    may lie. Files that macOS adds are passed over.

    Raises:
        StaleError: not a zip archive, damaged, or hostile: a name that leaves the folder, a link, a size beyond the
            limits, too many entries.
    """
    where = f"archive {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _refuse_hostile(entries, where)
            chosen = [entry for entry in entries if _is_wanted(entry, wanted)]
            _refuse_large(chosen, where)
            return {entry.filename: _read(archive, entry, where) for entry in chosen}
    except FileNotFoundError:
        raise StaleError(f"{where}: not found") from None
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise StaleError(f"{where} cannot be read: {error}; fetch it again") from None


def refuse_gzip_bomb(path: str | Path, limit: int = MAX_JSON) -> None:
    """Stop before a gzipped file is unpacked that has more than ``limit`` bytes; memory stays at a block.

    Raises:
        StaleError: the file is larger, or damaged.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return
    try:
        with gzip.open(path) as file:
            size = 0
            while block := file.read(1 << 20):
                size += len(block)
                if size > limit:
                    raise StaleError(f"{path} unpacks to more than {limit >> 20} MB: refused")
    except (OSError, EOFError, zlib.error) as error:
        raise StaleError(f"{path} cannot be unpacked: {error}") from None


def _is_wanted(entry: zipfile.ZipInfo, wanted: re.Pattern[str]) -> bool:
    hidden = any(part == "__MACOSX" or part.startswith("._") for part in entry.filename.split("/"))
    return not entry.is_dir() and not hidden and wanted.fullmatch(entry.filename) is not None


def _refuse_hostile(entries: list[zipfile.ZipInfo], where: str) -> None:
    if len(entries) > MAX_ENTRIES:
        raise StaleError(f"{where}: {len(entries)} entries; more than {MAX_ENTRIES} are refused")
    outside = [entry.filename for entry in entries if _leaves_folder(entry.orig_filename)]
    if outside:
        raise StaleError(f"{where}: names that leave the folder, refused: {name_some(outside)}")
    links = [entry.filename for entry in entries if stat.S_ISLNK(entry.external_attr >> 16)]
    if links:
        raise StaleError(f"{where}: links, refused: {name_some(links)}")


def _leaves_folder(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name


def _refuse_large(entries: list[zipfile.ZipInfo], where: str) -> None:
    for entry in entries:
        if entry.file_size > MAX_MEMBER:
            raise StaleError(f"{where}: {entry.filename} unpacks to {entry.file_size:,} bytes: refused")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_TOTAL:
        raise StaleError(f"{where}: its members unpack to {total:,} bytes: refused")


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str) -> bytes:
    with archive.open(entry) as member:
        content = member.read(entry.file_size + 1)  # to the end, so that the checksum is compared
    if len(content) != entry.file_size:
        raise StaleError(f"{where}: {entry.filename} is not as large as the archive says: refused")
    return content
