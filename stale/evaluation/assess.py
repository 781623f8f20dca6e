"""One evaluation from files to figures: what ``eval.py`` prints and writes as ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stale.data.annotations import Video, match_video_id
from stale.errors import StaleError, name_some
from stale.evaluation import measures
from stale.evaluation.instances import Detections, GroundTruth, drop_duplicates, ground_truth
from stale.evaluation.mean_ap import Metrics, evaluate
from stale.evaluation.protocol import NOT_STATED, Protocol, external_scores, threshold_key
from stale.evaluation.results import Problem, Results, align, refuse
from stale.evaluation.video_scores import VideoScores

CHANCE = "chance"
OWN_LABEL = "own_top_label_whole_video"
EXTERNAL_LABEL = "external_label_whole_video"
ROW_NAMES = {
    "whole_video": "untrained: best class name on the whole video",
    "snippets": "untrained: snippets alike to a class name",
    CHANCE: "untrained: every class on the whole video, by lot",
    OWN_LABEL: "no localization: its top label on the whole video",
    EXTERNAL_LABEL: "trivial: the external label on the whole video",
}


@dataclass(frozen=True)
class Subject:
    """What is tested: the annotated ``videos`` of one subset, the ``classes`` and thresholds, the counting."""

    videos: tuple[Video, ...]
    classes: tuple[str, ...] | None
    tious: tuple[float, ...]
    duplicates: str = "keep"
    ground_truth: str = "all"  # or what was left out of it

    def truth(self) -> GroundTruth:
        """The ground truth under this test.

        Raises:
            StaleError: there is none.
        """
        truth = ground_truth(self.videos, self.classes)
        if not len(truth):
            raise StaleError(
                f"subset '{self.videos[0].subset}' has no instance of the classes under test: "
                f"{name_some(self.classes or ())}"
            )
        return drop_duplicates(truth) if self.duplicates == "drop" else truth

    def within(self, results: Results) -> Subject:
        """The test without the videos that have no detection, as the released code counted: never a headline.

        Raises:
            StaleError: no video under test has any.
        """
        under_test = set(self.truth().videos)
        found = {match_video_id(results.videos[index], under_test) for index in np.unique(results.video)}
        kept = tuple(video for video in self.videos if video.id in found)
        if not kept:
            raise StaleError(f"{results.path}: no video under test has a detection")
        counted = f"ONLY IN VIDEOS WITH PREDICTIONS ({len(kept)} of {len(under_test)})"
        return replace(self, videos=kept, ground_truth=counted)

    def align(self, results: Results, truth: GroundTruth, strict: bool) -> tuple[Detections, list[Problem]]:
        """Detections fitted to ``truth``; with ``strict`` any problem is a StaleError."""
        found, problems = align(results, truth, {video.id for video in self.videos})
        if strict:
            refuse(problems, results.path)
        return found, problems


@dataclass(frozen=True)
class Assessment:
    """All figures of one detections file under one protocol.

    ``untrained`` and ``trivial`` are rows by name (see ``ROW_NAMES``); ``groups`` are sets of classes (seen,
    unseen) shown side by side.
    """

    protocol: Protocol
    truth: GroundTruth
    found: Detections
    metrics: Metrics
    class_agnostic: Metrics
    true_labels: Metrics
    true_segments: Metrics
    recall: dict[int, float]
    top1: float
    problems: list[Problem]
    untrained: dict[str, Metrics] = field(default_factory=dict)
    trivial: dict[str, Metrics] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The content of ``metrics.json``; fractions 0..1, null where there is no ground truth."""
        return {
            "protocol": self.protocol.as_dict(),
            **figures(self.metrics),
            "num_ground_truth": len(self.truth),
            "num_videos": len(self.truth.videos),
            "num_classes": len(self.truth.classes),
            "num_detections": len(self.found),
            "average_recall": {str(k): _number(value) for k, value in self.recall.items()},
            "top1_accuracy": _number(self.top1),
            "class_agnostic": summary(self.class_agnostic),
            "detected_segments_true_labels": summary(self.true_labels),
            "true_segments_predicted_labels": summary(self.true_segments),
            "untrained": {name: figures(metrics) for name, metrics in self.untrained.items()},
            "trivial": {name: figures(metrics) for name, metrics in self.trivial.items()},
            "groups": self.side_by_side(),
            "problems": [
                {"kind": one.kind, "count": one.count, "names": list(one.names), "treatment": one.treatment}
                for one in self.problems
            ],
        }

    def side_by_side(self) -> dict[str, Any]:
        """The summary over each group of classes and, of two groups, their harmonic mean."""
        rows = {f"{name} classes": summary(restrict(self.metrics, labels)) for name, labels in self.groups.items()}
        if len(rows) == 2:
            rows["harmonic mean"] = harmonic_mean(*rows.values())
        return rows


