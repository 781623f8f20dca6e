"""Features of many videos rescaled into one packed block, with a report of what is wrong with them.

V videos, T snippets, D feature width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stale.data.annotations import Video
from stale.data.dataset import rescale
from stale.data.features import ATTRIBUTES, FeatureStore
from stale.data.hdf5 import as_ids, new_hdf5
from stale.errors import StaleError, name_some

MISSING, UNUSABLE, CONSTANT, TOO_LARGE = "missing", "unusable", "constant", "too large for half precision"
MISFIT, RATE_UNKNOWN = "duration does not fit the annotation", "duration not checked, the rate is unknown"
LEFT_OUT = (MISSING, UNUSABLE, CONSTANT, TOO_LARGE)


@dataclass
class PackReport:
    """What was packed, and every problem by video: (video, kind, detail)."""

    path: str
    shape: tuple[int, int, int] = (0, 0, 0)
    precision: str = ""
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        """The videos that are not in the block."""
        return [video for video, kind, _ in self.problems if kind in LEFT_OUT]

    def lines(self) -> list[str]:
        """The report in words, a line a kind of problem."""
        videos, snippets, width = self.shape
        head = f"{self.path}: {videos} videos x {snippets} snippets x {width}, {self.precision}"
        counts = Counter(kind for _, kind, _ in self.problems)
        return [head, *(self._line(kind, count) for kind, count in counts.items())]

    def _line(self, kind: str, count: int) -> str:
        named = [f"{video} ({detail})" if detail else video for video, its, detail in self.problems if its == kind]
        treatment = "left out" if kind in LEFT_OUT else "packed"
        return f"{count} {kind}, {treatment}: {name_some(named)}"


def pack(
    store: FeatureStore,
    output: str | Path,
    num_snippets: int,
    precision: str = "float16",
    videos: Mapping[str, Video] | None = None,
    fps: float | None = None,
) -> PackReport:
    """Write ``features`` (V, T, D) and ``ids`` (V) into the HDF5 file ``output``, unusable videos left out.

    Args:
        precision: ``float16`` or ``float32``.
        videos: annotated videos, which are those that are wanted and whose durations are compared; None: all.
        fps: snippets a second, for features that do not record it.

    Raises:
        StaleError: not one video can be packed.
    """
    ids = sorted(store.ids) if videos is None else list(videos)
    report = PackReport(str(output), precision=precision)
    kept: list[str] = []
    with new_hdf5(output) as file:
        block = file.create_dataset(
            "features",
            (0, num_snippets, store.width),
            precision,
            maxshape=(len(ids), num_snippets, store.width),
            chunks=(1, num_snippets, store.width),  # a video each, so that it can be read where it lies
        )
        block.resize(len(ids), axis=0)
        for video_id in tqdm(ids, "pack", unit="video", leave=False):
            row = _row(store, video_id, num_snippets, precision, report)
            if row is not None:
                _check_duration(store, video_id, videos, fps, report)
                block[len(kept)] = row
                kept.append(video_id)
        if not kept:
            raise StaleError(f"nothing to pack: of {len(ids)} videos none is usable; {'; '.join(report.lines()[1:])}")
        block.resize(len(kept), axis=0)
        file["ids"] = as_ids(kept)
        file.attrs.update(_shared_attributes(store, kept))
    report.shape = (len(kept), num_snippets, store.width)
    return report


def _row(
    store: FeatureStore, video_id: str, num_snippets: int, precision: str, report: PackReport
) -> np.ndarray | None:
    """One video's rescaled features (T, D), or None and a problem in the report."""
    if store.find(video_id) is None:
        report.problems.append((video_id, MISSING, ""))
        return None
    try:
        features = store.read(video_id)
    except StaleError as error:  # not two-dimensional, another width, NaN: the message says which
        reason = str(error).removeprefix(f"features of video '{video_id}' in {store.path}: ")
        report.problems.append((video_id, UNUSABLE, reason))
        return None
    if len(features) > 1 and (features == features[0]).all():
        report.problems.append((video_id, CONSTANT, f"{len(features)} equal snippets"))
        return None
    row = rescale(torch.from_numpy(features), num_snippets).numpy()
    if precision == "float16" and np.abs(row).max() > np.finfo(np.float16).max:
        report.problems.append((video_id, TOO_LARGE, f"{np.abs(row).max():.3g}"))
        return None
    return row


def _check_duration(
    store: FeatureStore, video_id: str, videos: Mapping[str, Video] | None, fps: float | None, report: PackReport
) -> None:
    """Compare the extent of the features with the annotated duration; a second or a twentieth is rounding.

    It is the last look at it, for a packed block has no rate; training refuses only what is far off.
    """
    if videos is None:
        return
    annotated = videos[video_id].duration
    try:
        extents = store.extents(video_id, fps)
    except StaleError as error:
        report.problems.append((video_id, RATE_UNKNOWN, str(error)))
        return
    if not extents:
        report.problems.append((video_id, RATE_UNKNOWN, ""))
        return
    extent = max(extents, key=lambda extent: abs(extent - annotated))
    if abs(extent - annotated) > max(1.0, 0.05 * annotated):
        report.problems.append((video_id, MISFIT, f"{extent:.1f} s of features, {annotated:.1f} s annotated"))


def _shared_attributes(store: FeatureStore, ids: Sequence[str]) -> dict[str, str]:
    """What is recorded of all videos alike: after rescaling no rate and no duration is left."""
    records = [store.attributes(video_id) for video_id in ids]
    names = [name for name in ATTRIBUTES if name not in ("fps", "duration")]
    return {
        name: records[0][name]
        for name in names
        if name in records[0] and all(record.get(name) == records[0][name] for record in records)
    }
