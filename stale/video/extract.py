"""Extract snippet features of videos, in memory or into a folder.

N snippets, C feature width. Snippet i of N is the frame at (i + 0.5) / N of the duration, so that the snippets cover
the video exactly, as everywhere in this project.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stale.data.dataset import read_ahead
from stale.data.features import Backbone, NpyFolder, open_features, recorded_number, require_same_backbone
from stale.errors import StaleError
from stale.io import atomic_path, remove_leftovers, write_json
from stale.progress import progress_bar
from stale.video.frames import frames_at, probe
from stale.video.image_encoder import ImageEncoder


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
    fps: float,
    **options: int,
) -> tuple[list[Path], dict[Path, str]]:
    """Write ``video.npy`` and its record ``video.json`` of each video into ``folder``; finished videos are skipped.

    ``options`` are those of :func:`encode_videos`. Returns the videos that were not finished earlier, and why some are
    broken. It is a StaleError if ``folder`` is a file, or holds features that are damaged, packed, or of another
    backbone or sampling; nothing is overwritten.
    """
    if folder.suffix in (".h5", ".hdf5") or (folder.exists() and not folder.is_dir()):
        raise StaleError(f"{folder} is not a folder: --output is one, which scripts/pack_features.py packs")
    settings = {**encoder.backbone.as_dict(), "sampling": f"{fps:g} fps"}
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
        recorded, where = store.attributes(path.stem), f"the features {file}"
        require_same_backbone(encoder.backbone, Backbone.of(recorded), where, "now they would be of")
        rate, duration = (recorded_number(recorded, name, where) or 0 for name in ("fps", "duration"))
        if store.open(path.stem).shape != (round(rate * duration), encoder.width):
            raise StaleError(f"{file} does not fit its record: delete it, or choose another --output")
        if recorded.get("sampling") != settings["sampling"]:
            other = f"with another sampling ({recorded.get('sampling')}, now {settings['sampling']})"
            raise StaleError(f"{file} was made {other}: choose another --output, or delete what lies there")
    with progress_bar(total=len(videos), initial=len(videos) - len(todo), desc="extract", unit="video") as bar:
        for path, result in encode_videos(todo, encoder, fps, **options):
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
    fps: float,
    *,
    batch_size: int = 64,
    workers: int = 2,
    thumbnails: int = 0,
) -> Iterator[tuple[Path, VideoFeatures | StaleError]]:
    """Encode ``fps`` snippets a second of each video, in order; a broken one gives its error instead.

    The encoder gets ``batch_size`` frames at once, ``workers`` videos (at least two) are decoded at the same time in
    the background, and ``thumbnails`` frames of each video are kept.
    """
    recorded_number({"fps": fps}, "fps", "snippets a second")

    def start(path: Path) -> Generator[tuple[Any, Any], None, None]:
        return read_ahead(lambda batch: batch, _decode(path, encoder, fps, batch_size), depth=2)

    for path, decoded in read_ahead(start, paths, depth=max(workers - 1, 1)):
        try:
            result: VideoFeatures | StaleError = _encode((batch for batch, _ in decoded), encoder, thumbnails)
        except StaleError as error:
            result = error
        decoded.close()
        yield path, result


def _decode(path: Path, encoder: ImageEncoder, fps: float, batch_size: int) -> Generator[Any, None, None]:
    """The duration and the times (N) of the snippets, then batches; runs in a thread.

    A batch lists the images (R, R, 3) for the encoder, each with the snippets that it is shown in.
    """
    info = probe(path)
    count = max(1, round(info.duration * fps))
    times = (np.arange(count) + 0.5) * info.duration / count
    yield info.duration, times
    frames = frames_at(path, times, info)
    while batch := [(shown, encoder.crop(frame)) for shown, frame in islice(frames, batch_size)]:
        yield batch


def _encode(decoded: Iterator[Any], encoder: ImageEncoder, thumbnails: int) -> VideoFeatures:
    """Encode the snippets of one video, and keep ``thumbnails`` evenly spaced frames."""
    duration, times = next(decoded)
    features, kept = np.empty((len(times), encoder.width), dtype=np.float32), []
    wanted = set(((np.arange(thumbnails) + 0.5) * len(times) / max(thumbnails, 1)).astype(int).tolist())
    for batch in decoded:
        for (shown, image), feature in zip(batch, encoder.encode(np.stack([image for _, image in batch])), strict=True):
            features[shown] = feature
            kept += [(float(times[snippet]), image) for snippet in shown if snippet in wanted]
    if not np.isfinite(features).all() or np.abs(features).max() > np.finfo(np.float16).max:
        raise StaleError("the image encoder gives values that half precision cannot hold: are its weights sound?")
    return VideoFeatures(features.astype(np.float16), duration, tuple(kept))
