"""Downloads over HTTPS that resume, retry, and are never taken for whole before they are.

A download grows in ``NAME.part``; ``NAME.part.json`` keeps its address and what the server calls its version, so that a
later run goes on only with the same file. ``NAME`` appears when all announced bytes are there.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stale.errors import StaleError
from stale.files import write_json

_BLOCK = 1 << 16
_TIMEOUT = 30  # seconds without a byte
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # status codes that may be gone in a moment
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_log = logging.getLogger(__name__)


class _PassingError(Exception):
    """A failure that another attempt may mend."""


@dataclass(frozen=True)
class Patience:
    """How often an address is tried, and the seconds before the second attempt (doubled each time)."""

    attempts: int = 4
    wait: float = 1.0
    sleep: Callable[[float], None] = time.sleep


PATIENCE = Patience()


def fetch(urls: Sequence[str], target: str | Path, limit: int, patience: Patience = PATIENCE) -> str:
    """Download the first of ``urls`` that works to ``target``.

    Args:
        urls: HTTPS addresses of the same file; plain HTTP only from this machine.
        limit: bytes; a larger file is refused.

    Returns:
        The address that worked.

    Raises:
        StaleError: none did; every one is named with its fault.
    """
    target, faults = Path(target), []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for url in urls:
            fault = _try_often(url, target, limit, patience)
            if fault is None:
                return url
            faults.append(f"{url}: {fault}")
    except OSError as error:
        raise StaleError(f"cannot write {target}: {error.strerror or error}") from None
    raise StaleError(
        f"{target.name} could not be downloaded ({'; '.join(faults)}); "
        "fetch it by other means and give its folder as --from"
    )


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_safe_address(url: str) -> bool:
    """Whether ``url`` is HTTPS, or HTTP from this very machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


def _try_often(url: str, target: Path, limit: int, patience: Patience) -> str | None:
    """Download with retries; None, or what went wrong the last time."""
    if not is_safe_address(url):
        return "only HTTPS addresses are used"
    fault, wait = "", patience.wait
    for attempt in range(patience.attempts):
        if attempt:
            patience.sleep(wait)
            wait *= 2
        try:
            _download(url, _Part(target), limit)
            return None
        except _PassingError as error:
            fault = str(error)
            _log.warning("%s: %s (attempt %d of %d)", url, fault, attempt + 1, patience.attempts)
        except StaleError as error:
            return str(error)
    return fault


class _Part:
    """A download on its way: the bytes so far, and what they are bytes of."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.part")
        self._notes = target.with_name(f"{target.name}.part.json")

    def resumable(self, url: str) -> tuple[int, str]:
        """Bytes that are there and their version, or (0, "") where they cannot be gone on with."""
        try:
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
            if notes["url"] == url and notes["version"]:
                return self.path.stat().st_size, str(notes["version"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0, ""

    def begin(self, url: str, version: str) -> None:
        """Start from nothing."""
        self.path.unlink(missing_ok=True)
        write_json(self._notes, {"url": url, "version": version})

    def finish(self) -> None:
        """All is there."""
        self.path.replace(self.target)
        self._notes.unlink(missing_ok=True)

    def discard(self) -> None:
        """Nothing of it can be used."""
        self.path.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)


def _download(url: str, part: _Part, limit: int) -> None:
    """One attempt; what arrived stays for the next."""
    have, version = part.resumable(url)
    headers = {"User-Agent": "stale"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        with _opener().open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            start, total = _extent(response, have)
            if not start:
                part.begin(url, _version(response))
            size = _receive(response, part.path, start, total, limit)
    except urllib.error.HTTPError as error:
        raise _http_fault(error, part) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _PassingError(str(getattr(error, "reason", error)) or type(error).__name__) from None
    if total is not None and size != total:
        if size > total:
            part.discard()
        raise _PassingError(f"{size:,} of {total:,} bytes arrived")
    part.finish()


def _http_fault(error: urllib.error.HTTPError, part: _Part) -> Exception:
    if error.code == 416:  # the file has become shorter than what is here
        part.discard()
        return _PassingError("the server has another file now")
    message = f"HTTP {error.code} {error.reason}"
    return _PassingError(message) if error.code in _PASSING else StaleError(message)


def _extent(response: Any, have: int) -> tuple[int, int | None]:
    """Where the bytes that come begin (0 or ``have``), and how many the file has, if the server says."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != have:
            raise StaleError("the server answers with another part of the file than asked for")
        return have, int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _version(response: Any) -> str:
    """What If-Range may be asked with: a strong ETag or the date; empty where there is neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _receive(response: Any, path: Path, start: int, total: int | None, limit: int) -> int:
    """Append what comes to ``path``; its size then."""
    if (total or 0) > limit:
        raise StaleError(f"{total:,} bytes; more than {limit:,} are refused")
    size = start
    with open(path, "r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        for block in _blocks(response):
            size += len(block)
            if size > limit:
                raise StaleError(f"more than {limit:,} bytes: refused")
            file.write(block)
    return size


def _blocks(response: Any) -> Iterator[bytes]:
    """What arrives. Faults of the network are told apart from the disk's here: both are OSErrors."""
    try:
        while block := response.read(_BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _PassingError(str(error) or type(error).__name__) from None


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to another safe address."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if not is_safe_address(newurl):
            raise StaleError(f"it redirects to {newurl}, which is not HTTPS")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_SafeRedirects)
