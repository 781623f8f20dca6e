"""Annotations in ActivityNet's JSON layout: which action happens when in which video.

``{"database": {video: {"subset": "training", "duration": 82.73, "annotations":
[{"segment": [start, end], "label": "Ballet"}]}}}``, times in seconds, as released for ActivityNet-1.3 and,
for THUMOS14, by ActionFormer and OpenTAD.
"""

import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from stale.errors import StaleError, name_some
from stale.io import clean_ids, clean_name, read_json
from stale.segments import clip_segment

MAX_SECONDS = 1e9  # of a video
MAX_RATE = 1e3  # of frames or snippets, a second
CLIPPED, OUTSIDE, EMPTY = "clipped to their video", "dropped as outside their video", "dropped as empty"
MOST_OUTSIDE = 0.1  # of the segments, outside their video; THUMOS14 has 0.005


@dataclass(frozen=True)
class Instance:
    """One action instance: ``start`` and ``end`` in seconds and the class label."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Video:
    """One annotated video: ``duration`` in seconds, ``subset`` in lower case, ``fps`` frames a second, if known."""

    id: str
    subset: str
    duration: float
    instances: tuple[Instance, ...]
    fps: float | None = None


def read_annotations(path: str | Path, need_durations: bool = True) -> dict[str, Video]:
    """Load an annotation file as written, but for :func:`stale.io.clean_name`: videos by id in the file's order.

    It is a StaleError if the file is missing, not of this layout, or gives a key (such as a video) twice or two labels
    one ``label_id``. A missing duration is another or, without ``need_durations``, NaN.
    """
    where = f"annotation file {path}"
    content = {} if ".csv" in Path(path).suffixes else read_json(path, "annotation file")
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict):
        fix = "convert it: python scripts/prepare_data.py convert IN OUT --to activitynet"
        raise StaleError(f"{where}: JSON with a 'database' object, as in ActivityNet's layout, is expected; {fix}")
    ids = zip(clean_ids(database, where), database.values(), strict=True)
    videos = {name: parse_video(name, entry, where, need_durations) for name, entry in ids}
    parse_label_ids(database, where)
    return videos


def parse_label_ids(database: Mapping[str, Any], where: str) -> dict[str, int]:
    """The ``label_id`` of each label in a valid ``database``, where it has one; a StaleError if two labels share it."""
    ids: dict[str, int] = {}
    labels: dict[int, str] = {}
    for item in (item for entry in database.values() for item in entry.get("annotations", [])):
        label, number = clean_name(item["label"]), item.get("label_id")
        if type(number) is int:
            ids.setdefault(label, number)
            if (other := labels.setdefault(number, label)) != label:
                raise StaleError(f"{where}: '{other}' and '{label}' have one label_id ({number}); correct it")
    return ids


def repair(videos: Iterable[Video]) -> tuple[list[Video], Counter[str]]:
    """Clip segments to their video and drop those that are then empty, for training targets.

    The second value counts segments ``CLIPPED``, or dropped, because they are ``OUTSIDE`` their video or ``EMPTY``.
    Clipping less than a hundredth of a second is not counted: it is rounding in the annotation files.
    """
    repaired, changes = [], Counter[str]()
    for video in videos:
        kept = []
        for instance in video.instances:
            inside = clip_segment(instance.start, instance.end, video.duration)
            if inside is None:
                changes[OUTSIDE if _is_outside(instance, video) else EMPTY] += 1
                continue
            if max(abs(inside[0] - instance.start), abs(inside[1] - instance.end)) > 0.01:
                changes[CLIPPED] += 1
            kept.append(Instance(*inside, instance.label))
        repaired.append(replace(video, instances=tuple(kept)))
    return repaired, changes


def unit_fault(videos: Iterable[Video]) -> str:
    """Say in which subset the segments seem not to be in seconds, and in what; "" if there is none.

    More than a tenth of the segments lie outside their video, or all within the first second of longer videos.
    """
    for subset, chosen in by_subset(video for video in videos if video.instances).items():
        segments = [(video, instance) for video in chosen for instance in video.instances]
        latest = max(instance.end for _, instance in segments)
        outside = Counter(video.id for video, instance in segments if _is_outside(instance, video))
        if outside.total() > MOST_OUTSIDE * len(segments):
            wrong = [video for video in chosen if video.id in outside]
            reach = median(max(item.end for item in video.instances) / video.duration for video in wrong)
            unit = "milliseconds" if reach > 200 else "frames" if reach > 4 else "another unit than the durations"
            found = f"{outside.total()} of {len(segments)} segments lie outside their video ({name_some(outside)})"
        elif latest <= 1 and len(segments) >= 10 and median(video.duration for video in chosen) >= 10:
            found, unit = f"all {len(segments)} segments end within a second", "shares (0 to 1) of the video"
        else:
            continue
        return f"subset '{subset}': {found}: they seem to be in {unit}; convert them to seconds"
    return ""


def in_subset(videos: Iterable[Video], subset: str) -> list[Video]:
    """The videos of one subset, or of several (``validation+test``), in any case; a StaleError if one has none."""
    videos, names = list(videos), clean_name(subset).lower().split("+")
    present = {video.subset for video in videos}
    if not present.issuperset(names):
        raise StaleError(f"no video in subset '{subset}'; the annotations have: {name_some(sorted(present))}")
    return [video for video in videos if video.subset in names]


def by_subset(videos: Iterable[Video]) -> dict[str, list[Video]]:
    """The videos of each subset, sorted by subset."""
    found: dict[str, list[Video]] = {}
    for video in videos:
        found.setdefault(video.subset, []).append(video)
    return dict(sorted(found.items()))


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


def match_video_ids(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The id in ``known`` that each name means, if any. Exact matches come first, and no id is another name's too."""
    names = list(names)
    found = {name: name for name in names if name in known}
    taken = set(found)
    for name in names:
        match = None if name in found else match_video_id(name, known)
        if match is not None and match not in taken:
            found[name] = match
            taken.add(match)
    return found


