"""Annotations in ActivityNet's JSON layout: who does what, when.

``{"database": {video: {"subset": "training", "duration": 82.73, "annotations":
[{"segment": [start, end], "label": "Ballet"}]}}}``, times in seconds, as released for ActivityNet-1.3 and,
for THUMOS14, by ActionFormer and OpenTAD.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stale.errors import StaleError, name_some
from stale.files import read_json
from stale.segments import clip_segment


@dataclass(frozen=True)
class Instance:
    """One action instance: ``start`` and ``end`` in seconds and the class label."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Video:
    """One annotated video: ``duration`` in seconds, ``subset`` in lower case."""

    id: str
    subset: str
    duration: float
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class Repairs:
    """What :func:`repair` changed: numbers of segments clipped to the video and dropped as empty."""

    clipped: int
    dropped: int


def read_annotations(path: str | Path) -> dict[str, Video]:
    """Read an annotation file exactly as written (evaluation counts every segment of the file).

    Returns:
        Videos by id, in the file's order.

    Raises:
        StaleError: the file is missing, is not of this layout, or names a video twice.
    """
    content = read_json(path, "annotation file", pairs_hook=_reject_duplicates)
    _refuse_duplicates(content, f"annotation file {path}")
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, (dict, _Duplicates)):
        raise StaleError(f"annotation file {path}: no 'database' object; ActivityNet's JSON layout is expected")
    if isinstance(database, _Duplicates):
        raise StaleError(f"annotation file {path}: video listed twice: {name_some(database.keys)}")
    return {name: _parse_video(name, entry, path) for name, entry in database.items()}


def repair(videos: Iterable[Video]) -> tuple[list[Video], Repairs]:
    """Clip segments to their video and drop those that are then empty, for training targets.

    Returns:
        The videos with sound segments only, and how many segments were clipped and dropped. Ends less than
        a hundredth of a second late are rounding of the annotation files: clipped, not counted.
    """
    repaired, clipped, dropped = [], 0, 0
    for video in videos:
        kept = []
        for instance in video.instances:
            inside = clip_segment(instance.start, instance.end, video.duration)
            if inside is None:
                dropped += 1
                continue
            clipped += max(abs(inside[0] - instance.start), abs(inside[1] - instance.end)) > 0.01
            kept.append(Instance(*inside, instance.label))
        repaired.append(replace(video, instances=tuple(kept)))
    return repaired, Repairs(clipped, dropped)


def in_subset(videos: Iterable[Video], subset: str) -> list[Video]:
    """The videos of one subset; the name matches without regard to case.

    Raises:
        StaleError: no video is in that subset.
    """
    videos = list(videos)
    chosen = [video for video in videos if video.subset == subset.lower()]
    if not chosen:
        found = sorted({video.subset for video in videos})
        raise StaleError(f"no video in subset '{subset}'; the annotations have: {name_some(found)}")
    return chosen


def all_labels(videos: Iterable[Video]) -> list[str]:
    """Every class label that occurs, sorted."""
    return sorted({instance.label for video in videos for instance in video.instances})


def match_video_id(video_id: str, known: Collection[str]) -> str | None:
    """The id in ``known`` that means ``video_id``: itself, or with ``v_`` put before or taken off.

    The exact id wins: some ActivityNet ids begin with ``v_`` themselves.
    """
    for candidate in (video_id, f"v_{video_id}", video_id.removeprefix("v_")):
        if candidate in known:
            return candidate
    return None


class _Duplicates:
    """A JSON object in which keys occur twice (Python's parser would silently keep the last)."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Duplicates:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    counts = Counter(key for key, _ in pairs)
    return _Duplicates(sorted(key for key, count in counts.items() if count > 1))


def _refuse_duplicates(value: Any, where: str) -> None:
    if isinstance(value, _Duplicates):
        raise StaleError(f"{where}: key given twice: {name_some(value.keys)}")


def _parse_video(name: str, entry: Any, path: str | Path) -> Video:
    where = f"annotation file {path}: video '{name}'"
    _refuse_duplicates(entry, where)
    if not isinstance(entry, dict):
        raise StaleError(f"{where}: an object with subset, duration and annotations is expected")
    subset, duration = entry.get("subset"), entry.get("duration")
    if not isinstance(subset, str):
        raise StaleError(f"{where}: 'subset' is missing")
    if not _is_number(duration) or duration <= 0:
        raise StaleError(f"{where}: 'duration' must be a positive number of seconds, not {duration!r}")
    annotations = entry.get("annotations", [])
    if not isinstance(annotations, list):
        raise StaleError(f"{where}: 'annotations' must be a list")
    instances = tuple(_parse_instance(item, where) for item in annotations)
    return Video(name, subset.lower(), float(duration), instances)


def _parse_instance(item: Any, where: str) -> Instance:
    _refuse_duplicates(item, where)
    segment = item.get("segment") if isinstance(item, dict) else None
    if not (isinstance(segment, list) and len(segment) == 2 and all(map(_is_number, segment))):
        raise StaleError(f"{where}: each annotation needs a 'segment' of two numbers (seconds), not {item!r}")
    label = item.get("label")
    if not isinstance(label, str) or not label.strip():
        raise StaleError(f"{where}: each annotation needs a 'label', not {item!r}")
    start, end = map(float, segment)
    if start > end:
        raise StaleError(f"{where}: segment {segment} ends before it starts")
    return Instance(start, end, label)


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a finite JSON number; a whole number too long for a float is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
