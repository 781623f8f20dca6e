"""Measures beside mAP: recall, top-1 accuracy, localization alone, classification alone. All are fractions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from stale.evaluation.mean_ap import Detections, GroundTruth, Metrics, evaluate, overlapping_pairs, rank

RECALL_AT = (1, 5, 10, 50, 100)


def average_recall(
    truth: GroundTruth, found: Detections, tious: Sequence[float], at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Share of instances that one of the ``k`` best detections of their video covers, whatever the labels.

    The mean over the thresholds (ActivityNet's AR@AN, with exactly ``k`` a video). One segment with several labels
    counts once.
    """
    detection, instance, tiou = _overlaps(truth, found.of_segments)
    place = rank_in_video(found.of_segments)[detection]
    best, done, result = np.zeros(len(truth)), 0, {}
    for k in sorted(at):
        new = (done <= place) & (place < k)
        np.maximum.at(best, instance[new], tiou[new])
        done, result[str(k)] = k, float((best[:, None] >= np.asarray(tious, dtype=np.float64)).mean())
    return result


def top1_accuracy(truth: GroundTruth, found: Detections) -> float:
    """Share of videos whose best-scored detection has a label of the video; one without detections is wrong."""
    best, num_classes = top1_whole_video(truth, found), len(truth.classes)
    right = np.isin(best.video * num_classes + best.label, truth.video * num_classes + truth.label)
    return float(right.sum() / len(truth.videos))


def class_agnostic(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """mAP of the segments without their labels.

    A segment with several labels counts once: a detected one with its best score, a true one (as THUMOS14's
    CliffDiving, which is Diving as well) as one instance.
    """
    truth, found = without_classes(truth, found.of_segments)
    return evaluate(truth.take(np.unique(_same_segment(truth))), found, tious)


def with_true_labels(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """mAP of the detected segments under perfect classification.

    Each takes the label of the instance that it overlaps most, or the labels of all instances with that segment. Where
    several classes happen at once, an instance of another class gives its label to the segment that overlaps it most
    (of equal ones to the best-scored), so that every true label counts. A segment that overlaps no instance takes the
    most frequent label of the video, of equally frequent ones the first, and is a false positive of it; one in a video
    without instances is left out. A segment detected with several labels counts once, at its best score.
    """
    segments, num_classes = found.of_segments, len(truth.classes)
    counts = np.zeros((len(truth.videos), num_classes), dtype=np.int64)
    np.add.at(counts, (truth.video, truth.label), 1)
    detection, instance, tiou = _overlaps(truth, segments)
    same, is_first = _same_segment(truth), np.diff(detection, prepend=-1) != 0  # sorted by falling tIoU
    most = same[instance[is_first]][np.cumsum(is_first) - 1]  # the instance that each pair's detection overlaps most
    takes = same[instance] == most
    several = np.flatnonzero((np.count_nonzero(counts, axis=1) > 1)[truth.video[instance]])
    order = several[np.lexsort((-segments.scores[detection[several]], -tiou[several], instance[several]))]
    best = order[np.diff(instance[order], prepend=-1) != 0]  # the detection that overlaps each instance most
    own = same * num_classes + truth.label
    takes[best] |= ~np.isin(most[best] * num_classes + truth.label[instance[best]], own)
    alone = np.flatnonzero((np.bincount(detection, minlength=len(segments)) == 0) & (segments.video >= 0))
    chosen = np.concatenate([detection[takes], alone])
    label = np.concatenate([truth.label[instance[takes]], counts.argmax(axis=1)[segments.video[alone]]])
    order = np.argsort(chosen, kind="stable")
    return evaluate(truth, replace(segments.take(chosen[order]), label=label[order]), tious)


def with_true_segments(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """mAP of the predicted labels under perfect localization.

    Each true segment takes every label of the detections that overlap it, at the highest of their score × tIoU. Where
    several classes happen at once, a detection leaves out the segments of other classes that it overlaps no more than
    an instance of its own label. Of several instances with one segment the first takes the labels of none of them.
    """
    detection, instance, tiou = _overlaps(truth, found)
    right, scores = truth.label[instance] == found.label[detection], found.scores - found.scores.min(initial=0)
    own = np.zeros(len(found))
    np.maximum.at(own, detection[right], tiou[right])
    keep = right | ((tiou > own[detection]) & (_same_segment(truth)[instance] == instance))
    detection, instance, weighted = detection[keep], instance[keep], (scores[detection] * tiou)[keep]
    named = instance * len(truth.classes) + found.label[detection]
    order = np.lexsort((-weighted, named))
    best = order[np.diff(named[order], prepend=-1) != 0]
    segment, label = instance[best], found.label[detection[best]]
    return evaluate(truth, Detections(truth.video[segment], label, truth.segments[segment], weighted[best]), tious)


def random_whole_video(truth: GroundTruth, seed: int = 0) -> Detections:
    """Every class on the whole of every video, with random scores: the baseline that knows nothing."""
    video, label = np.divmod(np.arange(len(truth.videos) * len(truth.classes)), max(len(truth.classes), 1))
    return Detections(video, label, whole_videos(truth, video), np.random.default_rng(seed).random(len(video)))


def top1_whole_video(truth: GroundTruth, found: Detections) -> Detections:
    """The best-scored label of each video on the whole of it: what the detections are worth without segments."""
    highest, latest = np.full(len(truth.videos) + 1, -np.inf), np.full(len(truth.videos) + 1, -1)
    np.maximum.at(highest, found.video, found.scores)  # the last is of unknown videos
    best = np.flatnonzero(found.scores == highest[found.video])
    latest[found.video[best]] = best
    best = np.sort(latest[:-1][latest[:-1] >= 0])
    return Detections(found.video[best], found.label[best], whole_videos(truth, found.video[best]), found.scores[best])


def whole_videos(truth: GroundTruth, video: np.ndarray) -> np.ndarray:
    """Segments (N, 2) from 0 to the duration of each of ``video`` (N)."""
    return np.stack([np.zeros(len(video)), truth.durations[video]], axis=1)


def without_classes(truth: GroundTruth, found: Detections) -> tuple[GroundTruth, Detections]:
    """Both with one class only."""
    bare = replace(truth, classes=("any",), label=np.zeros_like(truth.label))
    return bare, replace(found, label=np.zeros_like(found.label))


@lru_cache(maxsize=2)  # several measures need it
def _overlaps(truth: GroundTruth, found: Detections) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`overlapping_pairs` of any overlap, whatever the labels."""
    return overlapping_pairs(*without_classes(truth, found), np.nextafter(0, 1))


def _same_segment(truth: GroundTruth) -> np.ndarray:
    """The first instance (G) that has the video and segment of each."""
    table = np.column_stack([truth.video, truth.segments])
    _, first, group = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return first[group.reshape(-1)]


def rank_in_video(found: Detections) -> np.ndarray:
    """Rank of each detection among those of its video (N), 0 for the best; of ties the later comes first."""
    order = rank(replace(found, label=found.video))
    video = found.video[order]
    place = np.empty(len(found), dtype=np.int64)
    place[order] = np.arange(len(found)) - np.searchsorted(video, video)
    return place