def _is_outside(instance: Instance, video: Video) -> bool:
    return instance.start >= video.duration or instance.end < 0


def parse_video(name: str, entry: Any, where: str, need_duration: bool = True) -> Video:
    """The video that ``entry`` of a database describes; a StaleError that begins with ``where`` if it is invalid."""

    def expect(holds: Any, fault: str, value: Any = None) -> None:
        if not holds:  # only now is the value formatted, which takes longer than all checks
            raise StaleError(f"{where}: video '{name}': {fault.format(value)}")

    expect(isinstance(entry, dict), "an object with subset, duration and annotations is expected")
    subset, duration, annotations = entry.get("subset"), entry.get("duration"), entry.get("annotations", [])
    expect(isinstance(subset, str) and clean_name(subset), "'subset' is missing")
    if duration is None and not need_duration:
        duration = math.nan
    is_duration = _is_number(duration) and 0 < duration <= MAX_SECONDS
    expect(is_duration or duration is math.nan, "'duration' must be a positive number of seconds, not {!r}", duration)
    expect(isinstance(annotations, list), "'annotations' must be a list")
    instances = []
    for item in annotations:
        try:
            (start, end), label = item["segment"], clean_name(item["label"])
        except (TypeError, ValueError, LookupError, AttributeError):
            start = end = label = None
        sound = _is_number(start) and _is_number(end) and start <= end and label
        expect(sound, "each annotation needs a 'segment' [start, end] in seconds and a 'label', not {!r}", item)
        instances.append(Instance(float(start), float(end), str(label)))
    fps = entry.get("fps") or None
    expect(fps is None or (_is_number(fps) and 1e-5 <= fps <= MAX_RATE), "'fps' is no frame rate: {!r}", fps)
    return Video(name, clean_name(subset).lower(), float(duration), tuple(instances), fps=fps and float(fps))


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a JSON number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