def assess(
    subject: Subject,
    results: Results,
    protocol: Mapping[str, Any],
    untrained: Mapping[str, Results] | None = None,
    video_scores: VideoScores | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    strict: bool = False,
) -> Assessment:
    """Evaluate ``results`` in every way this package knows.

    Args:
        protocol: ``dataset``, ``setting`` and whatever else of :class:`Protocol` is known.
        untrained: detections of untrained baselines by row name; a row by chance is always added.
        video_scores: external video-level classes to apply; opt-in, labelled wherever shown.
        groups: classes to show side by side, by name.

    Raises:
        StaleError: a problem with the detections under ``strict``.
    """
    truth = subject.truth()
    found, problems = subject.align(results, truth, strict)
    external = external_scores(results.external_data, video_scores.source if video_scores else None)
    trivial = {OWN_LABEL: evaluate(truth, own_label_whole_video(truth, found), subject.tious)}
    if video_scores is not None:
        found = video_scores.apply(found)
        trivial[EXTERNAL_LABEL] = evaluate(truth, video_scores.whole_videos(truth), subject.tious)
    rows = {CHANCE: evaluate(truth, by_lot(truth), subject.tious)}
    for name, file in (untrained or {}).items():
        rows[name] = evaluate(truth, subject.align(file, truth, strict)[0], subject.tious)
    return Assessment(
        protocol=describe(subject, truth, protocol, external),
        truth=truth,
        found=found,
        metrics=evaluate(truth, found, subject.tious),
        class_agnostic=measures.class_agnostic(truth, found, subject.tious),
        true_labels=measures.with_true_labels(truth, found, subject.tious),
        true_segments=measures.with_true_segments(truth, found, subject.tious),
        recall=measures.average_recall(truth, found, subject.tious),
        top1=measures.top1_accuracy(truth, found),
        problems=problems,
        untrained=rows,
        trivial=trivial,
        groups={name: tuple(labels) for name, labels in (groups or {}).items()},
    )


def describe(subject: Subject, truth: GroundTruth, known: Mapping[str, Any], external: str) -> Protocol:
    """The protocol that was in fact applied: ``known`` words of the files, counted figures for the rest."""
    removed = len(ground_truth(subject.videos, subject.classes)) - len(truth)
    return Protocol(
        dataset=str(known.get("dataset", NOT_STATED)),
        setting=str(known.get("setting", NOT_STATED)),
        split=known.get("split"),
        split_source=str(known.get("split_source", "")),
        subset=subject.videos[0].subset,
        vocabulary=str(known.get("vocabulary", "all that occur")),
        num_classes=len(truth.classes),
        num_videos=len(truth.videos),
        num_instances=len(truth),
        tious=subject.tious,
        duplicates=f"dropped ({removed})" if subject.duplicates == "drop" else "kept",
        external_scores=external,
        checkpoint=str(known.get("checkpoint", NOT_STATED)),
        checkpoint_chosen_on=str(known.get("checkpoint_chosen_on", NOT_STATED)),
        features=str(known.get("features", NOT_STATED)),
        oracle=str(known.get("oracle", "none")),
        ground_truth=subject.ground_truth,
        skipped_videos=int(known.get("skipped_videos", 0) or 0),
    )


def by_lot(truth: GroundTruth, seed: int = 0) -> Detections:
    """The row that knows nothing: every class on the whole of every video, ranked by lot."""
    num_videos, num_classes = len(truth.videos), len(truth.classes)
    video = np.repeat(np.arange(num_videos), num_classes)
    label = np.tile(np.arange(num_classes), num_videos)
    scores = np.random.default_rng(seed).random(len(video))
    return Detections(video, label, _whole(truth, video), scores)


def own_label_whole_video(truth: GroundTruth, found: Detections) -> Detections:
    """What the detections are worth without their segments: each video's best-scored label on all of it."""
    order = np.lexsort((np.arange(len(found)), found.scores, found.video))[::-1]
    best = order[np.diff(found.video[order], prepend=len(truth.videos)) != 0]
    best = best[found.video[best] >= 0]
    video = found.video[best]
    return Detections(video, found.label[best], _whole(truth, video), found.scores[best])


def figures(metrics: Metrics) -> dict[str, Any]:
    """``average_mAP``, ``mAP`` by threshold and ``per_class``, as JSON takes them."""
    per_class = {
        label: {"average": _number(ap.mean()), "mAP": _by_threshold(metrics, ap), "num_ground_truth": int(count)}
        for label, ap, count in zip(metrics.classes, metrics.ap.T, metrics.num_instances, strict=True)
    }
    return {**summary(metrics), "per_class": per_class}


def summary(metrics: Metrics) -> dict[str, Any]:
    """``average_mAP`` and ``mAP`` by threshold."""
    return {"average_mAP": _number(metrics.average), "mAP": _by_threshold(metrics, metrics.mean_ap)}


def harmonic_mean(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Of two summaries, figure by figure: high only if both are."""
    mean = {key: _harmonic(value, second["mAP"][key]) for key, value in first["mAP"].items()}
    return {"average_mAP": _harmonic(first["average_mAP"], second["average_mAP"]), "mAP": mean}


def restrict(metrics: Metrics, labels: Sequence[str]) -> Metrics:
    """The same metrics over ``labels`` alone."""
    columns = [metrics.classes.index(label) for label in labels if label in metrics.classes]
    return replace(
        metrics,
        classes=tuple(metrics.classes[column] for column in columns),
        ap=metrics.ap[:, columns],
        num_instances=metrics.num_instances[columns],
    )


def _whole(truth: GroundTruth, video: np.ndarray) -> np.ndarray:
    return np.stack([np.zeros(len(video)), truth.durations[video]], axis=1)


def _by_threshold(metrics: Metrics, values: np.ndarray) -> dict[str, float | None]:
    return {threshold_key(t): _number(value) for t, value in zip(metrics.tious, values, strict=True)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _harmonic(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return None
    return 2 * first * second / (first + second) if first + second else 0.0
