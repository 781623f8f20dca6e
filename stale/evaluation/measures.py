"""Measures beside mAP: recall, top-1 accuracy, localization alone, and where the error sits.

Sizes: G instances, N detections, V videos. All values are fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stale.evaluation.instances import Detections, GroundTruth
from stale.evaluation.mean_ap import Metrics, evaluate, overlapping_pairs

RECALL_AT = (1, 5, 10, 50, 100)


def average_recall(
    truth: GroundTruth, found: Detections, tious: Sequence[float], at: Sequence[int] = RECALL_AT
) -> dict[int, float]:
    """Share of instances that one of the ``k`` best detections of their video covers, whatever the labels.

    An instance is covered at a threshold if some detection's tIoU reaches it; the mean over the thresholds is
    taken, as for temporal proposals (ActivityNet's AR@AN, with exactly ``k`` a video). One segment that bears
    several labels counts once.
    """
    truth, found = any_class(truth, found)
    place = _rank_in_video(found)
    detection, instance, tiou = overlapping_pairs(truth, found, min(tious))
    thresholds = np.asarray(tious, dtype=np.float64)
    result = {}
    for k in at:
        among = place[detection] < k
        best = np.zeros(len(truth))
        np.maximum.at(best, instance[among], tiou[among])
        result[k] = float((best[:, None] >= thresholds).mean()) if len(truth) else float("nan")
    return result


def top1_accuracy(truth: GroundTruth, found: Detections) -> float:
    """Share of videos whose best-scored detection bears a label of the video; one without detections is wrong."""
    best = np.flatnonzero((_rank_in_video(found) == 0) & (found.video >= 0))
    num_classes = len(truth.classes)
    right = np.isin(found.video[best] * num_classes + found.label[best], truth.video * num_classes + truth.label)
    return float(right.sum() / len(truth.videos)) if truth.videos else float("nan")


def class_agnostic(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """mAP with all labels taken off: how good the segments and their ranking are.

    A segment that bears several labels counts once: a detected one with its best score, a true one (as THUMOS14's
    CliffDiving, which is Diving as well) as one instance.
    """
    truth, found = any_class(truth, found)
    table = np.column_stack([truth.video, truth.segments])
    _, distinct = np.unique(table, axis=0, return_index=True)
    return evaluate(truth.take(np.sort(distinct)), found, tious)


def with_true_labels(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """mAP of the detected segments when naming is perfect.

    Each takes the label of the instance that it overlaps most; one that overlaps none takes the video's most
    frequent label. A segment given several labels counts once.
    """
    _, segments = any_class(truth, found)
    segments = segments.take(segments.video >= 0)
    counts = np.zeros((len(truth.videos), len(truth.classes)), dtype=np.int64)
    np.add.at(counts, (truth.video, truth.label), 1)
    label = counts.argmax(axis=1)[segments.video] if len(segments) else segments.label
    detection, instance, _ = overlapping_pairs(*any_class(truth, segments), np.nextafter(0, 1))
    first = np.diff(detection, prepend=-1) != 0  # pairs are sorted by falling tIoU
    label[detection[first]] = truth.label[instance[first]]
    return evaluate(truth, replace(segments, label=label), tious)


def with_true_segments(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """mAP of the predicted labels when localization is perfect.

    Each true segment takes every label that a detection overlapping it bears, at the best of their scores ×
    tIoU: the nearer detection speaks louder.
    """
    bare = replace(truth, classes=("any",), label=np.zeros_like(truth.label))
    detection, instance, tiou = overlapping_pairs(
        bare, replace(found, label=np.zeros_like(found.label)), np.nextafter(0, 1)
    )
    weighted = found.scores[detection] * tiou
    named = instance * len(truth.classes) + found.label[detection]
    order = np.lexsort((-weighted, named))
    chosen = order[np.diff(named[order], prepend=-1) != 0]
    segment = instance[chosen]
    labelled = Detections(
        truth.video[segment], found.label[detection[chosen]], truth.segments[segment], weighted[chosen]
    )
    return evaluate(truth, labelled, tious)


def any_class(truth: GroundTruth, found: Detections) -> tuple[GroundTruth, Detections]:
    """Both with one class only; of equal segments in one video the best-scored stays."""
    found = best_of_equals(replace(found, label=np.zeros_like(found.label)))
    return replace(truth, classes=("any",), label=np.zeros_like(truth.label)), found


def best_of_equals(found: Detections) -> Detections:
    """Of detections equal in video, label and segment the best-scored, in the order they came in."""
    keys = (-found.scores, found.segments[:, 1], found.segments[:, 0], found.label, found.video)
    order = np.lexsort(keys)
    table = np.column_stack([found.video, found.label, found.segments])[order]
    is_new = np.ones(len(found), dtype=bool)
    is_new[1:] = (table[1:] != table[:-1]).any(axis=1)
    return found.take(np.sort(order[is_new]))


def _rank_in_video(found: Detections) -> np.ndarray:
    """Place of each detection among those of its video (N), 0 for the best; of ties the later comes first."""
    by_score = np.argsort(found.scores, kind="stable")[::-1]
    order = by_score[np.argsort(found.video[by_score], kind="stable")]
    video = found.video[order]
    place = np.empty(len(found), dtype=np.int64)
    place[order] = np.arange(len(found)) - np.searchsorted(video, video)
    return place
