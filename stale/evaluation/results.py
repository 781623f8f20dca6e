"""Load anyone's detections, fit them to the ground truth with every irregularity named, and apply external scores.

Detections are ActivityNet's results JSON, plain or gzipped: ``{"results": {video: [{"segment": [start, end] (seconds),
"label": "Ballet", "score": 0.9}]}}``; the inner object alone will do. Pickles are refused: opening one runs whatever
code its author put there.

External video-level scores (opt-in) are ``{"class": [K names], "results": {video: [K scores]}}`` (or ``classes``), as
the classifiers' files that ActivityNet methods share. ``kind`` in the file says whose they are, and is printed beside
the number: ``supervised`` (the default) is a classifier that was trained on the classes, usually all, the unseen ones
included: a result with it is no zero-shot result, and tells how many classes beyond the vocabulary the file has (they
are left out). ``zero_shot`` is a model without training on the classes, which ``source`` names; ``oracle`` knows them.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from stale.data.annotations import Video, match_video_ids
from stale.errors import StaleError, name_some
from stale.evaluation.mean_ap import Detections, GroundTruth, Metrics, evaluate, ground_truth
from stale.evaluation.measures import whole_videos
from stale.io import clean_ids, clean_name, read_json, read_text
from stale.records import Protocol, check_record

KINDS = ("supervised", "zero_shot", "oracle")  # of external video-level scores
ALLOW_UNSEEN = "--allow-unseen-supervision"


@dataclass(frozen=True)
class Results:
    """A detections file as columns, in its order, nothing left out and nothing checked; what is no number is NaN.

    ``video`` (N) and ``label`` (N) index the distinct names in ``videos`` and ``labels``; ``segments`` (N, 2)
    are seconds. ``protocol`` and ``external_data`` are what the file states, if anything.
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


def read_results(path: str | Path) -> Results:
    """Load a detections file: ActivityNet's results JSON, or the inner object alone.

    A file that is missing, a pickle, not JSON, or of another form is a StaleError.
    """
    content = _parse(path)
    if not isinstance(content, dict):
        raise StaleError(f"detections file {path}: an object with 'results' is expected, as ActivityNet's")
    if "results" in content:
        check_record(Protocol, content.get("protocol") or {}, f"detections file {path}, protocol", "write it again")
    entries = content.get("results", content)
    if not isinstance(entries, dict) or not all(isinstance(items, list) for items in entries.values()):
        raise StaleError(f"detections file {path}: 'results' must map each video to a list of detections")
    return results_from_dict(entries, content if "results" in content else {}, path)


def _parse(path: str | Path) -> Any:
    """Parse a detections file by a parser twice as fast as Python's, which is used where this one may miss a fault.

    The fast one silently keeps the last of equal keys: there would be more colons in the file than keys in the content.
    """
    text = read_text(path, "detections file")
    try:
        content = from_json(text, allow_inf_nan=True)
        results = content["results"]
        frame = json.dumps({**content, "results": {}}, ensure_ascii=False).count(":")
        keys = frame + len(results) + sum(map(len, chain.from_iterable(results.values())))
    except (ValueError, TypeError, LookupError, AttributeError):
        keys = -1
    return content if text.count(":") == keys else read_json(path, "detections file")


def results_from_dict(
    results: Mapping[str, Collection[Any]], content: Mapping[str, Any] | None = None, path: str | Path = "detections"
) -> Results:
    """Convert video → [{"segment": [start, end] (seconds), "label": str, "score": float}] to :class:`Results`."""
    items = list(chain.from_iterable(results.values()))
    try:  # all at once; only where something is wrong one after another
        labels, segments, scores = ([item[key] for item in items] for key in ("label", "segment", "score"))
        sound = {*map(type, labels)} <= {str} and {*map(type, segments)} <= {list, tuple}
        sound = sound and {*map(len, segments)} <= {2}
    except (TypeError, LookupError):
        sound = False
    if not sound:
        _refuse_first(results, path)
    counts = np.array([len(listed) for listed in results.values()], dtype=np.int64)
    cleaned = {label: clean_name(label) for label in dict.fromkeys(labels)}
    names = list(dict.fromkeys(cleaned.values()))
    index = {label: names.index(name) for label, name in cleaned.items()}
    protocol, external = ((content or {}).get(key) for key in ("protocol", "external_data"))
    protocol = dict(protocol) if isinstance(protocol, dict) else {}
    for key in ("classes", "unseen_classes"):
        if isinstance(protocol.get(key), list):
            protocol[key] = [clean_name(str(label)) for label in protocol[key]]
    return Results(
        videos=tuple(clean_ids(results, f"detections file {path}")),
        labels=tuple(names),
        video=np.repeat(np.arange(len(results)), counts),
        label=np.fromiter(map(index.__getitem__, labels), np.int64, len(labels)),
        segments=_numbers(list(chain.from_iterable(segments))).reshape(-1, 2),
        scores=_numbers(scores),
        protocol=protocol,
        external_data=external if isinstance(external, dict) else {},
        path=str(path),
    )


