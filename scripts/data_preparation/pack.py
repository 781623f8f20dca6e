"""Pack the features of many videos into one folder, and report what is wrong with them.

``features.npy`` holds the snippets of all videos one after the other; ``index.json`` says for each video its id, first
row, number of snippets, rate (null if unknown) and duration, and for all of them what the image encoder was.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stale.data.annotations import Video
from stale.data.dataset import rescale
from stale.data.features import (
    ATTRIBUTES,
    PACKED_INDEX,
    PACKED_ROWS,
    SIMULATED,
    FeatureStore,
    duration_mismatch,
    recorded_rate,
)
from stale.errors import StaleError, name_some
from stale.io import atomic_path, write_json
from stale.progress import progress_bar

Packed = tuple[str, Mapping[str, Any], np.ndarray]  # id, record, features (snippets, D)


def pack(
    store: FeatureStore,
    output: str | Path,
    *,
    num_snippets: int | None = None,
    precision: str = "float16",
    videos: Mapping[str, Video] | None = None,
    fps: float | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the usable videos of ``store`` into the packed folder ``output``.

    Args:
        num_snippets: T to rescale to; None keeps the native rate.
        videos: exactly these are packed, and their annotated durations compared; None: all.
        fps: snippets a second, for features that do not record it.

    Returns:
        Why a video was left out, by id; and why the duration of a packed one is wrong or unknown, by id.
    """
    ids = sorted(store.ids) if videos is None else list(videos)
    left_out: dict[str, str] = {}
    doubtful: dict[str, str] = {}

    def usable() -> Generator[Packed, None, None]:
        for video_id in progress_bar(ids, "pack", unit="video", leave=False):
            where = store.where(video_id)
            try:
                features, record = store.read(video_id), store.attributes(video_id)
                rate = None if store.rescaled else recorded_rate(record, where, fps)
                duration = next(iter(store.extents(video_id, len(features), fps)[-1:]), None)
                doubt = duration_mismatch(store, videos[video_id], fps) if videos else ""
                if len(features) > 1 and (features == features[0]).all():
                    raise StaleError(f"{where}: {len(features)} equal snippets")
                if num_snippets:
                    features, rate = rescale(torch.from_numpy(features), num_snippets).numpy(), None
                if precision == "float16" and (largest := np.abs(features).max()) > np.finfo(np.float16).max:
                    raise StaleError(f"{where}: {largest:.3g} is too large for half precision; pack in float32")
            except StaleError as error:
                left_out[video_id] = str(error)
                continue
            if videos and (doubt or not duration):
                doubtful[video_id] = doubt or "duration not checked, the rate is unknown"
            yield video_id, {**record, "fps": rate, "duration": duration}, features
        if len(left_out) == len(ids):
            raise StaleError(f"nothing to pack: of {len(ids)} videos none is usable: {name_some(left_out.values())}")

    common = num_snippets or (len(store.open(min(store.ids))) if store.rescaled else None)
    notes = {"snippets": common, **({SIMULATED: True} if store.simulated else {})}
    with closing(usable()) as entries:  # ends the progress bar before an error is printed
        write_packed(output, entries, width=store.width, precision=precision, notes=notes)
    return left_out, doubtful


def write_packed(
    folder: str | Path, videos: Iterable[Packed], *, width: int, precision: str, notes: Mapping[str, Any]
) -> None:
    """Write a packed folder, one video in memory at a time.

    Args:
        videos: of their records, ``fps`` and ``duration`` are kept for each video, the other :data:`ATTRIBUTES`
            where all videos share them.
        notes: further entries of the index; ``snippets`` is T, or None for the native rate.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / PACKED_ROWS).exists()):
        raise StaleError(f"cannot write {folder}: the output is a folder of its own, but something else is there")
    entries: list[dict[str, Any]] = []
    shared: set[tuple[str, Any]] | None = None
    rows = 0
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(precision)), "fortran_order": False}
    try:
        with atomic_path(folder / PACKED_ROWS) as temporary:
            with open(temporary, "wb") as file:
                # The header leaves room for the number of rows to grow, so that it is written again at the end.
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, width)})
                for video_id, record, features in videos:
                    own = {"fps": record.get("fps"), "duration": record.get("duration")}
                    entries.append({"id": video_id, "first": rows, "count": len(features), **own})
                    file.write(features.astype(precision).tobytes())
                    rows += len(features)
                    known = {(name, record[name]) for name in ATTRIBUTES if name in record and name not in own}
                    shared = known if shared is None else shared & known
                file.seek(0)
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, width)})
            (folder / PACKED_INDEX).unlink(missing_ok=True)  # an index never stands beside rows it does not describe
        write_json(folder / PACKED_INDEX, {**notes, **dict(sorted(shared or ())), "videos": entries})
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # if it is empty
        raise
