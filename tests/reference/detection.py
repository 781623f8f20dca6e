"""Decoding and SoftNMS as loops over snippets, thresholds and proposals. K classes, T snippets, M proposals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PlainProposal(NamedTuple):
    """Start and end are snippet indices, the end exclusive."""

    label: int
    start: int
    end: int
    score: float


def plain_decode(
    scores: np.ndarray,
    masks: np.ndarray,
    top: int,
    thresholds: Sequence[float],
    min_length: float = 0.0,
    proposal_score: str = "max",
    fill_holes: bool = False,
) -> list[PlainProposal]:
    """Distinct proposals of one video from class scores (K, T) and masks (T, T), the best of equals first."""
    T = scores.shape[1]
    found = []
    for pair in np.argsort(-scores, axis=None)[:top]:
        label, snippet = divmod(int(pair), T)
        curve = masks[:, snippet]
        for threshold in np.asarray(thresholds, masks.dtype):
            regions = plain_regions(curve, threshold)
            if fill_holes and regions:
                regions = [(regions[0][0], regions[-1][1])]
            for start, end in regions:
                if end - start >= min_length * T:
                    level = plain_level(curve, start, end, proposal_score)
                    found.append(PlainProposal(label, start, end, float(scores[label, snippet] * level)))
    best: dict[tuple[int, int, int], PlainProposal] = {}
    for proposal in sorted(found, key=lambda one: (-one.score, *one[:3])):
        if proposal.score > 0:
            best.setdefault(proposal[:3], proposal)
    return list(best.values())


def plain_level(curve: np.ndarray, start: int, end: int, proposal_score: str) -> float:
    """Score a region of a curve (T) by its ``max``, or the ``contrast`` to its surroundings."""
    inside = curve[start:end]
    if proposal_score == "max":
        return inside.max()
    reach = max((end - start) // 4, 1)
    around = np.concatenate([curve[max(start - reach, 0) : start], curve[end : end + reach]])
    return inside.mean() - (around.mean() if len(around) else 0)


def plain_regions(curve: Sequence[float] | np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Find the connected regions of a curve (T) above ``threshold``: first index, index after the last."""
    regions, start = [], None
    for index in range(len(curve)):
        if curve[index] > threshold:
            start = index if start is None else start
        elif start is not None:
            regions.append((start, index))
            start = None
    return regions if start is None else [*regions, (start, len(curve))]


def plain_soft_nms(
    segments: np.ndarray, scores: np.ndarray, labels: np.ndarray, sigma: float, max_detections: int
) -> list[tuple[int, float]]:
    """SoftNMS with the Gaussian penalty (Bodla et al. 2017, figure 2), class by class, of one video's M proposals.

    Returns:
        Index and lowered score of the best proposals, by falling score.
    """
    kept = []
    for label in sorted(set(labels.tolist())):
        left = {int(index): float(scores[index]) for index in np.flatnonzero(labels == label)}
        while left:
            best = max(left, key=lambda index: (left[index], -index))
            kept.append((best, left.pop(best)))
            for index in left:
                tiou = plain_tiou(segments[best], segments[index])
                left[index] *= float(np.exp(-(tiou**2) / sigma))
    return sorted(kept, key=lambda one: (-one[1], one[0]))[:max_detections]


def plain_vote(
    picked: int, segments: Sequence, scores: Sequence[float], labels: Sequence[int], threshold: float
) -> tuple[float, float]:
    """Mean of the segments of the same class that overlap the picked one, weighted by their scores."""
    start = end = total = 0.0
    for segment, score, label in zip(segments, scores, labels, strict=True):
        if label == labels[picked] and plain_tiou(segment, segments[picked]) >= threshold:
            start, end, total = start + score * segment[0], end + score * segment[1], total + score
    return (float(start / total), float(end / total)) if total else tuple(map(float, segments[picked]))


def plain_tiou(first: Sequence[float], second: Sequence[float]) -> float:
    """tIoU of two segments (start, end); 0 where both are empty."""
    shared = max(min(first[1], second[1]) - max(first[0], second[0]), 0.0)
    union = (first[1] - first[0]) + (second[1] - second[0]) - shared
    return shared / union if union > 0 else 0.0
