"""Masks → candidate segments (section 8), for many videos at once.

B videos, T snippets, K classes under test, M candidates a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Scored segments, each video's by falling score, padded with score 0.

    Attributes:
        segments: (B, M, 2) in snippet units.
        scores, labels: (B, M).
    """

    segments: Tensor
    scores: Tensor
    labels: Tensor


def decode_masks(
    class_scores: Tensor,
    masks: Tensor,
    top_snippets: int,
    thresholds: Sequence[float],
    max_candidates: int,
    min_length: float = 0.0,
    region_score: str = "max",
    fill_holes: bool = False,
) -> Candidates:
    """Read the masks of the top-scoring snippets: every connected region above a threshold is a candidate.

    Args:
        class_scores: (B, K, T) probabilities of the classes under test.
        masks: (B, T, T); [:, :, t] is the mask of snippet t.
        top_snippets: how many (class, snippet) pairs of a video are read.
        thresholds: Θ.
        max_candidates: the best of a video are kept; of equal segments of a class only the best is one.
        min_length: least length of a region, as a share of the video.
        region_score: a region's score is the class score times the ``max`` or the ``mean`` of its mask scores.
        fill_holes: at each threshold a mask has one region, from the first place above it to the last (released code).
    """
    B, K, T = class_scores.shape
    top, pair = class_scores.flatten(1).topk(min(top_snippets, K * T), dim=1)  # B × N
    label, snippet = pair // T, pair % T
    columns = masks.gather(2, snippet.unsqueeze(1).expand(-1, T, -1)).transpose(1, 2)  # B × N × T
    return best_regions(columns, top, label, thresholds, max_candidates, min_length, region_score, fill_holes)


def best_regions(
    curves: Tensor,
    scores: Tensor,
    labels: Tensor,
    thresholds: Sequence[float],
    max_candidates: int,
    min_length: float = 0.0,
    region_score: str = "max",
    fill_holes: bool = False,
) -> Candidates:
    """Threshold N curves a video (B, N, T), each of a class (B, N) with a score (B, N); see :func:`decode_masks`."""
    B, _, T = curves.shape
    levels = torch.tensor(list(thresholds), device=curves.device).view(-1, 1)
    stacked = curves.unsqueeze(2).expand(-1, -1, len(levels), -1)  # B × N × Θ × T
    (video, row, _), start, end, level = _regions(
        stacked, levels, {"max": "amax", "mean": "mean"}[region_score], fill_holes
    )
    score = scores[video, row] * level
    keep = (end - start >= min_length * T) & (score > 0)
    video, row, start, end, score = (x[keep] for x in (video, row, start, end, score))
    return _pad(*_best_of_equals(video, labels[video, row], start, end, score, T), B, max_candidates)


def _regions(
    values: Tensor, levels: Tensor, reduction: str, fill_holes: bool = False
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Connected regions of ``values > levels`` along the last dimension, holes between them filled or not.

    Returns:
        For R regions: their indices in the leading dimensions, first place, place after the last, value reduced.
    """
    above = values > levels
    if fill_holes:
        begun, to_come = (x.int().cummax(-1).values.bool() for x in (above, above.flip(-1)))
        above = begun & to_come.flip(-1)
    before = torch.zeros_like(above[..., :1])
    starts = above & ~torch.cat([before, above[..., :-1]], -1)
    ends = above & ~torch.cat([above[..., 1:], before], -1)
    *leading, start = starts.nonzero(as_tuple=True)  # starts and ends alternate: the n-th of each belong together
    end = ends.nonzero(as_tuple=True)[-1] + 1
    region = starts.flatten().cumsum(0)[above.flatten()] - 1  # of every place above its level
    level = values.new_zeros(len(start)).scatter_reduce(0, region, values[above], reduction, include_self=False)
    return tuple(leading), start, end, level


def _best_of_equals(
    video: Tensor, label: Tensor, start: Tensor, end: Tensor, score: Tensor, T: int
) -> tuple[Tensor, ...]:
    """Of candidates with the same video, class and segment, the one with the highest score."""
    K = label.max() + 1 if len(label) else 1
    key = ((video * K + label) * (T + 1) + start) * (T + 1) + end
    unique, group = key.unique(return_inverse=True)
    best = score.new_zeros(len(unique)).scatter_reduce(0, group, score, "amax")
    rest, end = unique // (T + 1), unique % (T + 1)
    rest, start = rest // (T + 1), rest % (T + 1)
    return rest // K, rest % K, start, end, best


def _pad(
    video: Tensor, label: Tensor, start: Tensor, end: Tensor, score: Tensor, B: int, max_candidates: int
) -> Candidates:
    """A flat list → (B, M) by falling score within each video."""
    order = score.argsort(descending=True, stable=True)
    order = order[video[order].argsort(stable=True)]
    video, label, start, end, score = (x[order] for x in (video, label, start, end, score))
    count = torch.bincount(video, minlength=B)
    rank = torch.arange(len(video), device=video.device) - (count.cumsum(0) - count)[video]
    M = max(1, min(max_candidates, int(count.max())))
    keep = rank < M
    place = (video[keep], rank[keep])
    segments = score.new_zeros(B, M, 2).index_put(place, torch.stack([start, end], 1)[keep].to(score.dtype))
    scores = score.new_zeros(B, M).index_put(place, score[keep])
    return Candidates(segments, scores, label.new_zeros(B, M).index_put(place, label[keep]))
