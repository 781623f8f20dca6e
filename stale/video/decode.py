"""Frames of a video at wanted times, chosen by their timestamps, and decoding in the background (PyAV).

Time 0 is where a player's clock starts: the container's first timestamp, whichever stream has it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from stale.errors import StaleError

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp", ".ogv")
_MICROSECONDS = 1e6  # PyAV's unit of a container's own times

Item = TypeVar("Item")


@dataclass(frozen=True)
class VideoInfo:
    """What the header (or, where it is silent, one pass over the packets) says: seconds and frames a second."""

    path: Path
    duration: float
    frame_rate: float


def probe(path: str | Path) -> VideoInfo:
    """Duration and average frame rate of a video's first video stream.

    Raises:
        StaleError: PyAV is missing, the file is no video, or it has neither duration nor packets.
    """
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        duration = _stated_duration(container, stream) or _scanned_duration(container, stream, rate)
    if duration <= 0:
        raise StaleError(f"video {path}: no frame with a time; the file is empty or damaged")
    return VideoInfo(Path(path), duration, rate or 25.0)


def frames_at(path: str | Path, times: np.ndarray) -> Generator[tuple[list[int], np.ndarray], None, None]:
    """The frame on display at each of ``times``, each frame once.

    Args:
        times: rising, in seconds. Before the first frame it stands in; after the last, that.

    Yields:
        Which of ``times`` a frame answers, and the frame: (height, width, 3) uint8 RGB, turned as a player turns it.

    Raises:
        StaleError: the video cannot be decoded, or ends well before the last of ``times``.
    """
    with _opened(path) as (container, stream):
        shown: Any = None
        wanted, end = 0, 0.0
        for time, frame in _timed_frames(path, container, stream):
            if shown is not None and wanted < len(times) and times[wanted] < time:
                until = wanted + int(np.searchsorted(times[wanted:], time, side="left"))
                yield list(range(wanted, until)), _pixels(shown)
                wanted = until
            if wanted == len(times):
                return
            shown, end = frame, time
        if shown is None:
            raise StaleError(f"video {path}: not one frame could be decoded")
        _check_length(path, end, float(times[-1]))
        yield list(range(wanted, len(times))), _pixels(shown)


def find_videos(sources: list[Path]) -> list[Path]:
    """The videos meant by files and folders (searched to the bottom, by ending), sorted within a folder.

    Raises:
        StaleError: a source does not exist, a folder holds no video, or two videos share a name.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if source.is_dir():
            inside = sorted(
                file for file in source.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
            )
            if not inside:
                raise StaleError(f"no video in folder {source}; looked for {' '.join(SUFFIXES)}")
            found.update(dict.fromkeys(inside))
        elif source.exists():
            found[source] = None
        else:
            raise StaleError(f"video not found: {source}")
    by_id: dict[str, Path] = {}
    for path in found:
        if by_id.setdefault(path.stem, path) != path:
            raise StaleError(f"videos {by_id[path.stem]} and {path} share the name '{path.stem}': rename one")
    return list(found)


class Ahead(Generic[Item]):
    """An iterator run in a background thread, a few items ahead; its errors surface where the items are taken."""

    def __init__(self, items: Generator[Item, None, None], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def close(self) -> None:
        """Stop the thread and wait for it; what it holds open is closed."""
        self._stopped.set()
        self._thread.join()

    def _work(self, items: Generator[Item, None, None]) -> None:
        try:
            for item in items:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:  # whatever it is, the taker must hear of it
            self._put("error", error)
        finally:
            items.close()

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A video's container and its first video stream; what libav raises becomes one line."""
    try:
        import av
    except ImportError:
        raise StaleError("reading videos needs PyAV: pip install av") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise StaleError(f"video {path}: no video stream in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise StaleError(f"video {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _start(container: Any) -> float:
    return (container.start_time or 0) / _MICROSECONDS


def _stated_duration(container: Any, stream: Any) -> float:
    """The end of the video stream on the player's clock, 0 where the header does not say."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - _start(container)
    return (container.duration or 0) / _MICROSECONDS


def _scanned_duration(container: Any, stream: Any, rate: float) -> float:
    """The same from the packets' times, or from their number where they have none."""
    ends, count = [0.0], 0
    for packet in container.demux(stream):
        count += packet.size > 0
        if packet.pts is not None:
            ends.append(float((packet.pts + (packet.duration or 0)) * stream.time_base) - _start(container))
    return max(ends) or (count / rate if rate else 0.0)


def _timed_frames(path: str | Path, container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Frames with their times; frames without one are counted, frames out of order left out."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    last, start = -np.inf, _start(container)
    for number, frame in enumerate(container.decode(stream)):
        time = number / rate if frame.time is None else frame.time - start
        if time > last:
            yield time, frame
            last = time


def _check_length(path: str | Path, end: float, wanted: float) -> None:
    """A file cut off still has the header of the whole: its last frame must not stand in for a long rest."""
    if wanted - end > max(2.0, 0.1 * wanted):
        raise StaleError(f"video {path}: its frames end at {end:.1f} s, but it should reach {wanted:.1f} s: cut off?")


def _pixels(frame: Any) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise, from the display matrix
    return np.rot90(image, turns) if turns % 4 else image
