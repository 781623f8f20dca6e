"""Mean average precision over tIoU thresholds, exactly as the official ActivityNet evaluator counts.

Of each class, detections go by falling score; each takes, of its own video's instances of its class that are
still free, the one with the highest tIoU if that reaches the threshold, and is a false positive otherwise. AP is
the area under the interpolated precision-recall curve; mAP is the mean over the classes with ground truth.

Ties, which the official evaluator leaves to an unstable sort, are settled here: of equal scores, and of equal
tIoUs, the later in its file comes first. That is the official order wherever its sort happens to be stable.
Where it divides zero by zero (an empty detection against an empty instance) the tIoU is 0 here.

Sizes: G instances, N detections, K classes, R thresholds, P pairs of a detection and an instance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stale.data.annotations import Video
from stale.evaluation.instances import Detections, GroundTruth, detections, ground_truth

BLOCK = 1 << 16  # detections looked at together: few enough for the cache, enough to make calls cheap


@dataclass(frozen=True)
class Metrics:
    """``ap`` (R, K) of each threshold and class, as fractions; NaN for a class without ground truth.

    ``num_instances`` (K) counts the ground truth of each class.
    """

    classes: tuple[str, ...]
    tious: np.ndarray
    ap: np.ndarray
    num_instances: np.ndarray
    num_videos: int

    @property
    def mean_ap(self) -> np.ndarray:
        """mAP at each threshold (R): the mean over the classes that have ground truth."""
        counted = self.num_instances > 0
        return self.ap[:, counted].mean(axis=1) if counted.any() else np.full(len(self.tious), np.nan)

    @property
    def average(self) -> float:
        """Average mAP: the mean over the thresholds."""
        return float(self.mean_ap.mean())


def evaluate(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """AP of every class at every threshold.

    Args:
        truth: from :func:`stale.evaluation.instances.ground_truth`.
        found: from :func:`stale.evaluation.results.align` or :func:`stale.evaluation.instances.detections`.
        tious: thresholds (R).
    """
    order = rank(found)
    thresholds = np.asarray(tious, dtype=np.float64)
    num_instances = np.bincount(truth.label, minlength=len(truth.classes))
    num_found = np.bincount(found.label, minlength=len(truth.classes))
    starts = np.cumsum(num_found) - num_found  # where each class begins in the order
    ap = np.full((len(thresholds), len(truth.classes)), np.nan)
    for row, (correct, _) in zip(ap, match(truth, found, order, thresholds), strict=True):
        bounds = np.searchsorted(correct, np.append(starts, len(found)))
        for label in np.flatnonzero(num_instances):
            places = correct[bounds[label] : bounds[label + 1]] - starts[label]
            row[label] = average_precision(places, num_instances[label])
    return Metrics(truth.classes, thresholds, ap, num_instances, len(truth.videos))


def evaluate_results(
    videos: Iterable[Video],
    results: Mapping[str, Collection[Mapping[str, Any]]],
    classes: Sequence[str] | None,
    tious: Sequence[float],
) -> Metrics:
    """:func:`evaluate` on annotated videos of one subset and a detections file's ``results``.

    Args:
        videos: annotated videos of the subset; those without an instance of ``classes`` do not count.
        results: video → [{"segment": [start, end] (seconds), "label": str, "score": float}].
        classes: the labels under test; None takes every label of ``videos``.
        tious: thresholds (R).
    """
    truth = ground_truth(videos, classes)
    return evaluate(truth, detections(results, truth), tious)


def rank(found: Detections) -> np.ndarray:
    """The order (N) in which detections are counted: by class, falling score, later in the file first."""
    if not len(found):
        return np.empty(0, dtype=np.int64)
    label = found.label.astype(np.min_scalar_type(found.label.max()))  # small integers sort in linear time
    order = np.argsort(label, kind="stable")
    ends = np.cumsum(np.bincount(found.label))
    for of_class in np.split(order, ends[:-1]):  # views: sorting class by class stays in the cache
        of_class[:] = of_class[np.argsort(found.scores[of_class], kind="stable")[::-1]]
    return order


def match(
    truth: GroundTruth, found: Detections, order: np.ndarray, tious: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The true positives at each threshold.

    Args:
        order: detections in the order in which they choose (N), as :func:`rank` gives it.
        tious: thresholds (R).

    Returns:
        For each threshold the true positives as places in ``order``, rising, and the instance that each took.
    """
    detection, instance, tiou = overlapping_pairs(truth, found, min(tious))
    index_type = np.min_scalar_type(len(found))  # half the memory to walk at random
    place = np.empty(len(found), dtype=index_type)
    place[order] = np.arange(len(found), dtype=index_type)
    chooser = place[detection].astype(np.int64)
    by_turn = np.argsort(chooser, kind="stable")  # keeps each detection's pairs in its order of preference
    chooser, instance, tiou = chooser[by_turn], instance[by_turn], tiou[by_turn]
    taken = {}
    for threshold in np.argsort(tious):  # rising, so that ever fewer pairs are left to look at
        enough = tiou >= tious[threshold]
        chooser, instance, tiou = chooser[enough], instance[enough], tiou[enough]
        taken[threshold] = _assign(chooser, instance, len(truth))
    return [taken[threshold] for threshold in range(len(tious))]


