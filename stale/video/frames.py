"""Decode the frames of a video at given times (PyAV).

Time 0 is where a player's clock starts: the container's first timestamp, whichever stream has it.
"""

import logging
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stale.errors import StaleError, name_some, printable

_COMMON = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp", ".ogv")
SUFFIXES = (*_COMMON, ".mts", ".m2ts", ".gif", ".vob", ".asf", ".h264", ".hevc")
_MICROSECONDS = 1e6  # PyAV's unit of a container's own times
_JUMP = 1.0  # seconds: times that fall by more begin again, by less they are out of order

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoInfo:
    """Duration in seconds and frames a second, as the packets say."""

    duration: float
    frame_rate: float
    last: float = 0.0  # when the last frame begins, in seconds


def probe(path: str | Path) -> VideoInfo:
    """Find the duration and the frame rate of a file's video, by its packets. Headers can be wrong, which is logged.

    A file without video, or whose packets end well before the header says, is a StaleError.
    """
    with _opened(path) as (container, stream):
        clock, last, sound = _Clock(container, stream), 0.0, 0.0
        for packet in container.demux():
            if packet.size and not packet.is_discard and packet.stream.index == stream.index:
                last = max(last, clock.place(packet, packet.dts))
            elif packet.pts is not None:
                sound = max(sound, float(packet.pts * packet.time_base) - clock.start)
        own = float((stream.duration + (stream.start_time or 0)) * stream.time_base) if stream.duration else 0.0
        # The container's duration is that of all streams: sound may be longer than the picture.
        declared = (own or (container.duration or 0) / _MICROSECONDS) - clock.start
        end, whole = clock.end if own else max(clock.end, sound), 0 < stream.frames <= clock.count
    if not clock.count:
        raise StaleError(f"video {path}: no frame with a time; the file is empty or damaged")
    differs = declared > 0 and clock.timed and abs(declared - end) > _tolerance(declared)
    if differs and declared > end and not whole:
        raise StaleError(f"video {path}: its frames end at {end:.1f} s, its header says {declared:.1f} s: cut off?")
    joints = _seconds(clock.joints)
    notes = {
        f"its frames have no times; {clock.rate:.6g} a second are assumed": not clock.timed,
        f"its times begin again at {joints}, where they are continued: joined files?": clock.joints,
        f"its header says {declared:.1f} s, its frames last {end:.1f} s, which counts": differs and not clock.joints,
    }
    _warn(path, notes)
    certain = own and clock.timed and not differs and not clock.joints
    return VideoInfo(declared if certain else clock.end, clock.rate, last)


def frames_at(
    path: str | Path, times: np.ndarray, info: VideoInfo | None = None
) -> Generator[tuple[list[int], np.ndarray], None, None]:
    """Decode the frame on display at each of ``times``, each frame once.

    Frames that cannot be decoded, up to 1 %, and frames out of order are left out, which is logged. It is a StaleError
    if there are more, or if the frames end well before the last of ``times``.

    Args:
        times: Ascending, in seconds. Times before the first frame get the first, times after the last the last.
        info: What :func:`probe` found, if it was called.

    Yields:
        The indices of the times that show a frame, and the frame (H, W, 3) uint8 RGB, turned as the header says.
    """
    info = info or probe(path)
    with _opened(path) as (container, stream):
        clock, late = _Clock(container, stream), 0
        damaged: list[Any] = []
        shown: Any = None
        wanted, at = 0, 0.0
        for frame in _decode(container, stream, damaged):
            time = clock.place(frame, frame.pts)
            if shown is not None and time <= at:
                late += 1
                continue
            if shown is not None and times[wanted] < time:
                until = wanted + int(np.searchsorted(times[wanted:], time, side="left"))
                yield list(range(wanted, until)), _pixels(shown)
                wanted = until
                if wanted == len(times):
                    break
            shown, at = frame, time
        if shown is None:
            raise StaleError(f"video {path}: no frame could be decoded")
        begins = [packet.pts * packet.time_base - clock.start for packet in damaged if packet.pts is not None]
        if len(damaged) > max(1, 0.01 * clock.count):
            raise StaleError(f"video {path}: {len(damaged)} frames are damaged, at {_seconds(begins)}")
        if wanted < len(times):
            if info.last - at > _tolerance(info.last):
                raise StaleError(f"video {path}: after {at:.1f} s of {info.duration:.1f} s no frame can be decoded")
            yield list(range(wanted, len(times))), _pixels(shown)
    left_out = {f"damaged frames left out: {len(damaged)}, at {_seconds(begins)}": damaged}
    _warn(path, left_out | {f"frames out of order left out: {late}": late})


