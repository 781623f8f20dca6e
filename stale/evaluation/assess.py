"""One evaluation from files to metrics: what ``eval.py`` prints and writes as ``metrics.json``."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stale.data.annotations import Video, match_video_ids
from stale.errors import StaleError, name_some
from stale.evaluation import measures
from stale.evaluation.aggregate import statistics
from stale.evaluation.mean_ap import Detections, GroundTruth, Metrics, drop_duplicates, evaluate, ground_truth
from stale.evaluation.results import Results, VideoScores, align
from stale.evaluation.tables import EXTERNAL_LABEL, NOT_STATED, RANDOM, TOP1_LABEL, describe, threshold_key

_PARTS = {
    "class_agnostic": measures.class_agnostic,
    "detected_segments_true_labels": measures.with_true_labels,
    "true_segments_predicted_labels": measures.with_true_segments,
}


@dataclass(frozen=True)
class Subject:
    """What is tested: the annotated ``videos`` of one or more subsets, ``classes``, thresholds, and how to count."""

    videos: tuple[Video, ...]
    classes: tuple[str, ...] | None
    tious: tuple[float, ...]
    duplicates: str = "keep"
    ground_truth: str = "all"  # or what was left out of it

    @property
    def subset(self) -> str:
        """Names of the subsets of the videos, such as ``test+validation``."""
        return "+".join(sorted({video.subset for video in self.videos}))

    def truth(self) -> GroundTruth:
        """The ground truth under this test; a StaleError if there is none."""
        truth = ground_truth(self.videos, self.classes)
        if not len(truth):
            classes = name_some(self.classes or ())
            raise StaleError(f"subset '{self.subset}' has no instance of the classes under test: {classes}")
        return drop_duplicates(truth) if self.duplicates == "drop" else truth

    def within(self, results: Results) -> "Subject":
        """Without the videos under test that have no detection, as the released code counted."""
        under_test = set(self.truth().videos)
        found = set(match_video_ids((results.videos[index] for index in np.unique(results.video)), under_test).values())
        kept = tuple(video for video in self.videos if video.id in found or video.id not in under_test)
        if not found:
            raise StaleError(f"{results.path}: no video under test has a detection")
        counted = f"ONLY IN VIDEOS WITH PREDICTIONS ({len(found)} of {len(under_test)})"
        return replace(self, videos=kept, ground_truth=counted)


@dataclass(frozen=True)
class Assessment:
    """What was compared, and how well it agrees."""

    truth: GroundTruth
    found: Detections
    metrics: dict[str, Any]  # as ``metrics.json`` holds them: fractions, null without ground truth


def assess(
    subject: Subject,
    results: Results,
    protocol: Mapping[str, Any],
    *,
    baselines: Mapping[str, Results] | None = None,
    video_scores: VideoScores | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Assessment:
    """Compute every measure of ``results``.

    ``protocol`` is what the detections file states, ``baselines`` are detections by row name (a random row is always
    added), ``video_scores`` external ones to apply (opt-in), and ``groups`` classes to show side by side, by name.
    """
    truth, tious = subject.truth(), subject.tious
    found, problems = align(results, truth, {video.id for video in subject.videos})
    trivial = {TOP1_LABEL: measures.top1_whole_video(truth, found)}
    if video_scores is not None:
        found = video_scores.apply(found)
        trivial[EXTERNAL_LABEL] = video_scores.whole_videos(truth)
    rows = {name: align(file, truth)[0] for name, file in (baselines or {}).items()}
    rows[RANDOM] = measures.random_whole_video(truth)
    measured: dict[str, tuple[Callable[..., Any], Detections]] = {
        "all": (evaluate, found),
        "average_recall": (measures.average_recall, found),
        **{name: (evaluate, row) for name, row in {**rows, **trivial}.items()},
        **{name: (measure, found) for name, measure in _PARTS.items()},  # last: they share overlaps with the recall
    }
    with ThreadPoolExecutor() as pool:  # NumPy sorts and selects, most of the work, on several cores at once
        values = dict(zip(measured, pool.map(lambda one: one[0](truth, one[1], tious), measured.values()), strict=True))
    metrics = values["all"]
    side_by_side = {f"{name} classes": summary(restrict(metrics, labels)) for name, labels in (groups or {}).items()}
    if len(side_by_side) == 2:
        side_by_side["harmonic mean"] = harmonic_mean(*side_by_side.values())
    content = {
        "protocol": applied_protocol(protocol, subject, truth, external_scores(results, video_scores)),
        **summary(metrics),
        "per_class": {
            label: {"average": _number(ap.mean()), "num_ground_truth": int(count), "mAP": _by_threshold(tious, ap)}
            for label, ap, count in zip(metrics.classes, metrics.ap.T, metrics.num_instances, strict=True)
        },
        "num_ground_truth": len(truth),
        "num_videos": len(truth.videos),
        "num_classes": len(truth.classes),
        "num_videos_without_detections": len({*range(len(truth.videos))} - {*found.video.tolist()}),
        "num_detections": len(found),
        "num_listed": len(results),
        "average_recall": values["average_recall"],
        "top1_accuracy": measures.top1_accuracy(truth, found),
        **{name: summary(values[name]) for name in _PARTS},
        "baselines": {name: summary(values[name]) for name in rows},
        "trivial": {name: summary(values[name]) for name in trivial},
        "groups": side_by_side,
        "problems": problems,
    }
    return Assessment(truth, found, content)


def summary(metrics: Metrics) -> dict[str, Any]:
    """``average_mAP``, its 95 % confidence interval over the classes, and ``mAP`` by threshold, as JSON takes them."""
    of_classes = metrics.ap.mean(axis=0)[metrics.num_instances > 0]
    interval = statistics(of_classes)["ci95"] if len(of_classes) else None
    by_threshold = _by_threshold(metrics.tious, metrics.mean_ap)
    return {"average_mAP": _number(metrics.average), "ci95": interval, "mAP": by_threshold}


def harmonic_mean(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The harmonic mean of two summaries, value by value."""

    def mean(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else 2 * a * b / max(a + b, 1e-300)

    by_threshold = {key: mean(value, second["mAP"][key]) for key, value in first["mAP"].items()}
    return {"average_mAP": mean(first["average_mAP"], second["average_mAP"]), "mAP": by_threshold}


def restrict(metrics: Metrics, labels: Sequence[str]) -> Metrics:
    """The same metrics over ``labels`` alone."""
    columns = [metrics.classes.index(label) for label in labels if label in metrics.classes]
    chosen = tuple(metrics.classes[column] for column in columns)
    return replace(metrics, classes=chosen, ap=metrics.ap[:, columns], num_instances=metrics.num_instances[columns])


def external_scores(results: Results, applied: VideoScores | None) -> str:
    """What is known of external scores: those applied here, and what the detections file says of its own."""
    used, source = results.external_data.get("used"), applied.source if applied else ""
    if used:
        stated = f"used, says the file: {results.external_data.get('details') or 'no details'}"
        return f"{source}; also {stated}" if applied else stated
    return source or ("none" if used is False else "none here, the file does not state its own")


def applied_protocol(known: Mapping[str, Any], subject: Subject, truth: GroundTruth, external: str) -> dict[str, Any]:
    """The protocol that was applied: what the files state of it, what was counted, and all in a ``line``."""
    removed = len(ground_truth(subject.videos, subject.classes)) - len(truth)
    vocabulary = str(known.get("vocabulary", "all that occur"))
    stated = ("dataset", "setting", "checkpoint", "checkpoint_chosen_on", "features")
    protocol = {
        "name": "generalized" if vocabulary == "all" else "val+test" if "+" in subject.subset else "test",
        **{key: str(known.get(key, NOT_STATED)) for key in stated},
        "split": known.get("split"),
        "split_source": str(known.get("split_source", "")),
        "subset": subject.subset,
        "vocabulary": vocabulary,
        "num_classes": len(truth.classes),
        "num_videos": len(truth.videos),
        "num_instances": len(truth),
        "tious": list(subject.tious),
        "duplicates": f"dropped ({removed})" if subject.duplicates == "drop" else "kept",
        "external_scores": external,
        "oracle": str(known.get("oracle", "none")),
        "ground_truth": subject.ground_truth,
        "skipped_videos": int(known.get("skipped_videos", 0) or 0),
    }
    return {**protocol, "line": describe(protocol)}


def _by_threshold(tious: Sequence[float] | np.ndarray, values: np.ndarray) -> dict[str, float | None]:
    return {threshold_key(tiou): _number(value) for tiou, value in zip(tious, values, strict=True)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