def overlapping_pairs(
    truth: GroundTruth, found: Detections, lowest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a detection and an instance of its video and class with a tIoU of at least ``lowest``.

    Returns:
        Detection index (P), instance index (P) and tIoU (P), sorted by detection, then falling tIoU (of equal
        tIoUs the later instance first).
    """
    num_classes = len(truth.classes)
    truth_group = truth.video * num_classes + truth.label
    by_group = np.argsort(truth_group, kind="stable")
    groups = _Groups(*np.unique(truth_group[by_group], return_index=True, return_counts=True))
    blocks = []
    for start in range(0, len(found), BLOCK):
        video, label = found.video[start : start + BLOCK], found.label[start : start + BLOCK]
        detection, position = groups.members(np.where(video >= 0, video * num_classes + label, -1))
        detection, instance = detection + start, by_group[position]
        tiou = paired_tiou(found.segments[detection], truth.segments[instance])
        enough = np.flatnonzero(tiou >= lowest)
        enough = enough[np.lexsort((-instance[enough], -tiou[enough], detection[enough]))]
        blocks.append((detection[enough], instance[enough], tiou[enough]))
    if not blocks:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0)
    detection, instance, tiou = (np.concatenate(columns) for columns in zip(*blocks, strict=True))
    return detection, instance, tiou


def paired_tiou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """tIoU of each row of ``first`` (P, 2) with the same row of ``second`` (P, 2); 0 where both are empty."""
    start = np.maximum(first[:, 0], second[:, 0])
    end = np.minimum(first[:, 1], second[:, 1])
    intersection = np.clip(end - start, 0.0, None)
    # The official evaluator's order of operations: a tIoU on a threshold must fall on the same side of it.
    union = (second[:, 1] - second[:, 0]) + (first[:, 1] - first[:, 0]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def average_precision(places: np.ndarray, num_instances: int) -> float:
    """Area under the interpolated precision-recall curve of one class, as in PASCAL VOC 2010.

    Recall rises, by 1 / ``num_instances``, at true positives only, and precision is highest there, so the false
    positives need not be visited.

    Args:
        places: rising ranks of the true positives among all detections of the class, 0 for the best.
        num_instances: how much ground truth the class has.
    """
    precision = np.arange(1, len(places) + 1) / (places + 1)
    return float(np.maximum.accumulate(precision[::-1]).sum() / num_instances)


@dataclass(frozen=True)
class _Groups:
    """Sorted ``keys`` of groups, and where each group ``starts`` and how many it ``holds`` in a sorted list."""

    keys: np.ndarray
    starts: np.ndarray
    holds: np.ndarray

    def members(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All members of the wanted groups: index into ``wanted`` (P) and position in the sorted list (P)."""
        group = np.searchsorted(self.keys, wanted)
        present = np.flatnonzero(np.append(self.keys, -2)[group] == wanted)
        group = group[present]
        count = self.holds[group]
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(present, count), np.repeat(self.starts[group], count) + offset


def _assign(detection: np.ndarray, instance: np.ndarray, num_instances: int) -> tuple[np.ndarray, np.ndarray]:
    """Detections choose in turn, each its first free instance, but all at once: deferred acceptance.

    Every detection claims the first instance on its list and every instance stays with its earliest claimant;
    an instance so held is struck from the lists of all later detections, until nothing is left to strike.
    Holders only ever get earlier, so a struck instance could never have been had: the outcome is that of
    the detections choosing one after another, in a few rounds instead of one step for each.

    Args:
        detection, instance: pairs (P), sorted by detection, then by preference.

    Returns:
        The detections that got an instance, and which.
    """
    while True:
        is_first = np.diff(detection, prepend=-1) != 0
        claimant, claimed = detection[is_first], instance[is_first]
        holder = np.full(num_instances, np.iinfo(np.int64).max)
        np.minimum.at(holder, claimed, claimant)
        open_to = holder[instance] >= detection
        if open_to.all():
            return claimant, claimed
        detection, instance = detection[open_to], instance[open_to]