def _refuse_first(results: Mapping[str, Collection[Any]], path: str | Path) -> None:
    """Raise a StaleError that names the first detection without the fields that are needed."""
    for video, item in ((video, item) for video, listed in results.items() for item in listed):
        segment = item.get("segment") if isinstance(item, Mapping) else None
        well_formed = isinstance(segment, (list, tuple)) and len(segment) == 2 and "score" in item
        if not well_formed or not isinstance(item.get("label"), str):
            raise StaleError(
                f"detections file {path}: video '{video}': a detection needs 'segment' (two numbers), "
                f"'label' (text) and 'score', not {str(item)[:120]}"
            )


def detections(results: Mapping[str, Collection[Mapping[str, Any]]], truth: GroundTruth) -> Detections:
    """Fit dictionaries as in a detections file to ``truth``, without a report of irregularities."""
    return align(results_from_dict(results), truth)[0]


def align(
    results: Results, truth: GroundTruth, known_videos: Collection[str] = ()
) -> tuple[Detections, list[dict[str, Any]]]:
    """Fit detections to ``truth``: videos and labels become its indices, and every irregularity is reported.

    A report has the ``kind``, the ``count`` of detections, the ``names`` concerned, and their ``treatment``.
    Left out are those that are not numbers, which cannot be ranked, and those of labels outside the vocabulary.
    The rest counts as in the official evaluator: segments of negative length and detections in unknown videos are
    false positives, those in ``known_videos`` (of the subset, without tested classes) without a report. Ids may have
    or lack the prefix ``v_``.
    """
    video_index = {name: position for position, name in enumerate(truth.videos)}
    label_index = {name: position for position, name in enumerate(truth.classes)}
    matches = match_video_ids(results.videos, {*truth.videos, *known_videos})
    indices = [video_index.get(matches.get(name, ""), -1) for name in results.videos]
    video = np.array(indices, dtype=np.int64)[results.video]
    label = np.array([label_index.get(name, -1) for name in results.labels], dtype=np.int64)[results.label]
    is_known = np.array([name in matches for name in results.videos], dtype=bool)
    not_a_number = ~(np.isfinite(results.segments).all(axis=1) & np.isfinite(results.scores))
    ends = truth.durations.copy()  # or of the last instance, where that is annotated after the end
    np.maximum.at(ends, truth.video, truth.segments[:, 1])
    late = ~not_a_number & (video >= 0) & (results.segments[:, 0] > np.append(ends, 0)[video])
    late &= not truth.estimated
    shares = len(results) >= 10 and results.segments.max() <= 1 and np.median(truth.durations) >= 10  # of the videos
    backwards = ~not_a_number & (results.segments[:, 1] < results.segments[:, 0])
    of_videos, of_labels = (results.videos, results.video), (results.labels, results.label)
    problems = []
    for kind, mask, (names, index), treatment in (
        ("a segment or score that is not a number", not_a_number, of_videos, "left out"),
        ("a segment of negative length", backwards, of_videos, "counted as false positives"),
        ("a start after the end of their video", late, of_videos, "counted, but are they in seconds?"),
        ("an end within the first second", np.full(len(video), shares), of_videos, "counted, but are they in seconds?"),
        ("an unknown video", (video < 0) & ~is_known[results.video], of_videos, "counted as false positives"),
        ("a label outside the vocabulary", label < 0, of_labels, "left out"),
    ):
        if mask.any():
            concerned = list(dict.fromkeys(names[each] for each in index[mask].tolist()))
            problems.append({"kind": kind, "count": int(mask.sum()), "names": concerned, "treatment": treatment})
    keep = ~not_a_number & (label >= 0)
    return Detections(video[keep], label[keep], results.segments[keep], results.scores[keep]), problems


def evaluate_results(
    videos: Iterable[Video],
    results: Mapping[str, Collection[Mapping[str, Any]]],
    classes: Sequence[str] | None,
    tious: Sequence[float],
) -> Metrics:
    """Evaluate the ``results`` of a detections file on videos of one subset that have an instance of ``classes``."""
    truth = ground_truth(videos, classes)
    return evaluate(truth, detections(results, truth), tious)


