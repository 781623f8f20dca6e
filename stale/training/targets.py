"""Training targets from lists of segments, by broadcasting on the device (stale/README.md, "Targets").

B videos, T snippets, N instances of the video that has most, K classes of the vocabulary, in training the seen classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stale.data.dataset import IGNORED, inside_segments


@dataclass(frozen=True)
class Targets:
    """What the losses compare the outputs with.

    Attributes:
        classes: (B, K+1, T), a distribution over the classes for each snippet. The background comes last.
        masks: (B, T, T) bool. Column t is the extent of the instance around snippet t; background columns are empty.
        foreground: (B, T) bool, the snippets inside an instance of the vocabulary.
        valid: (B, T) bool, False for snippets inside instances of other classes only. No loss counts these.
    """

    classes: Tensor
    masks: Tensor
    foreground: Tensor
    valid: Tensor


def build_targets(segments: Tensor, labels: Tensor, num_classes: int, num_snippets: int) -> Targets:
    """Targets of a batch, on the device of its segments.

    A snippet is inside an instance that contains its center; an instance without any has the snippet at its middle.
    Where instances overlap (THUMOS14's CliffDiving inside Diving), their classes share the snippet's probability
    equally, and the mask is the shortest one's [ours]. The vocabulary's instances take precedence over ignored ones.

    Args:
        segments: (B, N, 2) in snippets.
        labels: (B, N), the class, ``IGNORED`` or ``PADDING``.
    """
    inside = inside_segments(segments, num_snippets)  # B × N × T
    known = inside & (labels >= 0).unsqueeze(2)
    ignored = inside & (labels == IGNORED).unsqueeze(2)
    foreground = known.any(1)  # B × T
    valid = foreground | ~ignored.any(1)

    # classes[b, k, t] = 1 / number of classes around snippet t, if k is one of them
    classes = torch.zeros(len(labels), num_classes + 1, num_snippets, device=labels.device)
    index = labels.clamp(min=0).unsqueeze(2).expand_as(known)
    classes.scatter_reduce_(1, index, known.float(), "amax")
    classes[:, -1] = (~foreground).float()
    classes /= classes.sum(1, keepdim=True)

    # masks[b, :, t] = the extent of the shortest instance around snippet t
    lengths = segments[..., 1] - segments[..., 0]  # B × N
    shortest = lengths.unsqueeze(2).masked_fill(~known, torch.inf).argmin(1)  # B × T
    extents = known.gather(1, shortest.unsqueeze(2).expand(-1, -1, num_snippets))  # B × T × T, a row for each snippet
    masks = (extents & foreground.unsqueeze(2)).transpose(1, 2)
    return Targets(classes, masks, foreground, valid)
