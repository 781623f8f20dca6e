"""External video-level classes (opt-in): a file that says what each video shows, and what it does to a result.

Such a file usually comes from a classifier trained on all classes, the unseen ones included, so a result with
it is no zero-shot result; it is labelled *external scores* wherever it appears, beside the trivial row of the
file's label on the whole video.

Forms, all JSON, plain or gzipped:

* ``{video: {"class": "Ballet", "score": 0.9}}`` or ``{video: ["Ballet", 0.9]}``;
* ``{"classes": [K names], "results": {video: [K scores]}}`` (also ``class`` and ``scores``), of which each
  video's best class counts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stale.data.annotations import match_video_id
from stale.errors import StaleError, name_some
from stale.evaluation.instances import Detections, GroundTruth
from stale.evaluation.measures import best_of_equals
from stale.files import read_json

FLAG = "--allow-unseen-supervision"


@dataclass(frozen=True)
class VideoScores:
    """One class and score for each video under test: ``label`` (V; -1 where the file has none), ``score`` (V)."""

    label: np.ndarray
    score: np.ndarray
    source: str

    def apply(self, found: Detections) -> Detections:
        """Overwrite labels by the video's class and multiply scores by its score; videos without one lose all."""
        found = found.take(found.video >= 0)
        label = self.label[found.video]
        scores = found.scores * self.score[found.video]
        return best_of_equals(replace(found, label=label, scores=scores).take(label >= 0))

    def whole_videos(self, truth: GroundTruth) -> Detections:
        """The trivial row: the file's class on the whole of each video."""
        video = np.flatnonzero(self.label >= 0)
        segments = np.stack([np.zeros(len(video)), truth.durations[video]], axis=1)
        return Detections(video, self.label[video], segments, self.score[video])


def read_video_scores(path: str | Path, truth: GroundTruth, allow_unseen: bool = False) -> VideoScores:
    """Read external video-level classes for the videos and classes under test.

    Args:
        allow_unseen: let the file hold classes beyond the vocabulary under test (they are left out).

    Raises:
        StaleError: unknown form, or classes beyond the vocabulary without ``allow_unseen``.
    """
    content = read_json(path, "video scores")
    if not isinstance(content, dict) or not content:
        raise StaleError(f"video scores {path}: an object of video → class and score is expected")
    classes, table = _as_table(content, path)
    beyond = [name for name in classes if name not in truth.classes]
    if beyond and not allow_unseen:
        raise StaleError(
            f"video scores {path}: {len(beyond)} classes beyond the vocabulary under test "
            f"({name_some(beyond)}): its classifier was supervised on more than this test allows; "
            f"{FLAG} accepts that, and is then named in the table"
        )
    position = {name: index for index, name in enumerate(truth.classes)}
    column = np.array([position.get(name, -1) for name in classes])
    label, score = np.full(len(truth.videos), -1), np.zeros(len(truth.videos))
    known = {video: index for index, video in enumerate(truth.videos)}
    for name, scores in table.items():
        video = match_video_id(name, known)
        in_vocabulary = np.where(column >= 0, scores, -np.inf)
        best = int(in_vocabulary.argmax())
        if video is not None and np.isfinite(in_vocabulary[best]):
            label[known[video]], score[known[video]] = column[best], in_vocabulary[best]
    missing = int((label < 0).sum())
    source = Path(path).name + (f" with {FLAG}" if allow_unseen else "")
    source += f", nothing for {missing} of {len(label)} videos" if missing else ""
    return VideoScores(label, score, source)


def _as_table(content: dict[str, Any], path: str | Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The classes (K) in the file, and of each video a score for each, minus infinity where it has none."""
    classes = content.get("classes", content.get("class"))
    if not isinstance(classes, list):
        return _from_labels(content, path)
    if not classes:
        raise StaleError(f"video scores {path}: 'classes' names none")
    table = content.get("results", content.get("scores"))
    if not isinstance(table, dict):
        raise StaleError(f"video scores {path}: 'results' must map each video to {len(classes)} scores")
    return [str(name) for name in classes], {
        video: _row(scores, len(classes), video, path) for video, scores in table.items()
    }


def _row(scores: Any, num_classes: int, video: str, path: str | Path) -> np.ndarray:
    try:
        row = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        row = np.empty(0)
    if row.shape != (num_classes,) or not np.isfinite(row).all():
        raise StaleError(f"video scores {path}: video '{video}': {num_classes} numbers are expected")
    return row


def _from_labels(content: Mapping[str, Any], path: str | Path) -> tuple[list[str], dict[str, np.ndarray]]:
    pairs = {video: _label_and_score(entry, video, path) for video, entry in content.items()}
    classes = sorted({label for label, _ in pairs.values()})
    position = {label: index for index, label in enumerate(classes)}
    table = {video: np.full(len(classes), -np.inf) for video in pairs}
    for video, (label, score) in pairs.items():
        table[video][position[label]] = score
    return classes, table


def _label_and_score(entry: Any, video: str, path: str | Path) -> tuple[str, float]:
    pair = (entry.get("class", entry.get("label")), entry.get("score")) if isinstance(entry, dict) else entry
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str):
        score = pair[1]
        if isinstance(score, (int, float)) and abs(score) <= sys.float_info.max:
            return pair[0], float(score)
    raise StaleError(f"video scores {path}: video '{video}': a class and a score are expected, not {str(entry)[:80]}")