@dataclass(frozen=True)
class VideoScores:
    """The n best classes of each video under test: ``label`` (V, n; -1 where the file has none), ``score`` (V, n)."""

    label: np.ndarray
    score: np.ndarray
    source: str

    def apply(self, found: Detections) -> Detections:
        """Overwrite labels by the video's classes and multiply scores by theirs; videos without one lose all."""
        if (found.scores < 0).any():
            raise StaleError("external scores multiply those of the detections, which must not be negative")
        found = found.take(found.video >= 0)
        ranked = [
            replace(found, label=label, scores=found.scores * score).take(label >= 0).of_segments
            for label, score in zip(self.label[found.video].T, self.score[found.video].T, strict=True)
        ]
        return Detections(*(np.concatenate([getattr(one, name) for one in ranked]) for name in vars(found)))

    def whole_videos(self, truth: GroundTruth) -> Detections:
        """The trivial row: the file's classes on the whole of each video."""
        video, rank = np.nonzero(self.label >= 0)
        return Detections(video, self.label[video, rank], whole_videos(truth, video), self.score[video, rank])


def read_video_scores(
    path: str | Path, truth: GroundTruth, allow_unseen: bool = False, top: int = 1, decay: float = 1.0
) -> VideoScores:
    """Load external video-level scores for the videos and classes under test.

    The ``top`` best classes of a video count, the score of each times ``decay`` more often than of the one before.
    A StaleError for another form, and for classes beyond those under test unless ``allow_unseen`` leaves them out; a
    classifier that was not trained on them (``zero_shot``, ``oracle``) may hold them.
    """
    content = read_json(path, "video scores")
    content = content if isinstance(content, dict) else {}
    classes, table, kind = content.get("class", content.get("classes")), content.get("results"), content.get("kind")
    if not isinstance(classes, list) or not classes or not isinstance(table, dict):
        raise StaleError(f"video scores {path}: expected are 'class' (K names) and 'results' (video → K scores)")
    if kind not in (None, *KINDS):
        raise StaleError(f"video scores {path}: kind {kind!r}; it is one of {', '.join(KINDS)}")
    kind, origin = kind or KINDS[0], str(content.get("source") or "")
    if kind == "zero_shot" and not origin:
        raise StaleError(f"video scores {path}: kind zero_shot needs 'source', the name of the model")
    position = {name: index for index, name in enumerate(truth.classes)}
    names = [clean_name(str(name)) for name in classes]
    column = np.array([position.get(name, -1) for name in names])
    beyond = [name for name in names if name not in position]
    if beyond and not allow_unseen and kind == KINDS[0]:
        raise StaleError(
            f"video scores {path}: {len(beyond)} classes beyond those under test ({name_some(beyond)}): their "
            f"classifier knows more than this test allows; {ALLOW_UNSEEN} accepts that, and is named in the table"
        )
    count = min(top, len(classes))
    label, score = np.full((len(truth.videos), count), -1), np.zeros((len(truth.videos), count))
    known = {video: index for index, video in enumerate(truth.videos)}
    ids = clean_ids(table, f"video scores {path}")
    matches = match_video_ids(ids, known)
    for name, listed in zip(ids, table.values(), strict=True):
        scores = _numbers(listed) if isinstance(listed, list) else np.empty(0)
        if len(scores) != len(classes) or not (np.isfinite(scores) & (scores >= 0)).all():  # they are factors
            wanted = f"{len(classes)} numbers from 0 are expected, such as probabilities"
            raise StaleError(f"video scores {path}: video '{name}': {wanted}, not logits")
        video = matches.get(name)
        if video is not None:
            best = np.argsort(-np.where(column >= 0, scores, -np.inf), kind="stable")[:count]
            label[known[video]] = column[best]
            score[known[video]] = scores[best] * decay ** np.arange(count) * (column[best] >= 0)
    missing = int((label[:, 0] < 0).sum())
    source = Path(path).name + (f" with {ALLOW_UNSEEN}" if allow_unseen else "")
    source += {"zero_shot": f" (zero-shot, by {origin})", "oracle": " (ORACLE)"}.get(kind, "")
    source += f", the {top} best labels of a video, decay {decay:g}" if top > 1 else ""
    source += f", nothing for {missing} of {len(label)} videos" if missing else ""
    return VideoScores(label, score, source)


def _numbers(values: list[Any]) -> np.ndarray:
    """Floats (n); whatever is not a number becomes NaN."""

    def number(value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):  # a whole number can be too long for a float
            return float("nan")

    try:
        return np.array(values, dtype=np.float64).reshape(len(values))
    except (TypeError, ValueError, OverflowError):
        return np.array([number(value) for value in values])
