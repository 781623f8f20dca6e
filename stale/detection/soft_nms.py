"""Gaussian SoftNMS (Bodla et al., ICCV 2017) and segment voting, for many videos at once (stale/README.md, Inference).

B videos, M proposals a video (padded with score 0), P picks.
"""

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stale.config import DetectionConfig

# Pairs of proposals up to which the factors of all are computed before the first pick.
_MOST_PAIRS = {"cpu": 1 << 18, "cuda": 1 << 26}
_BLOCK = 1024  # proposals of a class whose factors are computed together


def soft_nms(segments: Tensor, scores: Tensor, labels: Tensor, options: DetectionConfig) -> tuple[Tensor, Tensor]:
    """Pick proposals by falling score, each lowering the scores of its class by exp(-tIoU² / σ).

    With ``options.nms=official`` the factor is exp(-10 · tIoU²) / 0.6 wherever two overlap [C].

    Segments are (B, M, 2) in any unit; proposals of different labels (B, M) do not affect each other; a score (B, M) of
    0 stands for padding. Returns of at most ``options.max_detections`` picks a video, in order, the indices (B, P) into
    M and their lowered scores (B, P), 0 where nothing was left to pick.
    """
    B, M = scores.shape
    if scores.is_cpu and _MOST_PAIRS["cpu"] < B * M * M:
        return _pick_by_class(segments, scores, labels, options)
    return _pick_together(segments, scores, labels, options)


def _pick_together(segments: Tensor, scores: Tensor, labels: Tensor, options: DetectionConfig) -> tuple[Tensor, Tensor]:
    """:func:`soft_nms` with each pick made in all videos at once."""

    def factors(segment: Tensor, label: Tensor) -> Tensor:
        """The factors (B, P, M) of P proposals (B, P, 2) and (B, P) on the scores of all."""
        return _factors(tiou(segment, segments) * (label.unsqueeze(2) == labels.unsqueeze(1)), options)

    B, M = scores.shape
    pairs = B * M * M
    table = factors(segments, labels) if pairs <= _MOST_PAIRS.get(scores.device.type, 0) else None  # B × M × M
    video = torch.arange(B, device=scores.device)
    remaining, picked, lowered = scores.clone(), [], []
    for _ in range(min(options.max_detections, M)):
        score, best = remaining.max(1)  # B, the best of every video
        picked.append(best)
        lowered.append(score)
        if table is not None:
            remaining *= table[video, best]
        else:
            remaining *= factors(segments[video, best].unsqueeze(1), labels[video, best].unsqueeze(1)).squeeze(1)
        remaining[video, best] = -1  # never again
    return torch.stack(picked, 1), torch.stack(lowered, 1).clamp(min=0)


def _pick_by_class(segments: Tensor, scores: Tensor, labels: Tensor, options: DetectionConfig) -> tuple[Tensor, Tensor]:
    """:func:`soft_nms` of one video and class after another: the best of all classes is the next pick."""
    shape = len(scores), min(options.max_detections, scores.shape[1])  # B × P
    picked, lowered = labels.new_zeros(shape), scores.new_zeros(shape)
    for row, (columns, score, label) in enumerate(zip(segments.mT.contiguous(), scores, labels, strict=True)):
        classes = [((label == k) & (score > 0)).nonzero().squeeze(1) for k in label.unique()]
        streams = (_picks_of_class(columns[:, index].mT, score[index], index, options) for index in classes)
        found = list(islice(heapq.merge(*streams), shape[1]))
        picked[row, : len(found)] = torch.tensor([index for _, index in found])
        lowered[row, : len(found)] = torch.tensor([-negative for negative, _ in found])
    return picked, lowered


def _picks_of_class(
    segments: Tensor, scores: Tensor, index: Tensor, options: DetectionConfig
) -> Iterator[tuple[float, int]]:
    """Yield the negative lowered score and the ``index`` (n,) of each of the n proposals of a class, as picked."""
    remaining, numbers = scores.numpy(), index.tolist()
    blocks: dict[int, Any] = {}  # by number, tables (rows, n) of factors
    for _ in numbers:
        best = int(remaining.argmax())
        yield -remaining[best].item(), numbers[best]
        block, row = divmod(best, _BLOCK)
        if block not in blocks:
            part = segments[block * _BLOCK : (block + 1) * _BLOCK]
            blocks[block] = _factors(tiou(part, segments), options).numpy()
        remaining *= blocks[block][row]
        remaining[best] = -1  # never again


def _factors(overlap: Tensor, options: DetectionConfig) -> Tensor:
    """The factors on scores by tIoU, which is overwritten."""
    if options.nms == "gaussian":
        return overlap.square_().div_(-options.nms_sigma).exp_()
    return torch.where(overlap > 0, torch.exp(-10 * overlap.square()) / 0.6, torch.ones_like(overlap))


def vote(segments: Tensor, scores: Tensor, labels: Tensor, picked: Tensor, *, threshold: float) -> Tensor:
    """Segment voting: the segments (B, P, 2) of the picks, each the mean of its neighbors weighted by their scores.

    Neighbours are the proposals of its class with a tIoU of at least ``threshold``; ``picked`` (B, P) are indices.
    """
    voted = []
    for segment, score, label, index in zip(segments, scores, labels, picked, strict=True):  # P × M of one is small
        own = segment[index]  # P × 2
        weights = (tiou(own, segment) * (label[index].unsqueeze(1) == label) >= threshold) * score
        total = weights.sum(1, keepdim=True)
        # An empty segment has a tIoU of 0 with itself.
        voted.append(torch.where(total > 0, weights @ segment / total, own))
    return torch.stack(voted)


def tiou(first: Tensor, second: Tensor) -> Tensor:
    """tIoU (..., P, M) of segments (..., P, 2) and (..., M, 2); 0 where both are empty."""
    (start, end), (begin, stop) = first.unsqueeze(-2).unbind(-1), second.unsqueeze(-3).unbind(-1)
    overlap = (torch.minimum(end, stop) - torch.maximum(start, begin)).clamp_(min=0)
    union = (end - start) + (stop - begin) - overlap
    return overlap / union.clamp_(min=1e-8)
