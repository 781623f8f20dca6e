"""What the tests of data preparation share: the challenge's archives made from annotations, and a server that fails."""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from stale.data.annotations import Video
from stale.preparation.splits import Lists, list_names
from stale.preparation.thumos14 import CLASSES

SUFFIXES = {"validation": "val", "test": "test"}


def write_archive(path: Path, videos: dict[str, Video], subset: str, ambiguous: str = "") -> Path:
    """A zip archive like the challenge's of one subset, with what else lies in it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotation/", "")
        archive.writestr("readme.txt", "THUMOS CHALLENGE 2014")
        archive.writestr("__MACOSX/annotation/._Diving_val.txt", b"\0\5\x16\7")
        for label in (*CLASSES, "Ambiguous"):
            lines = [
                f"{video.id}  {instance.start:g} {instance.end:g}\r\n"
                for video in videos.values()
                for instance in video.instances
                if video.subset == subset and instance.label == label
            ]
            text = ambiguous if label == "Ambiguous" else "".join(lines)
            archive.writestr(f"annotation/{label}_{SUFFIXES[subset]}.txt", text)
    return path


def some_lists(labels: tuple[str, ...] | list[str]) -> Lists:
    """Forty lists that split ``labels``: the first quarter or half is unseen in all of them."""
    lists = {}
    for name in list_names():
        unseen = len(labels) // (4 if name.startswith("train_75") else 2)
        lists[name] = list(labels[:unseen] if "/test/" in name else labels[unseen:])
    return lists


def write_repository(path: Path, titles: dict[str, Lists]) -> Path:
    """An archive like GitHub's of EffPrompt's repository; its lists end without a line end, as the official ones do."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Efficient-Prompt-main/README.md", "# Prompting")
        for title, lists in titles.items():
            for name, labels in lists.items():
                setting, rest = name.split("/", 1)
                archive.writestr(
                    f"Efficient-Prompt-main/datasplits/Zero shot/{setting}/{title}/{rest}", "\n".join(labels)
                )
    return path


@dataclass
class Server:
    """Files by name, and how to misbehave: each entry of ``faults`` is used up by one request.

    A number below 100 cuts the answer after so many bytes; ``("status", n)`` answers so; ``("redirect", url)``.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # path, Range header
    ranges: bool = True
    etag: str = '"1"'
    url: str = ""


@contextmanager
def serve() -> Iterator[Server]:
    """A server on this machine that knows ranges and faults."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append((self.path, self.headers.get("Range", "")))
            fault = state.faults.pop(0) if state.faults else None
            content = state.files.get(self.path.lstrip("/"))
            if isinstance(fault, tuple) and fault[0] == "redirect":
                self.send_response(302)
                self.send_header("Location", fault[1])
                self.end_headers()
            elif isinstance(fault, tuple) or content is None:
                self.send_error(fault[1] if fault else 404)
            else:
                self.answer(content, fault)

        def answer(self, content: bytes, cut: int | None) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match and state.ranges and self.headers.get("If-Range") == state.etag else 0
            if start >= len(content) > 0:
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            self.wfile.write(content[start:] if cut is None else content[start : start + cut])
            return None

        def log_message(self, *arguments: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
