"""Ground truth, detections, and mean average precision over tIoU thresholds, exactly as the official ActivityNet
evaluator counts, with one exception.

The detections of a class are visited by falling score. Each takes, of the instances of its video and class that
are still free, the one with the highest tIoU, if that reaches the threshold; otherwise it is a false positive.
AP is the area under the interpolated precision-recall curve. mAP is the mean over the classes with ground truth.

The official evaluator leaves ties to NumPy's default sort, which is unstable: its order depends on NumPy's version and
the processor's vector instructions. Of equal tIoUs (a long detection over instances of equal length) that sort decides
here too, and can move the AP of a class by 0.003. Of equal scores the later in its file comes first, which is the
official order wherever that sort happens to be stable. The exception: two segments of no length have tIoU 0 here; there
it is 0/0, which counts as a match.

Sizes: G instances, N detections, K classes, V videos, R thresholds, P pairs of a detection and an instance. Times are
seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from stale.data.annotations import Video
from stale.segments import paired_tiou

DUPLICATE_TOLERANCE = 1e-3  # seconds; as in ActionFormer and OpenTAD


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The instances to find, in the order of the annotation file."""

    videos: tuple[str, ...]
    classes: tuple[str, ...]
    durations: np.ndarray  # (V)
    video: np.ndarray  # (G) index into ``videos``
    label: np.ndarray  # (G) index into ``classes``
    segments: np.ndarray  # (G, 2)
    estimated: bool = False  # a duration is not annotated: the end of the video's last instance is in its place

    def __len__(self) -> int:
        return len(self.video)

    def take(self, keep: np.ndarray) -> "GroundTruth":
        """The instances that the mask or index ``keep`` names; videos and classes stay as they are."""
        return replace(self, video=self.video[keep], label=self.label[keep], segments=self.segments[keep])


@dataclass(frozen=True, eq=False)
class Detections:
    """Scored segments, in the order of their file (equal scores: the later one ranks first)."""

    video: np.ndarray  # (N) index into the ground truth's videos, -1 for a video that has no ground truth
    label: np.ndarray  # (N) index into its classes
    segments: np.ndarray  # (N, 2)
    scores: np.ndarray  # (N)

    def __len__(self) -> int:
        return len(self.video)

    def take(self, keep: np.ndarray) -> "Detections":
        """The detections that the mask or index ``keep`` names."""
        return Detections(self.video[keep], self.label[keep], self.segments[keep], self.scores[keep])

    @cached_property
    def of_segments(self) -> "Detections":
        """Of detections with the same video and segment the best-scored, in file order; several measures need it."""
        start, end = self.segments.T
        key = 1009.7 * start + end + 31.4 * self.video  # equal for equal segments, and for few others
        by_key = np.argsort(key)
        twin = np.diff(key[by_key]) == 0
        several = by_key[np.append(False, twin)[: len(self)] | np.append(twin, False)[: len(self)]]
        order = several[np.lexsort((several, -self.scores[several], end[several], start[several], self.video[several]))]
        same = np.diff(np.column_stack([self.video, self.segments])[order], axis=0) == 0
        keep = np.ones(len(self), dtype=bool)
        keep[order[1:][same.all(axis=1)]] = False
        return self if keep.all() else self.take(np.flatnonzero(keep))


@dataclass(frozen=True)
class Metrics:
    """AP of each threshold and class, and the means over them, as fractions."""

    classes: tuple[str, ...]
    tious: np.ndarray  # (R)
    ap: np.ndarray  # (R, K), NaN for a class without ground truth
    num_instances: np.ndarray  # (K) of the ground truth

    @property
    def mean_ap(self) -> np.ndarray:
        """mAP at each threshold (R): the mean over the classes that have ground truth."""
        counted = self.num_instances > 0
        return self.ap[:, counted].mean(axis=1) if counted.any() else np.full(len(self.tious), np.nan)

    @property
    def average(self) -> float:
        """Average mAP: the mean over the thresholds."""
        return float(self.mean_ap.mean())


