"""Gaussian SoftNMS (Bodla et al., ICCV 2017), for many videos at once.

B videos, M candidates a video (padded with score 0), P picks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Pairs of candidates up to which the factors of all are made before the first pick: on a CPU as many as its cache
# holds, on a GPU as its memory may. Beyond, each pick makes its own. Every way gives the same to the bit.
_PAIRS = {"cpu": 1 << 18, "cuda": 1 << 26}


def soft_nms(
    segments: Tensor, scores: Tensor, labels: Tensor, sigma: float, max_detections: int, form: str = "gaussian"
) -> tuple[Tensor, Tensor]:
    """Pick candidates by falling score, each lowering the scores of its class by exp(-tIoU² / sigma).

    Args:
        segments: (B, M, 2), any unit; candidates of different labels (B, M) do not touch each other.
        scores: (B, M), at least 0; 0 stands for padding.
        form: ``gaussian``, or ``official``: of what overlaps at all, the factor is exp(-10 · tIoU²) / 0.6, the
            released code's, above 1 where the overlap is slight.

    Returns:
        Of at most ``max_detections`` picks a video, in order: indices (B, P) into M and their lowered scores (B, P);
        where the score is 0 nothing was left to pick, and the index is any.
    """
    B, M = scores.shape
    picks, pairs = min(max_detections, M), B * M * M
    if pairs > _PAIRS.get(scores.device.type, 0):
        picked, lowered = _pick(scores, picks, _made_for_each(segments, labels, sigma, form))
    else:
        factors = _factors(segments, labels, segments, labels, sigma, form)
        factors.diagonal(dim1=1, dim2=2).fill_(-1)
        way = _pick_one_by_one if scores.is_cpu else _pick_from_table
        picked, lowered = way(scores, picks, factors)
    return picked, lowered.clamp(min=0)


def _pick(scores: Tensor, picks: int, factors_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The picks of all videos, the n-th of each at a time.

    Args:
        factors_of: what the picks (B,) do to the scores (B, M) of all; of the pick itself -1: out of the game.
    """
    remaining = scores.clone()
    picked, lowered = [], []
    for _ in range(picks):
        best_score, best = remaining.max(1)
        picked.append(best)
        lowered.append(best_score)
        remaining *= factors_of(best)
    return torch.stack(picked, 1), torch.stack(lowered, 1)


def _pick_from_table(scores: Tensor, picks: int, factors: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_pick` by the factors (B, M, M) of all pairs: two operations a pick, which a GPU takes long to start."""
    rows = factors.flatten(0, 1)
    first = torch.arange(0, len(rows), scores.shape[1], device=scores.device)
    return _pick(scores, picks, lambda best: rows.index_select(0, first + best))


def _pick_one_by_one(scores: Tensor, picks: int, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The same a video at a time, in numpy: of a few hundred numbers, starting torch's operations takes longest."""
    picked, lowered = torch.empty(len(scores), picks, dtype=torch.long), scores.new_empty(len(scores), picks)
    tensors = (scores.clone(), factors, picked, lowered)
    for remaining, table, indices, values in zip(*(tensor.numpy() for tensor in tensors), strict=True):
        for place in range(picks):
            best = remaining.argmax()
            indices[place], values[place] = best, remaining[best]
            remaining *= table[best]
    return picked, lowered


def _made_for_each(segments: Tensor, labels: Tensor, sigma: float, form: str) -> Callable[[Tensor], Tensor]:
    """The factors of a pick, made when it is picked."""

    def factors_of(best: Tensor) -> Tensor:
        best = best.unsqueeze(1)
        segment = segments.gather(1, best.unsqueeze(2).expand(-1, -1, 2))
        factors = _factors(segment, labels.gather(1, best), segments, labels, sigma, form).squeeze(1)
        return factors.scatter_(1, best, -1)

    return factors_of


def _factors(picks: Tensor, pick_labels: Tensor, segments: Tensor, labels: Tensor, sigma: float, form: str) -> Tensor:
    """What P picks a video, segments (B, P, 2) and labels (B, P), do to the scores of M candidates: (B, P, M)."""
    (start, end), (begin, stop) = picks.unsqueeze(2).unbind(3), segments.unsqueeze(1).unbind(3)
    overlap = (torch.minimum(end, stop) - torch.maximum(start, begin)).clamp_(min=0)
    overlap *= pick_labels.unsqueeze(2) == labels.unsqueeze(1)
    union = (end - start) + (stop - begin) - overlap
    tiou = overlap / union.clamp_(min=1e-8)
    if form == "gaussian":
        return tiou.square_().div_(-sigma).exp_()
    return torch.where(tiou > 0, torch.exp(-10 * tiou.square()) / 0.6, torch.ones_like(tiou))
