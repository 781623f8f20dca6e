"""Why a detector fails, after DETAD: Alwassel, Caba Heilbron, Escorcia, Ghanem, "Diagnosing Error in Temporal
Action Detectors", ECCV 2018. Written from the paper's definitions; needs nothing but annotations and detections.

G is the number of instances of a class, so "top 3 G" are its 3 G best-scored detections. A detection that takes no
instance at threshold α is, in this order of precedence,

* *double detection*: tIoU ≥ α with an instance of its label, which a better-scored detection has taken;
* *wrong label*: tIoU ≥ α with an instance of another label;
* *localization*: 0.1 ≤ tIoU < α with an instance of its label;
* *confusion*: 0.1 ≤ tIoU < α with an instance of another label;
* *background*: anything else.

mAP_N is mAP with precision normalized as if every class had the average number of instances, so that classes and
buckets of different size can be compared. All shares are means over the protocol's thresholds.

Sizes: G instances, N detections, K classes, R thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stale.evaluation.instances import Detections, GroundTruth
from stale.evaluation.mean_ap import match, overlapping_pairs, rank
from stale.evaluation.protocol import threshold_key

KINDS = ("true positive", "double detection", "wrong label", "localization", "confusion", "background")
LEAST_OVERLAP = 0.1  # below this a detection is background
TOP = 10  # the profile looks at the top 10 G detections
BUCKETS = ("XS", "S", "M", "L", "XL")
# Upper edges of all buckets but the last, from the paper; seconds for length, a count for instances.
_EDGES = {
    "activitynet": {"coverage": (0.2, 0.4, 0.6, 0.8), "length": (30, 60, 120, 180), "instances": (1, 4, 8)},
    "thumos14": {"coverage": (0.02, 0.04, 0.06, 0.08), "length": (3, 6, 12, 18), "instances": (1, 40, 80)},
}


@dataclass(frozen=True)
class Diagnosis:
    """Detections in counting order and what became of each.

    ``kind`` (R, N) indexes ``KINDS``; ``taken`` (R, N) is the instance that a true positive took, else -1;
    ``place`` (N) is the rank within the class.
    """

    truth: GroundTruth
    ranked: Detections
    tious: np.ndarray
    kind: np.ndarray
    taken: np.ndarray
    place: np.ndarray

    @property
    def num_instances(self) -> np.ndarray:
        """Instances of each class (K)."""
        return np.bincount(self.truth.label, minlength=len(self.truth.classes))


def diagnose(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Diagnosis:
    """Name the kind of every detection at every threshold."""
    ranked = found.take(rank(found))
    thresholds = np.asarray(tious, dtype=np.float64)
    taken = np.full((len(thresholds), len(ranked)), -1, dtype=np.int64)
    for row, (place, instance) in zip(taken, match(truth, ranked, np.arange(len(ranked)), thresholds), strict=True):
        row[place] = instance
    same, other = _best_overlaps(truth, ranked)
    conditions = [
        lambda least: same >= least,
        lambda least: other >= least,
        lambda least: same >= LEAST_OVERLAP,
        lambda least: other >= LEAST_OVERLAP,
    ]
    kind = np.stack([np.select([c(least) for c in conditions], (1, 2, 3, 4), 5) for least in thresholds])
    kind[taken >= 0] = 0
    starts = np.searchsorted(ranked.label, ranked.label)
    return Diagnosis(truth, ranked, thresholds, kind, taken, np.arange(len(ranked)) - starts)


def analyze(truth: GroundTruth, found: Detections, tious: Sequence[float], dataset: str = "") -> dict[str, Any]:
    """The whole analysis as JSON takes it.

    Args:
        dataset: decides the buckets: those for THUMOS14 if its name has "thumos", else ActivityNet's.
    """
    diagnosis = diagnose(truth, found, tious)
    edges = _EDGES["thumos14" if "thumos" in dataset.lower() else "activitynet"]
    buckets = {name: _bucket(value, edges[name]) for name, value in characteristics(truth).items()}
    return {
        "kinds": list(KINDS),
        "false_positives": false_positive_profile(diagnosis),
        "removal": removal_impact(diagnosis),
        "sensitivity": _by_bucket(diagnosis, buckets, edges, normalized_map_of),
        "missed": _by_bucket(diagnosis, buckets, edges, missed_share),
        "confusion": class_confusion(diagnosis),
    }


def false_positive_profile(diagnosis: Diagnosis) -> dict[str, Any]:
    """Shares of the kinds among the best G detections of every class, the next G, … up to the tenth G.

    Returns:
        ``bands`` (up to 10 lists of 6 shares), ``counts`` of detections in each, and ``by_threshold``.
    """
    instances = np.maximum(diagnosis.num_instances, 1)[diagnosis.ranked.label]
    band = diagnosis.place // instances
    band[diagnosis.num_instances[diagnosis.ranked.label] == 0] = TOP
    table = np.zeros((len(diagnosis.tious), TOP, len(KINDS)))
    for row, kind in zip(table, diagnosis.kind, strict=True):
        np.add.at(row, (band[band < TOP], kind[band < TOP]), 1)
    counts = table[0].sum(axis=1).astype(int)
    shares = table / np.maximum(counts, 1)[None, :, None]
    return {
        "bands": shares.mean(axis=0).tolist(),
        "counts": counts.tolist(),
        "by_threshold": {threshold_key(t): row.tolist() for t, row in zip(diagnosis.tious, shares, strict=True)},
    }


def removal_impact(diagnosis: Diagnosis) -> dict[str, Any]:
    """Average mAP_N as it is, and what it would gain if all false positives of one kind were gone."""
    base = normalized_map(diagnosis, diagnosis.kind >= 0)
    gains = {name: normalized_map(diagnosis, diagnosis.kind != kind) - base for kind, name in enumerate(KINDS) if kind}
    return {"average_mAP_N": base, "gain": gains}


def normalized_map(diagnosis: Diagnosis, keep: np.ndarray, instances: np.ndarray | None = None) -> float:
    """Average mAP_N over the classes that have ``instances`` (K, default all), of the detections in ``keep``
    (R, N)."""
    every = diagnosis.num_instances
    instances = every if instances is None else instances
    typical = every.sum() / max((every > 0).sum(), 1)
    classes = np.flatnonzero(instances)
    values = []
    for kept, kind in zip(keep, diagnosis.kind, strict=True):
        label, correct = diagnosis.ranked.label[kept], kind[kept] == 0
        bounds = np.searchsorted(label, np.arange(len(every) + 1))
        values += [
            _normalized_ap(np.flatnonzero(correct[bounds[k] : bounds[k + 1]]), instances[k], typical) for k in classes
        ]
    return float(np.mean(values)) if values else float("nan")


def normalized_map_of(diagnosis: Diagnosis, chosen: np.ndarray) -> float:
    """Average mAP_N on the ``chosen`` (G) instances; detections that took another are neither right nor wrong."""
    chosen_or_none = np.append(chosen, True)  # -1, for no instance, looks up the last
    counts = np.bincount(diagnosis.truth.label[chosen], minlength=len(diagnosis.truth.classes))
    return normalized_map(diagnosis, chosen_or_none[diagnosis.taken], counts)


def missed_share(diagnosis: Diagnosis, chosen: np.ndarray) -> float:
    """Share of the ``chosen`` (G) instances that no detection takes, over the thresholds."""
    hit = [np.isin(np.flatnonzero(chosen), row).mean() for row in diagnosis.taken]
    return float(1 - np.mean(hit))


def class_confusion(diagnosis: Diagnosis) -> dict[str, Any]:
    """What the top G detections of each class really show.

    Returns:
        ``counts[true][predicted]`` over the classes, of detections whose most overlapped instance (of equal
        overlaps, one of their own label) reaches the lowest threshold; and ``pairs``, the commonest confusions.
    """
    truth, ranked = diagnosis.truth, diagnosis.ranked
    top = np.flatnonzero(diagnosis.place < diagnosis.num_instances[ranked.label])
    detection, instance, tiou = overlapping_pairs(*_one_class(truth, ranked.take(top)), min(diagnosis.tious))
    own = truth.label[instance] == ranked.label[top[detection]]
    order = np.lexsort((~own, -tiou, detection))
    chosen = order[np.diff(detection[order], prepend=-1) != 0]
    counts = np.zeros((len(truth.classes), len(truth.classes)), dtype=int)
    np.add.at(counts, (truth.label[instance[chosen]], ranked.label[top[detection[chosen]]]), 1)
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    worst = [divmod(int(cell), len(counts)) for cell in np.argsort(-wrong, axis=None, kind="stable")[:20]]
    pairs = [
        {"true": truth.classes[row], "predicted": truth.classes[column], "count": int(wrong[row, column])}
        for row, column in worst
        if wrong[row, column]
    ]
    return {"classes": list(truth.classes), "counts": counts.tolist(), "pairs": pairs}


def characteristics(truth: GroundTruth) -> dict[str, np.ndarray]:
    """Of each instance (G): its share of the video, its seconds, and how many of its class its video holds."""
    length = truth.segments[:, 1] - truth.segments[:, 0]
    group = truth.video * len(truth.classes) + truth.label
    _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    return {
        "coverage": length / truth.durations[truth.video],
        "length": length,
        "instances": counts[inverse].astype(np.float64),
    }


def _by_bucket(
    diagnosis: Diagnosis,
    buckets: dict[str, np.ndarray],
    edges: dict[str, tuple[float, ...]],
    measure: Callable[[Diagnosis, np.ndarray], float],
) -> dict[str, list[dict[str, Any]]]:
    """``measure`` of the instances in each bucket of each characteristic; None for an empty bucket."""
    result = {}
    for name, bucket in buckets.items():
        bounds = (0, *edges[name], None)
        result[name] = [
            {
                "bucket": BUCKETS[index],
                "above": bounds[index],
                "up_to": bounds[index + 1],
                "count": int((bucket == index).sum()),
                "value": measure(diagnosis, bucket == index) if (bucket == index).any() else None,
            }
            for index in range(len(bounds) - 1)
        ]
    return result


def _bucket(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    return np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="left")


def _best_overlaps(truth: GroundTruth, ranked: Detections) -> tuple[np.ndarray, np.ndarray]:
    """The highest tIoU of each detection with instances of its own label and of other labels: (N), (N)."""
    detection, instance, tiou = overlapping_pairs(*_one_class(truth, ranked), LEAST_OVERLAP)
    own = truth.label[instance] == ranked.label[detection]
    same, other = np.zeros(len(ranked)), np.zeros(len(ranked))
    np.maximum.at(same, detection[own], tiou[own])
    np.maximum.at(other, detection[~own], tiou[~own])
    return same, other


def _one_class(truth: GroundTruth, found: Detections) -> tuple[GroundTruth, Detections]:
    bare = replace(truth, classes=("any",), label=np.zeros_like(truth.label))
    return bare, replace(found, label=np.zeros_like(found.label))


def _normalized_ap(places: np.ndarray, num_instances: int, typical: float) -> float:
    """AP with precision as if the class had ``typical`` instances; ``places`` of its true positives, rising."""
    right = np.arange(1, len(places) + 1)
    expected = right / num_instances * typical
    precision = expected / (expected + places + 1 - right)
    return float(np.maximum.accumulate(precision[::-1]).sum() / num_instances)
