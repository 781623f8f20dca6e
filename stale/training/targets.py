"""Training targets from segment lists, by broadcasting on the device (section 6).

B videos, T snippets, N instances of the video that has most, K classes of the (seen) vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stale.data.dataset import IGNORED, inside_segments


@dataclass(frozen=True)
class Targets:
    """What the losses compare with.

    Attributes:
        classes: (B, K+1, T) distribution over the classes of each snippet; the background comes last.
        masks: (B, T, T) bool; [:, s, t]: place s belongs to the instance of snippet t. Background columns are empty.
        foreground: (B, T) bool; the snippet lies in an instance of the vocabulary.
        answering: (B, T) bool; the snippet has a class and a mask of its own: the foreground, or its central part.
        valid: (B, T) bool; False where only instances outside the vocabulary lie: counted in no loss.
    """

    classes: Tensor
    masks: Tensor
    foreground: Tensor
    answering: Tensor
    valid: Tensor


def build_targets(
    segments: Tensor, labels: Tensor, num_classes: int, num_snippets: int, center: float = 1.0
) -> Targets:
    """Segments (B, N, 2) in snippets and labels (B, N) → :class:`Targets` on the same device.

    A snippet belongs to an instance that contains its centre; an instance too short for that keeps the snippet
    at its middle, so that every instance counts. Where instances overlap (THUMOS14's CliffDiving inside Diving),
    the classes of all of them share the snippet's probability equally, and the mask is the shortest one's. Where
    instances of the vocabulary and others overlap, the vocabulary's decide.

    Args:
        center: the share of an instance around its middle whose snippets answer for it: the others stay foreground
            and a part of its mask, but have no class and no mask of their own (center sampling, as in ActionFormer).
    """
    inside = inside_segments(segments, num_snippets)  # B × N × T
    known = inside & (labels >= 0).unsqueeze(2)
    foreground = known.any(1)
    valid = foreground | ~(inside & (labels == IGNORED).unsqueeze(2)).any(1)

    central, answering = known, foreground  # B × N × T, and of any instance
    if center < 1:
        middle, half = segments.mean(2, keepdim=True), segments.diff(dim=2) * center / 2
        central = known & inside_segments(torch.cat([middle - half, middle + half], 2), num_snippets)
        answering = central.any(1)

    index = labels.clamp(min=0).unsqueeze(2).expand_as(known)
    classes = torch.zeros(len(labels), num_classes + 1, num_snippets, device=labels.device)
    classes.scatter_reduce_(1, index, central.float(), "amax")
    classes[:, -1] = (~answering).float()
    classes /= classes.sum(1, keepdim=True)

    lengths = (segments[..., 1] - segments[..., 0]).unsqueeze(2).masked_fill(~central, torch.inf)
    own = lengths.argmin(1)  # B × T: of the instances that a snippet answers for, the shortest
    masks = known.gather(1, own.unsqueeze(2).expand(-1, -1, num_snippets)) & answering.unsqueeze(2)
    return Targets(classes, masks.transpose(1, 2), foreground, answering, valid)
