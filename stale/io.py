"""Atomic writing of files, and loading of text and JSON with errors in one line."""

import errno
import gc
import glob
import gzip
import io
import json
import os
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import Any

from stale.errors import StaleError, name_some

MAX_TEXT = 1 << 30  # bytes
HARMLESS = 64 << 20  # bytes that an unpacked file may always have
MAX_RATIO = 100  # limit of unpacked to packed size beyond: JSON has 10, a decompression bomb 1000


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block succeeds; a StaleError if the system refuses."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut after the replacement could leave an empty file
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise StaleError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(path: str | Path) -> None:
    """Raise a StaleError if a file could not be written to ``path``. Nothing is left behind."""
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StaleError(f"cannot write {path}: {error.strerror or error}") from error


def remove_leftovers(path: str | Path) -> None:
    """Remove temporary files that killed processes left beside ``path``. No process may be writing there."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.{'?' * 8}{glob.escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)


def file_name(name: str) -> str:
    """The stem of a file for the video id ``name``. Different ids have different stems, and none leaves its folder."""

    def encode(character: str) -> str:
        return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))

    encoded = "".join(c if c.isprintable() and c not in '%/\\:*?"<>|' else encode(c) for c in name)
    return encode(".") + encoded[1:] if encoded.startswith(".") else encoded


def clean_name(name: str) -> str:
    """A name in Unicode's composed form, without blanks around it and with single ones; a StaleError if not UTF-8."""
    if not name.isascii() and name != name.encode(errors="replace").decode():
        raise StaleError(f"the name {name!r} is not UTF-8: rename it")
    return " ".join(unicodedata.normalize("NFC", name).split())


def clean_ids(names: Collection[str], where: str) -> list[str]:
    """Video ids as :func:`clean_name` gives them, or as written where that is another's; no two may be equal."""
    ids = [name if (cleaned := clean_name(name)) in names else cleaned for name in names]
    if len(set(ids)) < len(ids):
        twice = [name for name, cleaned in zip(names, ids, strict=True) if ids.count(cleaned) > 1]
        raise StaleError(f"{where}: ids that differ in blanks or Unicode form alone: {', '.join(map(repr, twice))}")
    return ids


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_text(path: str | Path, text: str) -> None:
    """Append ``text`` to ``path``, in UTF-8. On a full disk the last line can be incomplete."""
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StaleError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write ``value`` as JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_text(path: str | Path, what: str) -> str:
    """Load the UTF-8 text of ``path``, a regular file that may be gzip; errors call it ``what``."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TEXT:
            found = f"{status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else "not a regular file"
            raise StaleError(f"{what} cannot be read: {path}: {found}: refused")
        content = Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":
            limit = max(HARMLESS, MAX_RATIO * len(content))
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(limit + 1)
            if len(content) > limit:
                raise StaleError(f"{what} {path} unpacks to more than {limit >> 20} MB: refused")
        if content[:1] == b"\x80":  # as no UTF-8 text begins
            raise StaleError(f"{what} {path} is a pickle, which can run any code: not opened; write it as text (JSON)")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise StaleError(f"{what} not found: {path}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise StaleError(f"{what} cannot be read: {path}: {error}") from error


def read_json(path: str | Path, what: str) -> Any:
    """Load the JSON value in ``path``; errors call the file ``what``. A key given twice is an error too."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):  # Python's parser would silently keep the last
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise StaleError(f"{what} {path}: given twice in the same object: {name_some(twice)}")
        return content

    text, collecting = read_text(path, what), gc.isenabled()
    gc.disable()  # which would visit all of a large file's objects again and again, and free nothing
    try:
        if "\\ud" in text or "\\uD" in text:  # JSON can encode a lone surrogate, which cannot be written or printed
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number of thousands of digits
        raise StaleError(f"{what} is not valid JSON: {path}: {error}") from error
    finally:
        if collecting:
            gc.enable()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def download(url: str, folder: Path, sha256: str | None = None) -> Path:
    """Download ``url`` into ``folder``, with three retries; a file that is there already is kept.

    It is a StaleError that says what to do by hand if the network fails or the file has another hash.
    """
    import pooch  # here, because it imports requests, which takes long

    name = url.rpartition("/")[2]
    downloads = pooch.create(folder, base_url="", registry={name: sha256}, urls={name: url}, retry_if_failed=3)
    try:
        return Path(downloads.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True, timeout=30)))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise StaleError(
            f"{url} could not be downloaded ({reason}); download it yourself to {folder / name} and run again"
        ) from None


def refuse_zip_bomb(path: str | Path, what: str, ratio: int = MAX_RATIO) -> None:
    """Refuse a zip archive, as torch's files are, that unpacks to more than ``ratio`` times its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # zipfile raises many kinds on damage
        return  # the caller's loader reports what is wrong
    packed = Path(path).stat().st_size
    if unpacked > max(HARMLESS, ratio * packed):
        raise StaleError(f"{what} {path} unpacks from {packed:,} to {unpacked:,} bytes: refused")
