"""Snippet features of videos: times, frames, CLIP.

N snippets, L frames a snippet, C feature width. Snippet i of N is centred at (i + 0.5) / N of the duration, so that
the snippets cover the video exactly, as the rest of the project takes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from stale.errors import StaleError
from stale.video.decode import Ahead, VideoInfo, frames_at, probe
from stale.video.encoder import ImageEncoder
from stale.video.preprocess import crop


@dataclass(frozen=True)
class Sampling:
    """Where snippets lie: ``fps`` a second, or one every ``stride`` frames, the mean of its ``length`` frames."""

    fps: float = 5.0
    stride: int | None = None
    length: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.fps < 1000 or self.length < 1 or (self.stride is not None and self.stride < 1):
            raise StaleError(f"sampling by {self}: fps, stride and snippet length must be above 0")
        if self.stride is None and self.length != 1:
            raise StaleError("a snippet length goes with a stride, both in frames of the video")

    def times(self, info: VideoInfo) -> np.ndarray:
        """The times (N, L) in seconds of the frames of each snippet, inside the video."""
        rate = self.fps if self.stride is None else info.frame_rate / self.stride
        count = max(1, round(info.duration * rate))
        centres = (np.arange(count) + 0.5) * info.duration / count
        around = (np.arange(self.length) - (self.length - 1) / 2) / info.frame_rate
        return np.clip(centres[:, None] + around, 0.0, info.duration)

    def __str__(self) -> str:
        return f"{self.fps:g} fps" if self.stride is None else f"stride {self.stride}, length {self.length} frames"


@dataclass(frozen=True)
class VideoFeatures:
    """One video's features.

    Attributes:
        features: (N, C) float16.
        duration: in seconds.
        thumbnails: a few (time in seconds, image (R, R, 3) uint8), as the tower saw them.
    """

    features: np.ndarray
    duration: float
    thumbnails: tuple[tuple[float, np.ndarray], ...] = ()

    @property
    def fps(self) -> float:
        """Snippets a second, exactly: their number over the duration."""
        return len(self.features) / self.duration


@dataclass(frozen=True)
class _Frames:
    """A batch on its way to the encoder: images (B, R, R, 3), and for each the places in times.flat it fills."""

    times: np.ndarray
    duration: float
    places: list[list[int]]
    images: np.ndarray


def encode_videos(
    paths: Iterable[Path],
    encoder: ImageEncoder,
    sampling: Sampling,
    batch_size: int = 64,
    workers: int = 2,
    thumbnails: int = 0,
) -> Iterator[tuple[Path, VideoFeatures | StaleError]]:
    """Features of each video, in order; of a broken one the error instead.

    Args:
        batch_size: frames the tower sees at once.
        workers: videos decoded at the same time, in the background.
        thumbnails: how many frames a video to keep.
    """
    rest, started = iter(paths), deque()
    try:
        while True:
            for path in islice(rest, workers - len(started)):
                started.append((path, Ahead(_decode(path, encoder.resolution, sampling, batch_size))))
            if not started:
                return
            path, batches = started[0]
            try:
                result: VideoFeatures | StaleError = _encode(batches, encoder, thumbnails)
            except StaleError as error:
                result = error
            batches.close()
            started.popleft()
            yield path, result
    finally:
        for _, batches in started:
            batches.close()


def encode_video(path: Path, encoder: ImageEncoder, sampling: Sampling, thumbnails: int = 0) -> VideoFeatures:
    """Features of one video.

    Raises:
        StaleError: it is broken.
    """
    ((_, result),) = encode_videos([path], encoder, sampling, thumbnails=thumbnails)
    if isinstance(result, StaleError):
        raise result
    return result


def _decode(path: Path, resolution: int, sampling: Sampling, batch_size: int) -> Generator[_Frames, None, None]:
    """Batches of cropped frames; runs in a thread."""
    info = probe(path)
    times = sampling.times(info)
    order = np.argsort(times, axis=None, kind="stable")
    places: list[list[int]] = []
    images: list[np.ndarray] = []
    for wanted, frame in frames_at(path, times.flat[order]):
        places.append(order[wanted].tolist())
        images.append(crop(frame, resolution))
        if len(images) == batch_size:
            yield _Frames(times, info.duration, places, np.stack(images))
            places, images = [], []
    if images:
        yield _Frames(times, info.duration, places, np.stack(images))


def _encode(batches: Iterable[_Frames], encoder: ImageEncoder, thumbnails: int) -> VideoFeatures:
    total, kept, batch = None, [], None
    for batch in batches:
        if total is None:
            total = np.zeros((len(batch.times), encoder.width), dtype=np.float32)
            wanted = set(((np.arange(thumbnails) + 0.5) * batch.times.size / max(thumbnails, 1)).astype(int).tolist())
        for places, image, feature in zip(batch.places, batch.images, encoder.encode(batch.images), strict=True):
            np.add.at(total, np.array(places) // batch.times.shape[1], feature)
            kept += [(float(batch.times.flat[place]), image) for place in places if place in wanted]
    mean = total / batch.times.shape[1]
    if not np.isfinite(mean).all() or np.abs(mean).max() > np.finfo(np.float16).max:
        raise StaleError("the image tower gives values that half precision cannot hold: are its weights sound?")
    return VideoFeatures(mean.astype(np.float16), batch.duration, tuple(kept))