def ground_truth(videos: Iterable[Video], classes: Sequence[str] | None = None) -> GroundTruth:
    """Every instance of ``classes`` (None: all that occur) as annotated, and the videos that have at least one."""
    videos = list(videos)
    if classes is None:
        classes = sorted({instance.label for video in videos for instance in video.instances})
    class_index = {label: index for index, label in enumerate(classes)}
    tested = [video for video in videos if any(item.label in class_index for item in video.instances)]
    rows = [
        (index, class_index[item.label], item.start, item.end)
        for index, video in enumerate(tested)
        for item in video.instances
        if item.label in class_index
    ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    durations = np.array([video.duration for video in tested], dtype=np.float64)
    unknown, last = np.isnan(durations), np.zeros(len(tested))
    np.maximum.at(last, table[:, 0].astype(np.int64), table[:, 3])
    durations[unknown] = last[unknown]
    return GroundTruth(
        videos=tuple(video.id for video in tested),
        classes=tuple(classes),
        durations=durations,
        estimated=bool(unknown.any()),
        video=table[:, 0].astype(np.int64),
        label=table[:, 1].astype(np.int64),
        segments=table[:, 2:],
    )


def drop_duplicates(truth: GroundTruth) -> GroundTruth:
    """Drop empty and repeated instances, as ActionFormer and OpenTAD do; the official evaluator keeps them.

    Instances of one video and class are the same if both ends are within a millisecond; the first one stays.
    """
    kept: list[int] = []
    kept_of_group: dict[tuple[int, int], list[int]] = {}
    for index, group in enumerate(zip(truth.video.tolist(), truth.label.tolist(), strict=True)):
        if truth.segments[index, 0] >= truth.segments[index, 1]:
            continue
        others = kept_of_group.setdefault(group, [])
        gaps = np.abs(truth.segments[others] - truth.segments[index])
        if not (gaps <= DUPLICATE_TOLERANCE).all(axis=1).any():
            others.append(index)
            kept.append(index)
    return truth.take(np.array(kept, dtype=np.int64))


def evaluate(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Metrics:
    """AP of every class at every threshold (R)."""
    order = rank(found)
    thresholds = np.asarray(tious, dtype=np.float64)
    num_instances = np.bincount(truth.label, minlength=len(truth.classes))
    num_found = np.bincount(found.label, minlength=len(truth.classes))
    starts = np.cumsum(num_found) - num_found  # where each class begins in the order
    ap = np.full((len(thresholds), len(truth.classes)), np.nan)
    for row, (correct, _) in zip(ap, match(truth, found, order, thresholds), strict=True):
        bounds = np.searchsorted(correct, np.append(starts, len(found)))
        for label in np.flatnonzero(num_instances):
            ranks = correct[bounds[label] : bounds[label + 1]] - starts[label]
            # Recall rises at true positives only, where precision is highest: false positives need no visit.
            precision = np.arange(1, len(ranks) + 1) / (ranks + 1)
            row[label] = np.maximum.accumulate(precision[::-1]).sum() / num_instances[label]
    return Metrics(truth.classes, thresholds, ap, num_instances)


def rank(found: Detections) -> np.ndarray:
    """Return the order (N) in which detections are visited: by class, falling score, later in the file first."""
    by_score = np.argsort(found.scores, kind="stable")[::-1]
    label = found.label[by_score]
    few = label.astype(np.int16) if label.max(initial=0) < 1 << 15 else label  # which are sorted by digits
    return by_score[np.argsort(few, kind="stable")]


def match(
    truth: GroundTruth, found: Detections, order: np.ndarray, tious: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each threshold (R), rising positions in ``order`` (N) of the true positives, and the instance each took."""
    detection, instance, tiou = overlapping_pairs(truth, found, min(tious))
    position = np.empty(len(found), dtype=np.int64)
    position[order] = np.arange(len(found))
    chooser = position[detection]
    by_turn = np.argsort(chooser, kind="stable")  # keeps each detection's pairs in its order of preference
    chooser, instance, tiou = chooser[by_turn], instance[by_turn], tiou[by_turn]
    taken = {}
    for threshold in np.argsort(tious):  # rising, so that ever fewer pairs are left
        enough = tiou >= tious[threshold]
        chooser, instance, tiou = chooser[enough], instance[enough], tiou[enough]
        taken[threshold] = _assign(chooser, instance, len(truth))
    return [taken[threshold] for threshold in range(len(tious))]


def overlapping_pairs(
    truth: GroundTruth, found: Detections, lowest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection, instance and tIoU (P) of the pairs of one video and class with a tIoU of at least ``lowest``.

    They are sorted by detection, then falling tIoU; NumPy's default sort of all tIoUs of a detection, reversed, decides
    between equal ones, as in the official evaluator.
    """
    num_classes = len(truth.classes)
    truth_group = truth.video * num_classes + truth.label
    by_group = np.argsort(truth_group, kind="stable")
    groups, starts, sizes = np.unique(truth_group[by_group], return_index=True, return_counts=True)
    wanted = np.where(found.video >= 0, found.video * num_classes + found.label, -1)
    group = np.searchsorted(groups, wanted)
    present = np.flatnonzero(np.append(groups, -2)[group] == wanted)
    group = group[present]
    size = sizes[group]  # each detection meets all instances of its group
    first = np.cumsum(size) - size
    detection = np.repeat(present, size)
    instance = by_group[np.arange(size.sum()) + np.repeat(starts[group] - first, size)]
    tiou = paired_tiou(found.segments[detection], truth.segments[instance])
    enough, order = tiou >= lowest, np.arange(len(tiou))
    several = np.add.reduceat(enough, first, dtype=np.int64) > 1 if len(first) else np.zeros(0, dtype=bool)
    for count in np.unique(size[several]):  # equally long rows are sorted together
        pairs = first[several & (size == count), None] + np.arange(count)
        order[pairs] = np.take_along_axis(pairs, tiou[pairs].argsort(axis=1)[:, ::-1], axis=1)
    order = order[enough[order]]
    return detection[order], instance[order], tiou[order]


def _assign(detection: np.ndarray, instance: np.ndarray, num_instances: int) -> tuple[np.ndarray, np.ndarray]:
    """Let each detection of the pairs (P), sorted by detection, then preference, take its first free instance.

    All do so at once (deferred acceptance): every detection claims the first instance on its list, and every instance
    stays with its earliest claimant. An instance so held is struck from the lists of all later detections, until
    nothing is left to strike. Holders only get earlier: the outcome is that of detections choosing one after another.

    Returns the detections that got an instance, and which.
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
