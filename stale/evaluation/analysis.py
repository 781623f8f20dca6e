"""Why a detector fails, after DETAD: Alwassel, Caba Heilbron, Escorcia, Ghanem, "Diagnosing Error in Temporal
Action Detectors", ECCV 2018. Written from the paper's definitions.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stale.evaluation.mean_ap import Detections, GroundTruth, match, overlapping_pairs, rank
from stale.evaluation.measures import without_classes

KINDS = ("true positive", "double detection", "wrong label", "localization", "confusion", "background")
LEAST_OVERLAP = 0.1  # below this a detection is background
TOP = 10  # the profile looks at the top 10 G detections
BUCKETS = ("XS", "S", "M", "L", "XL")


@dataclass(frozen=True)
class Diagnosis:
    """Detections in counting order and what became of each."""

    truth: GroundTruth
    ranked: Detections
    tious: np.ndarray  # (R)
    kind: np.ndarray  # (R, N) index into ``KINDS``
    taken: np.ndarray  # (R, N) the instance that a true positive took, else -1
    rank: np.ndarray  # (N) within the class
    num_instances: np.ndarray  # (K)

    @property
    def top(self) -> np.ndarray:
        """Which detections (N) are among the G best of their class."""
        return self.rank < self.num_instances[self.ranked.label]


def diagnose(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> Diagnosis:
    """Find the kind of every detection at every threshold."""
    ranked = found.take(rank(found))
    thresholds = np.asarray(tious, dtype=np.float64)
    taken = np.full((len(thresholds), len(ranked)), -1, dtype=np.int64)
    for row, (position, instance) in zip(taken, match(truth, ranked, np.arange(len(ranked)), thresholds), strict=True):
        row[position] = instance
    # The highest tIoU of each detection with instances of its own label and of other labels.
    detection, instance, tiou = overlapping_pairs(*without_classes(truth, ranked), LEAST_OVERLAP)
    own = truth.label[instance] == ranked.label[detection]
    same, other = np.zeros(len(ranked)), np.zeros(len(ranked))
    np.maximum.at(same, detection[own], tiou[own])
    np.maximum.at(other, detection[~own], tiou[~own])
    kinds = [
        np.select([same >= least, other >= least, same >= LEAST_OVERLAP, other >= LEAST_OVERLAP], (1, 2, 3, 4), 5)
        for least in thresholds
    ]
    kind = np.where(taken >= 0, 0, np.stack(kinds))
    rank_in_class = np.arange(len(ranked)) - np.searchsorted(ranked.label, ranked.label)
    counts = np.bincount(truth.label, minlength=len(truth.classes))
    return Diagnosis(truth, ranked, thresholds, kind, taken=taken, rank=rank_in_class, num_instances=counts)


def false_positive_profile(diagnosis: Diagnosis) -> dict[str, Any]:
    """Kinds among the best G detections of every class, …, the tenth G: ``bands`` (10 × 6 shares) and ``counts``."""
    num_instances = diagnosis.num_instances[diagnosis.ranked.label]
    band = np.where(num_instances == 0, TOP, diagnosis.rank // np.maximum(num_instances, 1))
    table = np.zeros((TOP, len(KINDS)))
    for kind in diagnosis.kind:
        np.add.at(table, (band[band < TOP], kind[band < TOP]), 1 / len(diagnosis.tious))
    counts = table.sum(axis=1)
    shares = table / np.maximum(counts, 1)[:, None]
    return {"bands": shares.tolist(), "counts": counts.round().astype(int).tolist()}


def removal_impact(diagnosis: Diagnosis) -> dict[str, Any]:
    """Average mAP_N as it is, and what it would gain if all false positives of one kind were gone."""
    base = normalized_map(diagnosis, diagnosis.kind >= 0)
    gains = {name: normalized_map(diagnosis, diagnosis.kind != kind) - base for kind, name in enumerate(KINDS) if kind}
    return {"average_mAP_N": base, "gain": gains}


def normalized_map(diagnosis: Diagnosis, keep: np.ndarray, instances: np.ndarray | None = None) -> float:
    """Average mAP_N of the detections in ``keep`` (R, N) over the classes with ``instances`` (K, default all)."""
    every = diagnosis.num_instances
    instances = every if instances is None else instances
    typical = every.sum() / max((every > 0).sum(), 1)
    values = []
    for kept, kind in zip(keep, diagnosis.kind, strict=True):
        label, correct = diagnosis.ranked.label[kept], kind[kept] == 0
        bounds = np.searchsorted(label, np.arange(len(every) + 1))
        for k in np.flatnonzero(instances):
            positions = np.flatnonzero(correct[bounds[k] : bounds[k + 1]])
            right = np.arange(1, len(positions) + 1)
            expected = right / instances[k] * typical
            precision = expected / (expected + positions + 1 - right)
            values.append(np.maximum.accumulate(precision[::-1]).sum() / instances[k])
    return float(np.mean(values)) if values else float("nan")


def sensitivity(diagnosis: Diagnosis, edges: Mapping[str, Sequence[float]]) -> dict[str, list[dict[str, Any]]]:
    """How well instances of each length, share of the video and number in the video are found.

    For each characteristic in ``edges`` (see ``DatasetFacts.buckets``) its buckets: the instances ``chosen`` (G, mask),
    ``mAP_N`` on them (without detections that took others), the share ``missed`` by all; None for an empty bucket.
    """
    truth = diagnosis.truth
    length = truth.segments[:, 1] - truth.segments[:, 0]
    group = truth.video * len(truth.classes) + truth.label
    _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    values = {"coverage": length / truth.durations[truth.video], "length": length, "instances": counts[inverse]}
    result: dict[str, list[dict[str, Any]]] = {}
    for name, upper in edges.items():
        bounds = (0, *upper, None)
        bucket = np.searchsorted(np.asarray(upper, dtype=np.float64), values[name], side="left")
        for index, label in enumerate(BUCKETS[: len(upper) + 1]):
            chosen = bucket == index
            one = {"bucket": label, "above": bounds[index], "up_to": bounds[index + 1], "chosen": chosen}
            found, missed = on_instances(diagnosis, chosen) if chosen.any() else (None, None)
            result.setdefault(name, []).append({**one, "mAP_N": found, "missed": missed})
    return result


def on_instances(diagnosis: Diagnosis, chosen: np.ndarray) -> tuple[float, float]:
    """mAP_N on the ``chosen`` (G) instances, and the share of them that no detection takes."""
    chosen_or_none = np.append(chosen, True)  # -1, for no instance, looks up the last
    counts = np.bincount(diagnosis.truth.label[chosen], minlength=len(diagnosis.truth.classes))
    hit = [np.isin(np.flatnonzero(chosen), row).mean() for row in diagnosis.taken]
    return normalized_map(diagnosis, chosen_or_none[diagnosis.taken], counts), float(1 - np.mean(hit))


def confusion(diagnosis: Diagnosis, tiou: float) -> tuple[np.ndarray, np.ndarray]:
    """What every instance is detected as, by the top G detections of each class.

    Returns:
        The class (G) of the detection with a tIoU of at least ``tiou``, -1 for none: the instance's own class if one
        has it, else that of the best score; and which detections (N) are in the top G and reach no instance.
    """
    truth, ranked = diagnosis.truth, diagnosis.ranked
    top = diagnosis.top
    detection, instance, _ = overlapping_pairs(*without_classes(truth, ranked), tiou)
    detection, instance = detection[top[detection]], instance[top[detection]]
    other = truth.label[instance] != ranked.label[detection]
    order = np.lexsort((-ranked.scores[detection], other, instance))
    first = order[np.diff(instance[order], prepend=-1) != 0]
    predicted = np.full(len(truth), -1)
    predicted[instance[first]] = ranked.label[detection[first]]
    top[detection] = False
    return predicted, top
