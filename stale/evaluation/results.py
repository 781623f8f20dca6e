"""Reading anyone's detections, and fitting them to the ground truth with every oddity reported by name.

Understood, plain or gzipped:

* ActivityNet's results JSON, which OpenTAD writes as well: ``{"results": {video: [{"segment": [start, end]
  (seconds), "label": "Ballet", "score": 0.9}]}}``; the inner object alone will do;
* ActionFormer's dictionary of columns, as JSON: ``{"video-id": [...], "t-start": [...], "t-end": [...],
  "label": [...], "score": [...]}``, labels being names or the ``label_id`` of the annotations.

Pickles are refused: opening one runs whatever code its author put there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stale.data.annotations import match_video_id
from stale.errors import StaleError, name_some
from stale.evaluation.instances import Detections, GroundTruth
from stale.files import read_json

COLUMNS = ("video-id", "t-start", "t-end", "label", "score")


@dataclass(frozen=True)
class Results:
    """A detections file as columns, in its order, nothing left out and nothing checked.

    ``video`` (N) and ``label`` (N) index the distinct names in ``videos`` and ``labels``; ``segments`` (N, 2)
    are seconds; ``scores`` (N). What is not a number is NaN. ``protocol`` and ``external_data`` are the
    file's own words, if it has any.
    """

    videos: tuple[str, ...]
    labels: tuple[str, ...]
    video: np.ndarray
    label: np.ndarray
    segments: np.ndarray
    scores: np.ndarray
    protocol: dict[str, Any] = field(default_factory=dict)
    external_data: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True)
class Problem:
    """One kind of odd detection: how many there are, the names concerned, and what was done with them."""

    kind: str
    count: int
    names: tuple[str, ...]
    treatment: str

    def __str__(self) -> str:
        plural = "" if self.count == 1 else "s"
        return f"{self.count} detection{plural} with {self.kind}: {name_some(self.names)}; {self.treatment}"


def read_results(path: str | Path, label_ids: Callable[[], Mapping[int, str]] = dict) -> Results:
    """Read a detections file of any of the forms above.

    Args:
        label_ids: gives the class of each integer label; called only for files that number their classes.

    Raises:
        StaleError: the file is missing, a pickle, not JSON, or of none of these forms.
    """
    _refuse_pickle(path)
    content = read_json(path, "detections file", pairs_hook=_unique_keys(path))
    if not isinstance(content, dict):
        raise StaleError(f"detections file {path}: an object with 'results' is expected, as ActivityNet's")
    if all(isinstance(content.get(name), list) for name in COLUMNS):
        return _from_columns(content, path, label_ids)
    entries = content.get("results", content)
    if not isinstance(entries, dict) or not all(isinstance(items, list) for items in entries.values()):
        raise StaleError(
            f"detections file {path}: 'results' must map each video to a list of detections "
            f"(or the file hold the columns {', '.join(COLUMNS)})"
        )
    return _from_entries(entries, content if "results" in content else {}, path)


def results_from_dict(results: Mapping[str, Collection[Mapping[str, Any]]]) -> Results:
    """:class:`Results` from video → [{"segment": [start, end] (seconds), "label": str, "score": float}].

    Raises:
        StaleError: a detection lacks one of these.
    """
    return _from_entries({video: list(items) for video, items in results.items()}, {}, "detections")


def align(results: Results, truth: GroundTruth, known_videos: Collection[str] = ()) -> tuple[Detections, list[Problem]]:
    """Detections to count, with videos and labels as indices into ``truth``, and all that was odd.

    Left out are those that are not numbers, which cannot be ranked or placed, and those of labels outside the
    vocabulary. The rest counts as in the official evaluator: segments of negative length and detections in
    unknown videos are false positives. Ids may have or lack the prefix ``v_``.

    Args:
        known_videos: ids that may occur without ground truth (videos of the subset without tested classes);
            their detections are false positives too, but no cause for complaint.
    """
    video = _video_indices(results.videos, truth.videos)[results.video]
    label = _label_indices(results.labels, truth.classes)[results.label]
    is_known = np.array([match_video_id(name, known_videos) is not None for name in results.videos], dtype=bool)
    unknown_video = (video < 0) & ~is_known[results.video]
    unknown_label = label < 0
    bad_number = ~(np.isfinite(results.segments).all(axis=1) & np.isfinite(results.scores))
    backwards = ~bad_number & (results.segments[:, 1] < results.segments[:, 0])
    in_videos = np.array(results.videos, dtype=object)[results.video]
    with_labels = np.array(results.labels, dtype=object)[results.label]
    found = [
        ("a segment or score that is not a number", bad_number, in_videos, "left out"),
        ("a segment of negative length", backwards, in_videos, "counted as false positives"),
        ("an unknown video", unknown_video, in_videos, "counted as false positives"),
        ("a label outside the vocabulary", unknown_label, with_labels, "left out"),
    ]
    problems = [
        Problem(kind, int(mask.sum()), tuple(dict.fromkeys(names[mask])), treatment)
        for kind, mask, names, treatment in found
        if mask.any()
    ]
    keep = ~bad_number & ~unknown_label
    return Detections(video[keep], label[keep], results.segments[keep], results.scores[keep]), problems


def refuse(problems: Iterable[Problem], path: str | Path) -> None:
    """What ``--strict`` does: any problem is an error.

    Raises:
        StaleError: there is one; all are named.
    """
    problems = list(problems)
    if problems:
        faults = "; ".join(f"{one.count} with {one.kind} ({name_some(one.names)})" for one in problems)
        raise StaleError(f"detections file {path}: detections {faults}; mend the file or leave out --strict")


def _refuse_pickle(path: str | Path) -> None:
    try:
        with open(path, "rb") as file:
            is_pickle = file.read(1) == b"\x80"
    except OSError:
        return  # read_json says what is wrong
    if is_pickle:
        raise StaleError(
            f"detections file {path} is a pickle, which is not opened because it can run any code; "
            f"write its columns ({', '.join(COLUMNS)}) as lists in a JSON file"
        )


def _unique_keys(path: str | Path) -> Any:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise StaleError(f"detections file {path}: listed twice: {name_some(twice)}")
        return result

    return hook


def _from_entries(entries: dict[str, list[Any]], content: dict[str, Any], path: str | Path) -> Results:
    items = [item for listed in entries.values() for item in listed]
    try:
        segments = [item["segment"] for item in items]
        names = [item["label"] for item in items]
        scores = [item["score"] for item in items]
    except (KeyError, TypeError):
        raise _first_fault(entries, path) from None
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in segments):
        raise _first_fault(entries, path)
    if not all(isinstance(name, str) for name in names):
        raise _first_fault(entries, path)
    labels, label = _distinct(names)
    counts = np.array([len(listed) for listed in entries.values()], dtype=np.int64)
    return Results(
        videos=tuple(entries),
        labels=labels,
        video=np.repeat(np.arange(len(entries)), counts),
        label=label,
        segments=_numbers([value for pair in segments for value in pair]).reshape(-1, 2),
        scores=_numbers(scores),
        protocol=_object(content, "protocol"),
        external_data=_object(content, "external_data"),
        path=str(path),
    )


def _from_columns(content: dict[str, Any], path: str | Path, label_ids: Callable[[], Mapping[int, str]]) -> Results:
    lengths = {name: len(content[name]) for name in COLUMNS}
    if len(set(lengths.values())) > 1:
        raise StaleError(f"detections file {path}: columns differ in length: {lengths}")
    videos, video = _distinct([str(name) for name in content["video-id"]])
    names = content["label"]
    known = {} if all(isinstance(name, str) for name in names) else label_ids()
    labels, label = _distinct([_label_name(name, known, path) for name in names])
    segments = np.stack([_numbers(content["t-start"]), _numbers(content["t-end"])], axis=1)
    return Results(videos, labels, video, label, segments, _numbers(content["score"]), path=str(path))


def _label_name(label: Any, label_ids: Mapping[int, str], path: str | Path) -> str:
    if isinstance(label, str):
        return label
    if not isinstance(label, (int, float)) or label not in label_ids:
        raise StaleError(
            f"detections file {path}: label {label!r} is not a class name, and the annotations give no "
            f"'label_id' {label!r}; write class names"
        )
    return label_ids[label]


def _first_fault(entries: dict[str, list[Any]], path: str | Path) -> StaleError:
    for video, items in entries.items():
        for item in items:
            segment = item.get("segment") if isinstance(item, dict) else None
            sound = isinstance(segment, (list, tuple)) and len(segment) == 2 and "score" in item
            if not sound or not isinstance(item.get("label"), str):
                return StaleError(
                    f"detections file {path}: video '{video}': a detection needs 'segment' (two numbers), "
                    f"'label' (text) and 'score', not {str(item)[:120]}"
                )
    raise AssertionError("called without a fault")


def _numbers(values: list[Any]) -> np.ndarray:
    """Floats (n); whatever is not a number becomes NaN."""
    try:
        return np.array(values, dtype=np.float64).reshape(len(values))
    except (TypeError, ValueError, OverflowError):  # a whole number can be too long for a float
        return np.array([_number(value) for value in values])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _distinct(names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct names in order of appearance, and the index of each (n)."""
    index: dict[str, int] = {}
    indices = np.array([index.setdefault(name, len(index)) for name in names], dtype=np.int64)
    return tuple(index), indices


def _object(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _video_indices(names: Iterable[str], known: Iterable[str]) -> np.ndarray:
    index = {name: position for position, name in enumerate(known)}
    matches = (match_video_id(name, index) for name in names)
    return np.array([-1 if name is None else index[name] for name in matches], dtype=np.int64)


def _label_indices(names: Iterable[str], known: Iterable[str]) -> np.ndarray:
    index = {name: position for position, name in enumerate(known)}
    return np.array([index.get(name.strip(), -1) for name in names], dtype=np.int64)
