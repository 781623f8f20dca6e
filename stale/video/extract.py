"""Extract snippet features of videos, in memory or into a folder.

N snippets, L frames a snippet, C feature width. Snippet i of N is centered at (i + 0.5) / N of the duration, so that
the snippets cover the video exactly, as everywhere in this project.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from stale.data.dataset import read_ahead
from stale.data.features import NpyFolder, open_features, recorded_number
from stale.errors import StaleError
from stale.io import atomic_path, remove_leftovers, write_json
from stale.progress import progress_bar
from stale.video.frames import VideoInfo, frames_at, probe
from stale.video.image_encoder import ImageEncoder


@dataclass(frozen=True)
class Sampling:
    """Where snippets lie: ``fps`` a second, or one every ``stride`` frames, the mean of its ``length`` frames."""

    fps: float = 5.0
    stride: int | None = None
    length: int = 1

    def __post_init__(self) -> None:
        recorded_number(vars(self), "fps", "snippets a second")
        if self.length < 1 or (self.stride is not None and self.stride < 1):
            raise StaleError(f"sampling by {self}: stride and snippet length must be above 0")
        if self.stride is None and self.length != 1:
            raise StaleError("a snippet length goes with a stride, both in frames of the video")

    def times(self, info: VideoInfo) -> np.ndarray:
        """Times (N, L) in seconds of the frames of each snippet, inside the video."""
        rate = self.fps if self.stride is None else info.frame_rate / self.stride
        count = max(1, round(info.duration * rate))
        centers = (np.arange(count) + 0.5) * info.duration / count
        around = (np.arange(self.length) - (self.length - 1) / 2) / info.frame_rate
        return np.clip(centers[:, None] + around, 0.0, info.duration)

    def __str__(self) -> str:
        return f"{self.fps:g} fps" if self.stride is None else f"stride {self.stride}, length {self.length} frames"


@dataclass(frozen=True)
class VideoFeatures:
    """One video's features, and a few of its frames as the encoder saw them."""

    features: np.ndarray  # (N, C) float16
    duration: float  # seconds
    thumbnails: tuple[tuple[float, np.ndarray], ...] = ()  # time in seconds, image (R, R, 3) uint8

    @property
    def fps(self) -> float:
        """Snippets a second, exactly: their number over the duration."""
        return len(self.features) / self.duration


def extract_features(
    videos: Sequence[Path],
    folder: Path,
    encoder: ImageEncoder,
    sampling: Sampling,
    *,
    batch_size: int = 64,
    workers: int = 2,
) -> tuple[list[Path], dict[Path, str]]:
    """Write ``video.npy`` and its record ``video.json`` of each video into ``folder``; finished videos are skipped.

    Returns the videos that were not finished earlier, and why some are broken. It is a StaleError if ``folder`` is a
    file, or holds features that are damaged, packed, or of another backbone or sampling; nothing is overwritten.
    """
    if folder.suffix in (".h5", ".hdf5") or (folder.exists() and not folder.is_dir()):
        raise StaleError(
            f"{folder}: features are written into a folder, which scripts/pack_features.py packs; name one"
        )
    settings = {**encoder.backbone.as_dict(), "sampling": str(sampling)}
    made = settings | {"vectors": "after the projection into the joint space, not normalised"}
    todo, broken = [], {}
    store = open_features(folder) if any(folder.glob("[!.]*.npy")) else None
    if not isinstance(store, NpyFolder | None):
        raise StaleError(f"{folder} holds packed features, to which nothing can be added: choose another --output")
    for path in videos:
        file = folder / f"{path.stem}.npy"
        if store is None or path.stem not in store.ids:
            remove_leftovers(file)
            todo.append(path)
            continue
        recorded = store.record(path.stem)
        same_weights = recorded.get("weights_sha256") == settings["weights_sha256"]
        for name, value in settings.items():
            if recorded.get(name) != value and not (same_weights and name == "backbone"):
                raise StaleError(
                    f"{folder} holds features of '{path.stem}' with another {name} ({recorded.get(name)}, now "
                    f"{value}): choose another --output, or delete what lies there"
                )
        fps, duration = (recorded_number(recorded, name, str(file)) or 0 for name in ("fps", "duration"))
        if store.open(path.stem).shape != (round(fps * duration), encoder.width):
            raise StaleError(f"{file} does not fit its record: delete it, or choose another --output")
    with progress_bar(total=len(videos), initial=len(videos) - len(todo), desc="extract", unit="video") as bar:
        for path, result in encode_videos(todo, encoder, sampling, batch_size=batch_size, workers=workers):
            if isinstance(result, StaleError):
                broken[path] = str(result)
            else:
                record = {"fps": result.fps, "duration": result.duration, **made}
                write_json(folder / f"{path.stem}.json", record)  # first: the .npy, once there, counts as finished
                with atomic_path(folder / f"{path.stem}.npy") as temporary:
                    np.save(temporary, result.features)
            bar.set_postfix_str(path.stem, refresh=False)
            bar.update()
    return todo, broken


