"""Annotations in ActivityNet's JSON layout: which action happens when in which video.

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
from stale.io import read_json
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
    """How many segments :func:`repair` clipped to their video and dropped as empty."""

    clipped: int
    dropped: int


def read_annotations(path: str | Path) -> dict[str, Video]:
    """Load an annotation file exactly as written: videos by id in the file's order.

    It is a StaleError if the file is missing, not of this layout, or gives a key (such as a video) twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):  # Python's parser would silently keep the last
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise StaleError(f"annotation file {path}: given twice in the same object: {name_some(twice)}")
        return content

    content = read_json(path, "annotation file", pairs_hook=unique)
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict):
        raise StaleError(f"annotation file {path}: no 'database' object; ActivityNet's JSON layout is expected")
    return {name: _parse_video(name, entry, path) for name, entry in database.items()}


def repair(videos: Iterable[Video]) -> tuple[list[Video], Repairs]:
    """Clip segments to their video and drop those that are then empty, for training targets.

    Clipping less than a hundredth of a second is not counted: it is rounding in the annotation files.
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
    """The videos of one subset, in any case; a StaleError if there are none."""
    videos = list(videos)
    chosen = [video for video in videos if video.subset == subset.lower()]
    if not chosen:
        found = sorted({video.subset for video in videos})
        raise StaleError(f"no video in subset '{subset}'; the annotations have: {name_some(found)}")
    return chosen


def all_labels(videos: Iterable[Video]) -> list[str]:
    """Every class label that occurs, sorted."""
    return sorted({instance.label for video in videos for instance in video.instances})


def with_any_of(videos: Iterable[Video], classes: Collection[str]) -> list[Video]:
    """The videos with at least one instance of ``classes``."""
    wanted = set(classes)
    return [video for video in videos if any(instance.label in wanted for instance in video.instances)]


def match_video_id(video_id: str, known: Collection[str]) -> str | None:
    """The id in ``known`` that means ``video_id``: itself (some begin with ``v_``), or with ``v_`` added or removed."""
    for candidate in (video_id, f"v_{video_id}", video_id.removeprefix("v_")):
        if candidate in known:
            return candidate
    return None


def _parse_video(name: str, entry: Any, path: str | Path) -> Video:
    def expect(holds: Any, fault: str) -> None:
        if not holds:
            raise StaleError(f"annotation file {path}: video '{name}': {fault}")

    expect(isinstance(entry, dict), "an object with subset, duration and annotations is expected")
    subset, duration, annotations = entry.get("subset"), entry.get("duration"), entry.get("annotations", [])
    expect(isinstance(subset, str), "'subset' is missing")
    is_duration = _is_number(duration) and duration > 0
    expect(is_duration, f"'duration' must be a positive number of seconds, not {duration!r}")
    expect(isinstance(annotations, list), "'annotations' must be a list")
    instances = []
    for item in annotations:
        parsed: dict[str, Any] = item if isinstance(item, dict) else {}
        segment, label = parsed.get("segment", ()), parsed.get("label", "")
        is_segment = isinstance(segment, list) and len(segment) == 2 and all(map(_is_number, segment))
        expect(is_segment, f"each annotation needs a 'segment' of two numbers (seconds), not {item!r}")
        expect(isinstance(label, str) and label.strip(), f"each annotation needs a 'label', not {item!r}")
        expect(segment[0] <= segment[1], f"segment {segment} ends before it starts")
        instances.append(Instance(float(segment[0]), float(segment[1]), label))
    return Video(name, subset.lower(), float(duration), tuple(instances))


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a JSON number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
