"""Evaluators written for obviousness, against which the fast one is tested."""

import numpy as np
from hypothesis import strategies as st

from stale.data.annotations import Instance, Video
from stale.evaluation import Detections, GroundTruth, detections


def tiou(one, other):
    """tIoU of two segments (start, end); 0 where both are empty."""
    shared = max(min(one[1], other[1]) - max(one[0], other[0]), 0.0)
    union = (other[1] - other[0]) + (one[1] - one[0]) - shared
    return shared / union if union > 0 else 0.0


def reference_ap(truth, found, threshold):
    """AP of one class. ``truth``: [(video, (start, end))], ``found``: [(video, (start, end), score)]."""
    free, correct = set(range(len(truth))), []
    for index in sorted(range(len(found)), key=lambda i: (-found[i][2], -i)):
        video, segment, _ = found[index]
        there = [i for i in range(len(truth)) if truth[i][0] == video]
        tious = np.array([tiou(segment, truth[i][1]) for i in there])
        # The official evaluator's sort, which is unstable: it decides between equal tIoUs.
        allowed = [there[k] for k in tious.argsort()[::-1] if there[k] in free and tious[k] >= threshold]
        free -= {*allowed[:1]}
        correct.append(bool(allowed))
    precision = [sum(correct[: i + 1]) / (i + 1) for i in range(len(correct))]
    return sum(max(precision[i:]) for i in range(len(correct)) if correct[i]) / len(truth)


def reference_per_class(truth: GroundTruth, found: Detections, tious) -> np.ndarray:
    """AP (thresholds, classes), NaN for a class without ground truth."""
    table = np.full((len(tious), len(truth.classes)), np.nan)
    for label in range(len(truth.classes)):
        true = [(v, tuple(s)) for v, k, s in zip(truth.video, truth.label, truth.segments, strict=True) if k == label]
        rows = zip(found.video, found.label, found.segments, found.scores, strict=True)
        detected = [(v, tuple(s), score) for v, k, s, score in rows if k == label]
        if true:
            table[:, label] = [reference_ap(true, detected, threshold) for threshold in tious]
    return table


@st.composite
def cases(draw):
    """Few videos, classes, positions and scores, so that overlaps, ties and duplicates abound."""

    def segments(count, shortest):
        starts = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
        lengths = draw(st.lists(st.integers(shortest, 5), min_size=count, max_size=count))
        return np.array([(s, s + n) for s, n in zip(starts, lengths, strict=True)], dtype=float).reshape(-1, 2)

    def indices(count, low, high):
        values = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
        return np.array(values, dtype=np.int64)

    num_true, num_found = draw(st.integers(1, 12)), draw(st.integers(0, 25))
    video, label = indices(num_true, 0, 1), indices(num_true, 0, 1)
    truth = GroundTruth(("a", "b"), ("x", "y", "z"), np.full(2, 11.0), video, label, segments(num_true, 0))
    scores = indices(num_found, 0, 4) / 4
    found = Detections(indices(num_found, -1, 1), indices(num_found, 0, 2), segments(num_found, -1), scores)
    return truth, found


def video(name, *instances, duration=100.0):
    return Video(name, "test", duration, tuple(Instance(*instance) for instance in instances))


def found_in(truth, **results):
    """Detections from ``video=[(start, end, label, score), ...]``."""
    keys = ("label", "score")
    return detections(
        {
            v: [{"segment": one[:2], **dict(zip(keys, one[2:], strict=True))} for one in items]
            for v, items in results.items()
        },
        truth,
    )