def encode_videos(
    paths: Iterable[Path],
    encoder: ImageEncoder,
    sampling: Sampling,
    *,
    batch_size: int = 64,
    workers: int = 2,
    thumbnails: int = 0,
) -> Iterator[tuple[Path, VideoFeatures | StaleError]]:
    """Encode each video, in order; a broken one gives its error instead.

    The encoder gets ``batch_size`` frames at once, ``workers`` videos are decoded at the same time in the background,
    and ``thumbnails`` frames of each video are kept.
    """
    rest = iter(paths)
    started: deque[tuple[Path, Generator[tuple[_Frames, _Frames], None, None]]] = deque()
    try:
        while True:
            for path in islice(rest, workers - len(started)):
                frames = _decode(path, encoder, sampling, batch_size)
                started.append((path, read_ahead(lambda batch: batch, frames, depth=2)))
            if not started:
                return
            path, batches = started[0]
            try:
                result: VideoFeatures | StaleError = _encode((batch for batch, _ in batches), encoder, thumbnails)
            except StaleError as error:
                result = error
            batches.close()
            started.popleft()
            yield path, result
    finally:
        for _, batches in started:
            batches.close()


@dataclass(frozen=True)
class _Frames:
    """A batch for the encoder: images (B, R, R, 3), and for each the indices into times.flat at which it is shown."""

    times: np.ndarray
    duration: float
    indices: list[list[int]]
    images: np.ndarray


def _decode(path: Path, encoder: ImageEncoder, sampling: Sampling, batch_size: int) -> Generator[_Frames, None, None]:
    """Batches of cropped frames; runs in a thread."""
    info = probe(path)
    times = sampling.times(info)
    order = np.argsort(times, axis=None, kind="stable")
    frames = frames_at(path, times.flat[order], info)
    while batch := [(order[at].tolist(), encoder.crop(frame)) for at, frame in islice(frames, batch_size)]:
        yield _Frames(times, info.duration, [at for at, _ in batch], np.stack([image for _, image in batch]))


def _encode(batches: Iterable[_Frames], encoder: ImageEncoder, thumbnails: int) -> VideoFeatures:
    """Average the features of each snippet's frames, and keep ``thumbnails`` evenly spaced frames."""
    total, kept, batch = None, [], None
    for batch in batches:
        if total is None:
            total = np.zeros((len(batch.times), encoder.width), dtype=np.float32)
            wanted = set(((np.arange(thumbnails) + 0.5) * batch.times.size / max(thumbnails, 1)).astype(int).tolist())
        for indices, image, feature in zip(batch.indices, batch.images, encoder.encode(batch.images), strict=True):
            np.add.at(total, np.array(indices) // batch.times.shape[1], feature)
            kept += [(float(batch.times.flat[index]), image) for index in indices if index in wanted]
    assert total is not None and batch is not None  # every video has a frame, or decoding raises
    mean = total / batch.times.shape[1]
    if not np.isfinite(mean).all() or np.abs(mean).max() > np.finfo(np.float16).max:
        raise StaleError("the image encoder gives values that half precision cannot hold: are its weights sound?")
    return VideoFeatures(mean.astype(np.float16), batch.duration, tuple(kept))
