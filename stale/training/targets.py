"""Training targets from lists of segments, by broadcasting on the device (stale/README.md, "Targets").

B videos, T snippets, N instances of the video that has most, K classes of the vocabulary, in training the seen classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import PointsConfig
from stale.data.dataset import IGNORED, inside_segments
from stale.model.points import PointGrid

_ROUNDS = 2  # of assigning snippets to instances without any


@dataclass(frozen=True)
class PointTargets:
    """What the point head's outputs are compared with, for P points."""

    positive: Tensor  # (B, P) bool, near the center of an instance whose length suits the point's level
    valid: Tensor  # (B, P) bool, False inside instances of other classes and at padding
    distances: Tensor  # (B, P, 2) to start and end of the instance in snippets, where positive


@dataclass(frozen=True)
class Targets:
    """What the losses compare the outputs with."""

    classes: Tensor  # (B, K+1, T), a distribution over the classes for each snippet, the background last
    masks: Tensor | None  # (B, T, T) bool, in column t the extent of the instance that owns snippet t; None without M
    foreground: Tensor  # (B, T) bool, the snippets inside an instance of the vocabulary
    valid: Tensor  # (B, T) bool, False inside instances of other classes only, and for padding: no loss counts these
    unambiguous: Tensor  # (B, T) bool, False inside all instances of other classes, which L_c does not count either
    points: PointTargets | None = None


def build_targets(
    segments: Tensor,
    labels: Tensor,
    num_classes: int,
    num_snippets: int,
    *,
    valid: Tensor | None = None,
    masks: bool = True,
    points: PointsConfig | None = None,
) -> Targets:
    """Targets of a batch, on the device of its segments.

    A snippet is inside an instance that contains its center; an instance without any has the snippet at its middle.
    Where instances overlap, their classes share the snippet's probability equally, and the mask is that of the
    snippet's owner, :func:`assign_owners` [ours].
    Segments are (B, N, 2) in snippets, labels (B, N) classes, ``IGNORED`` or ``PADDING``; ``valid`` (B, T) is False for
    padding; ``masks`` and ``points`` tell of the action mask localizer and the point head.
    """
    inside = inside_segments(segments, num_snippets)  # B × N × T
    if valid is not None:
        inside = inside & valid.unsqueeze(1)
    known, ignored = (inside & which.unsqueeze(2) for which in (labels >= 0, labels == IGNORED))
    foreground, ignored = known.any(1), ignored.any(1)  # B × T
    counted = foreground | ~ignored
    if valid is not None:
        counted = counted & valid
    at_points = None if points is None else build_point_targets(segments, labels, counted, points)

    # classes[b, k, t] = 1 / number of classes around snippet t, if k is one of them
    classes = torch.zeros(len(labels), num_classes + 1, num_snippets, device=labels.device)
    index = labels.clamp(min=0).unsqueeze(2).expand_as(known)
    classes.scatter_reduce_(1, index, known.float(), "amax")
    classes[:, -1] = (~foreground).float()
    classes /= classes.sum(1, keepdim=True)

    extents = None
    if masks:  # [b, :, t] = the extent of the owner of snippet t
        owner = assign_owners(segments, known).unsqueeze(2).expand(-1, -1, num_snippets)
        extents = (known.gather(1, owner) & foreground.unsqueeze(2)).transpose(1, 2)
    return Targets(classes, extents, foreground, counted, unambiguous=counted & ~ignored, points=at_points)


def build_point_targets(segments: Tensor, labels: Tensor, counted: Tensor, config: PointsConfig) -> PointTargets:
    """Which points are positive, and their distances to start and end (ActionFormer's rules).

    A point is positive for an instance that contains it, whose center lies within ``config.radius`` strides of it, and
    whose farther boundary lies [2, 4) strides away, from 0 at the first level and without end at the last. Of several
    such instances it takes the shortest. An instance shorter than a snippet counts as one snippet long. ``counted``
    (B, T) is False for snippets that no loss counts.
    """
    grid = PointGrid.of(counted.shape[1], config.levels, counted.device)
    center, half = segments.mean(2), (segments.diff().squeeze(2) / 2).clamp(min=0.5)  # B × N
    start, end = (center - half).unsqueeze(1), (center + half).unsqueeze(1)  # B × 1 × N
    positions, strides = grid.positions.view(-1, 1), grid.strides.view(-1, 1)  # P × 1
    before, after = positions - start, end - positions  # B × P × N
    farther = torch.maximum(before, after)
    lowest = torch.where(strides > 1, 2 * strides, 0)
    highest = torch.where(strides < 2 ** (config.levels - 1), 4 * strides, torch.inf)
    positive = (before >= 0) & (after >= 0) & (farther >= lowest) & (farther < highest)
    positive &= ((positions - center.unsqueeze(1)).abs() <= config.radius * strides) & (labels >= 0).unsqueeze(1)
    own = half.unsqueeze(1).masked_fill(~positive, torch.inf).argmin(2, keepdim=True)  # B × P × 1, the shortest
    distances = torch.cat([before.gather(2, own), after.gather(2, own)], 2)
    found, valid = positive.any(2), grid.at_points(counted)
    return PointTargets(found & valid, valid, distances)


def assign_owners(segments: Tensor, known: Tensor) -> Tensor:
    """(B, T), the instance whose extent is the mask target of each snippet; of a background snippet, any [ours].

    It is the shortest instance around the snippet. One that owns no snippet then takes the nearest to its middle whose
    owner has another; of several that ask the same owner only the first, the others in the next of ``_ROUNDS``.
    ``known`` (B, N, T) are the snippets inside each instance of the vocabulary.
    """
    (_, N, T), device = known.shape, known.device
    instance = torch.arange(N, device=device)
    lengths, middle = segments[..., 1] - segments[..., 0], segments.mean(2)  # B × N
    owner = lengths.unsqueeze(2).masked_fill(~known, torch.inf).argmin(1)  # B × T
    distance = (torch.arange(T, device=device) + 0.5 - middle.unsqueeze(2)).abs()  # B × N × T
    for _ in range(_ROUNDS):
        owned = _count_owned(owner, known)  # B × N
        available = known & (owned == 0).unsqueeze(2) & (owned.gather(1, owner) > 1).unsqueeze(1)  # B × N × T
        nearest = distance.masked_fill(~available, torch.inf).argmin(2)  # B × N
        asks, asked = available.any(2), owner.gather(1, nearest)
        first = torch.full_like(asked, N).scatter_reduce(1, asked, torch.where(asks, instance, N), "amin")
        takes = asks & (first.gather(1, asked) == instance)
        # The others write into a column that is cut off.
        owner = F.pad(owner, (0, 1)).scatter(1, torch.where(takes, nearest, T), instance.expand_as(nearest))[:, :T]
    return owner


def count_unowned(segments: Tensor, labels: Tensor, num_snippets: int) -> int:
    """Number of the vocabulary's instances that own no snippet, and hence have no mask target, in all videos."""
    count = 0
    for part, label in zip(segments.split(100), labels.split(100), strict=True):  # (B, N, T) of all may be too large
        known = inside_segments(part, num_snippets) & (label >= 0).unsqueeze(2)
        count += int(((_count_owned(assign_owners(part, known), known) == 0) & (label >= 0)).sum())
    return count


def _count_owned(owner: Tensor, known: Tensor) -> Tensor:
    """(B, N), the number of snippets that each instance owns; arguments as of :func:`assign_owners`."""
    instance = torch.arange(known.shape[1], device=owner.device)
    return ((owner.unsqueeze(1) == instance.unsqueeze(1)) & known).sum(2)