def find_videos(sources: list[Path]) -> list[Path]:
    """List the videos among files and folders (searched recursively, by suffix), sorted within a folder.

    Files of a folder with another suffix are logged.
    A source that does not exist, a folder without videos, and two videos of one name are a StaleError.
    """
    by_id: dict[str, Path] = {}
    for source in sources:
        found = [source]
        if source.is_dir():
            files = sorted(file for file in source.rglob("*") if file.is_file() and not file.name.startswith("."))
            found = [file for file in files if file.suffix.lower() in SUFFIXES]
            if not found:
                raise StaleError(f"no video in folder {source}; looked for {' '.join(SUFFIXES)}")
            if others := [file.name for file in files if file.suffix.lower() not in SUFFIXES]:
                _log.warning("%s: no videos by their suffix: %s", source, printable(name_some(others)))
        elif re.match(r"\w+:/", str(source)):
            raise StaleError(f"{source}: URLs are not read; download the video and name its file")
        elif not source.exists():
            raise StaleError(f"video not found: {source}")
        for path in found:
            if by_id.setdefault(path.stem, path) != path:
                raise StaleError(f"videos {by_id[path.stem]} and {path} share the name '{path.stem}': rename one")
    return list(by_id.values())


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Open a video's container and its best video stream; libav's errors become one line."""
    try:
        import av
    except ImportError:
        raise StaleError("decoding videos needs PyAV: pip install av") from None
    try:
        with av.open(f"file:{path}") as container:  # else a name such as "a:b.mp4" is an address
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise StaleError(f"video {path}: no video stream in it, at most sound and a cover")
            best = container.streams.best("video")
            stream: Any = best if best in streams else streams[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise StaleError(f"video {path}: {reason}") from None


class _Clock:
    """Seconds on the player's clock. It continues where the times of joined files begin again."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.start = (container.start_time or 0) / _MICROSECONDS
        # Raw streams have no times: libav's average rate is then a default, its guess is what the stream says.
        rates = (stream.guessed_rate, stream.average_rate)
        self.rate = float(next(filter(None, rates if container.start_time is None else rates[::-1]), 25))
        self.count, self.end, self.timed = 0, 0.0, True
        self.joints: list[float] = []
        self._offset, self._order = 0.0, -np.inf

    def place(self, item: Any, order: int | None) -> float:
        """When a packet or frame begins. ``order``, in its time base, does not fall within one file."""
        begin = self.end  # without a time it follows the one before
        if item.pts is None:
            self.timed = False
        else:
            begin = float(item.pts * item.time_base) - self.start + self._offset
            position = self._order if order is None else float(order * item.time_base)
            if position < self._order - _JUMP:
                self.joints.append(self.end)
                self._offset += self.end - begin
                begin = self.end
            self._order = position
        self.end = max(self.end, begin + (float(item.duration * item.time_base) if item.duration else 1 / self.rate))
        self.count += 1
        return begin


def _decode(container: Any, stream: Any, damaged: list[Any]) -> Iterator[Any]:
    """The frames that can be decoded; ``damaged`` takes the packets of the others."""
    from av.error import InvalidDataError

    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except InvalidDataError:
            damaged.append(packet)
        else:
            yield from frames


def _pixels(frame: Any) -> np.ndarray:
    """RGB, rotated and mirrored by the display matrix: column, row → a · column + c · row, b · column + d · row."""
    image, matrix = frame.to_ndarray(format="rgb24"), frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _tolerance(seconds: float) -> float:
    return max(2.0, 0.1 * seconds)


def _seconds(times: list[float]) -> str:
    return f"{name_some(f'{float(time):.1f}' for time in times) or 'unknown times'} s"


def _warn(path: str | Path, notes: Mapping[str, object]) -> None:
    """Log the notes that hold."""
    for note in filter(notes.get, notes):
        _log.warning("video %s: %s", printable(str(path)), note)
