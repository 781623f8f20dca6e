"""Masks → candidate segments (section 8), for many videos at once.

B videos, T snippets, K classes under test, M candidates a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


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

    @staticmethod
    def joined(parts: Sequence[Candidates]) -> Candidates:
        """All candidates of the same videos together."""
        scores, order = torch.cat([part.scores for part in parts], 1).sort(dim=1, descending=True, stable=True)
        segments = torch.cat([part.segments for part in parts], 1).gather(1, order.unsqueeze(2).expand(-1, -1, 2))
        return Candidates(segments, scores, torch.cat([part.labels for part in parts], 1).gather(1, order))


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
        region_score: a region's score is the class score times the ``max`` or the ``mean`` of its mask scores, or
            their ``contrast``: the mean less that of a quarter of its length on either side (after AutoLoc).
        fill_holes: at each threshold a mask has one region, from the first place above it to the last (released code).
    """
    B, K, T = class_scores.shape
    top, pair = class_scores.flatten(1).topk(min(top_snippets, K * T), dim=1)  # B × N
    label, snippet = pair // T, pair % T
    columns = masks.transpose(1, 2)[torch.arange(B, device=masks.device).unsqueeze(1), snippet]  # B × N × T
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
    B, N, T = curves.shape
    curves = curves.flatten(0, 1)  # B·N × T
    row, start, end = _regions(curves, thresholds, fill_holes)
    level = {"max": _largest, "mean": _mean, "contrast": _contrast}[region_score](curves, row, start, end)
    score = scores.flatten()[row] * level
    keep = ((end - start >= min_length * T) & (score > 0)).nonzero().squeeze(1)
    row, start, end, score = (x[keep] for x in (row, start, end, score))
    return _pad(*_best_of_equals(row // N, labels.flatten()[row], start, end, score, T), B, max_candidates)


def stretch(curves: Tensor) -> Tensor:
    """Curves (..., T), each from 0 at its lowest place to 1 at its highest; a flat one is 0."""
    low, high = curves.amin(-1, keepdim=True), curves.amax(-1, keepdim=True)
    return (curves - low) / (high - low).clamp(min=1e-6)


def _regions(curves: Tensor, thresholds: Sequence[float], fill_holes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Connected regions of ``curves > threshold`` (rows, T), of every threshold, holes between them filled or not.

    Returns:
        For R regions: their row, first place, place after the last.
    """
    length = curves.shape[1] + 2
    padded = F.pad(curves, (1, 1), value=-torch.inf).flatten()  # no region goes on in the next row
    found = [_steps(padded, threshold).view(-1, 2) for threshold in thresholds]  # up and down by turns
    if fill_holes:
        found = [_outermost(regions, length) for regions in found]
    begin, end = torch.cat(found).unbind(1)
    row = begin // length
    return row, begin - row * length, end - row * length


def _steps(values: Tensor, threshold: float) -> Tensor:
    """The places of ``values`` (n,) after which they step over ``threshold``, up or down."""
    if values.is_cpu:  # numpy compares eight times and searches four times faster than torch
        above = values.numpy() > threshold
        return torch.from_numpy(np.flatnonzero(above[1:] != above[:-1]))
    above = values > threshold
    return (above[1:] != above[:-1]).nonzero().squeeze(1)


def _outermost(regions: Tensor, length: int) -> Tensor:
    """One region for those (R, 2) in each row of ``length`` places: from where the first begins to the last's end."""
    row = regions[:, 0] // length
    first = row.diff(prepend=row.new_full((1,), -1)) > 0
    last = first.roll(-1)  # before the first of the next row
    return torch.stack([regions[first, 0], regions[last, 1]], 1)


def _order(keys: Tensor) -> Tensor:
    """What sorts ``keys`` (n,), equal ones in any order; on the CPU by numpy, five times faster than torch."""
    return torch.from_numpy(np.argsort(keys.numpy())) if keys.is_cpu else keys.argsort()


def _largest(values: Tensor, row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Maxima (R,) of ``values[row, start:end]``: two windows as long as a power of two cover any range."""
    T = values.shape[1]
    windows = values.new_empty(T.bit_length(), *values.shape)  # [n, :, t]: over the 2^n places from t on
    windows[0] = values
    for n in range(1, len(windows)):
        half = 2 ** (n - 1)
        torch.maximum(windows[n - 1, :, :-half], windows[n - 1, :, half:], out=windows[n, :, :-half])
    power = (end - start).float().frexp().exponent.long() - 1
    line, flat = (power * len(values) + row) * T, windows.flatten()
    return torch.maximum(flat[line + start], flat[line + end - 2**power])


def _mean(values: Tensor, row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Means (R,) of ``values[row, start:end]``."""
    sums = _sums(values)
    return ((sums[row, end] - sums[row, start]) / (end - start)).to(values.dtype)


def _contrast(values: Tensor, row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Means (R,) of ``values[row, start:end]`` less those of what lies around, 0 where there is nothing around."""
    sums, reach = _sums(values), ((end - start) // 4).clamp(min=1)
    first, last = (start - reach).clamp(min=0), (end + reach).clamp(max=values.shape[1])
    inner, length = sums[row, end] - sums[row, start], end - start
    outer, around = sums[row, last] - sums[row, first] - inner, last - first - length
    return (inner / length - outer / around.clamp(min=1)).to(values.dtype)


def _sums(values: Tensor) -> Tensor:
    """Sums (rows, T + 1) of ``values`` (rows, T) from the left, in double, so that a difference of two is one."""
    T = values.shape[1]
    until = torch.ones(T, T, dtype=torch.double, device=values.device).triu()  # a product repeats itself, on GPUs too
    return F.pad(values.double() @ until, (1, 0))


def _best_of_equals(
    video: Tensor, label: Tensor, start: Tensor, end: Tensor, score: Tensor, T: int
) -> tuple[Tensor, ...]:
    """Of candidates with the same video, class and segment, the one with the highest score; in that order."""
    K = label.max() + 1 if len(label) else 1
    key = ((video * K + label) * (T + 1) + start) * (T + 1) + end
    order = _order(key)
    new = key[order].diff(prepend=key.new_full((1,), -1)) > 0
    first = order[new]
    best = score.new_zeros(len(first)).scatter_reduce(0, new.cumsum(0) - 1, score[order], "amax")
    return video[first], label[first], start[first], end[first], best


def _pad(
    video: Tensor, label: Tensor, start: Tensor, end: Tensor, score: Tensor, B: int, max_candidates: int
) -> Candidates:
    """A flat list by rising video → (B, M) by falling score within each."""
    count = torch.bincount(video, minlength=B)
    first = count.cumsum(0) - count  # B, of each video in the list
    table = score.new_zeros(B, max(1, int(count.max())))
    table[video, torch.arange(len(video), device=video.device) - first[video]] = score
    scores, order = table.sort(dim=1, descending=True, stable=True)
    M = max(1, min(max_candidates, table.shape[1]))
    scores, place = scores[:, :M], first.unsqueeze(1) + order[:, :M]
    place = torch.where(scores > 0, place, len(video))  # padding reads the row of zeros at the end
    segment, label = F.pad(torch.stack([start, end], 1), (0, 0, 0, 1)), F.pad(label, (0, 1))
    return Candidates(segment[place].to(score.dtype), scores, label[place])
