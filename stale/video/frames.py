"""Decode the frames of a video at given times (PyAV).

Time 0 is where a player's clock starts: the container's first timestamp, whichever stream has it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stale.errors import StaleError

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp", ".ogv")
_MICROSECONDS = 1e6  # PyAV's unit of a container's own times


@dataclass(frozen=True)
class VideoInfo:
    """Duration in seconds and frames a second, as the header or, where it has none, the packets say."""

    duration: float
    frame_rate: float


def probe(path: str | Path) -> VideoInfo:
    """Find the duration and average frame rate of a file's first video stream; a StaleError if it has none."""
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        duration = _duration(container, stream, rate)
    if duration <= 0:
        raise StaleError(f"video {path}: no frame with a time; the file is empty or damaged")
    return VideoInfo(duration, rate or 25.0)


def frames_at(path: str | Path, times: np.ndarray) -> Generator[tuple[list[int], np.ndarray], None, None]:
    """Decode the frame on display at each of ``times``, each frame once.

    A video that cannot be decoded, or that ends well before the last of ``times``, is a StaleError.

    Args:
        times: Ascending, in seconds. Times before the first frame get the first, times after the last the last.

    Yields:
        The indices of the times that show a frame, and the frame (H, W, 3) uint8 RGB, rotated as the header says.
    """
    with _opened(path) as (container, stream):
        shown: Any = None
        wanted, end = 0, 0.0
        for time, frame in _timed_frames(container, stream):
            if shown is not None and wanted < len(times) and times[wanted] < time:
                until = wanted + int(np.searchsorted(times[wanted:], time, side="left"))
                yield list(range(wanted, until)), _pixels(shown)
                wanted = until
            if wanted == len(times):
                return
            shown, end = frame, time
        if shown is None:
            raise StaleError(f"video {path}: no frame could be decoded")
        if times[-1] - end > max(2.0, 0.1 * times[-1]):  # a truncated file still has the header of the whole
            raise StaleError(
                f"video {path}: its frames end at {end:.1f} s, but it should reach {times[-1]:.1f} s: cut off?"
            )
        yield list(range(wanted, len(times))), _pixels(shown)


def find_videos(sources: list[Path]) -> list[Path]:
    """List the videos among files and folders (searched recursively, by suffix), sorted within a folder.

    A source that does not exist, a folder without videos, and two videos of one name are a StaleError.
    """
    by_id: dict[str, Path] = {}
    for source in sources:
        found = [source]
        if source.is_dir():
            files = sorted(file for file in source.rglob("*") if not file.name.startswith("."))
            found = [file for file in files if file.suffix.lower() in SUFFIXES]
            if not found:
                raise StaleError(f"no video in folder {source}; looked for {' '.join(SUFFIXES)}")
        elif not source.exists():
            raise StaleError(f"video not found: {source}")
        for path in found:
            if by_id.setdefault(path.stem, path) != path:
                raise StaleError(f"videos {by_id[path.stem]} and {path} share the name '{path.stem}': rename one")
    return list(by_id.values())


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Open a video's container and its first video stream; libav's errors become one line."""
    try:
        import av
    except ImportError:
        raise StaleError("decoding videos needs PyAV: pip install av") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise StaleError(f"video {path}: no video stream in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise StaleError(f"video {path}: {reason}") from None


def _start(container: Any) -> float:
    return (container.start_time or 0) / _MICROSECONDS


def _duration(container: Any, stream: Any, rate: float) -> float:
    """The end of the video stream on the player's clock in seconds; 0 if there is none."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - _start(container)
    if container.duration:
        return container.duration / _MICROSECONDS
    ends, count = [0.0], 0
    for packet in container.demux(stream):  # the header does not say: take the packets' times, or their number
        count += packet.size > 0
        if packet.pts is not None:
            ends.append(float((packet.pts + (packet.duration or 0)) * stream.time_base) - _start(container))
    return max(ends) or (count / rate if rate else 0.0)


def _timed_frames(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Frames with their times; a frame without one gets its index over the rate, frames out of order are skipped."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    last, start = -np.inf, _start(container)
    for number, frame in enumerate(container.decode(stream)):
        time = number / rate if frame.time is None else frame.time - start
        if time > last:
            yield time, frame
            last = time


def _pixels(frame: Any) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise, from the display matrix
    return np.rot90(image, turns) if turns % 4 else image
