"""Ground truth and detections as plain numpy arrays: what every measure of this package takes.

Sizes: G ground-truth instances, N detections, K classes, V videos. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stale.data.annotations import Video

DUPLICATE_TOLERANCE = 1e-3  # seconds; the tolerance of ActionFormer and OpenTAD


@dataclass(frozen=True)
class GroundTruth:
    """The instances to find, in the order of the annotation file.

    ``video`` (G) and ``label`` (G) are indices into ``videos`` and ``classes``; ``segments`` (G, 2) and
    ``durations`` (V) are seconds.
    """

    videos: tuple[str, ...]
    classes: tuple[str, ...]
    durations: np.ndarray
    video: np.ndarray
    label: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.video)

    def take(self, keep: np.ndarray) -> GroundTruth:
        """The instances that the mask or index ``keep`` names; videos and classes stay as they are."""
        return replace(self, video=self.video[keep], label=self.label[keep], segments=self.segments[keep])


@dataclass(frozen=True)
class Detections:
    """Scored segments, in the order of their file (equal scores: the later one ranks first).

    ``video`` (N) indexes the ground truth's videos, -1 for a video that has no ground truth; ``label`` (N)
    indexes its classes; ``segments`` (N, 2) are seconds; ``scores`` (N).
    """

    video: np.ndarray
    label: np.ndarray
    segments: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.video)

    def take(self, keep: np.ndarray) -> Detections:
        """The detections that the mask or index ``keep`` names."""
        return Detections(self.video[keep], self.label[keep], self.segments[keep], self.scores[keep])


def ground_truth(videos: Iterable[Video], classes: Sequence[str] | None = None) -> GroundTruth:
    """Every instance of ``classes`` exactly as annotated, and the videos that have at least one.

    Args:
        videos: annotated videos, already of one subset.
        classes: the labels under test; None takes every label that occurs, sorted.
    """
    videos = list(videos)
    if classes is None:
        classes = sorted({instance.label for video in videos for instance in video.instances})
    class_index = {label: index for index, label in enumerate(classes)}
    tested = [video for video in videos if any(item.label in class_index for item in video.instances)]
    rows = [
        (index, class_index[item.label], item.start, item.end)
        for index, video in enumerate(tested)
        for item in video.instances
        if item.label in class_index
    ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return GroundTruth(
        videos=tuple(video.id for video in tested),
        classes=tuple(classes),
        durations=np.array([video.duration for video in tested], dtype=np.float64),
        video=table[:, 0].astype(np.int64),
        label=table[:, 1].astype(np.int64),
        segments=table[:, 2:],
    )


def detections(results: Mapping[str, Collection[Mapping[str, Any]]], truth: GroundTruth) -> Detections:
    """Arrays of sound detections from dictionaries as in a detections file; nothing is checked.

    Use :func:`stale.evaluation.results.align` for files of unknown make. Labels outside ``truth.classes``
    are left out.

    Args:
        results: video → [{"segment": [start, end] (seconds), "label": str, "score": float}].
    """
    video_index = {video: index for index, video in enumerate(truth.videos)}
    class_index = {label: index for index, label in enumerate(truth.classes)}
    rows = [
        (video_index.get(video, -1), class_index[item["label"]], *item["segment"], item["score"])
        for video, items in results.items()
        for item in items
        if item["label"] in class_index
    ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return Detections(
        table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:4].copy(), table[:, 4].copy()
    )


def drop_duplicates(truth: GroundTruth) -> GroundTruth:
    """Ground truth as ActionFormer and OpenTAD count it: no empty instance, and none twice.

    Instances of one video and class are the same if both ends are within a millisecond; the first in the file
    stays. The official evaluator keeps them all.
    """
    kept: list[int] = []
    kept_of_group: dict[tuple[int, int], list[int]] = {}
    for index, group in enumerate(zip(truth.video.tolist(), truth.label.tolist(), strict=True)):
        if truth.segments[index, 0] >= truth.segments[index, 1]:
            continue
        others = kept_of_group.setdefault(group, [])
        gaps = np.abs(truth.segments[others] - truth.segments[index])
        if not (gaps <= DUPLICATE_TOLERANCE).all(axis=1).any():
            others.append(index)
            kept.append(index)
    return truth.take(np.array(kept, dtype=np.int64))
