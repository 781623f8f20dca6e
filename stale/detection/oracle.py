"""Ground truth in place of a prediction: what a stage would be worth if the one before it were perfect.

An upper bound and never a result: wherever it is used, the protocol of the detections says so.

B videos, T snippets, N instances of the video that has most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stale.data.annotations import Video
from stale.data.dataset import IGNORED, PADDING, inside_segments, segment_lists
from stale.errors import StaleError, name_some

DESCRIPTIONS = {
    "none": "none",
    "masks": "GROUND-TRUTH MASKS at test time",
    "proposals": "GROUND-TRUTH SEGMENTS at test time",
}


def true_segments(
    videos: Sequence[Video], labels: Sequence[str], num_snippets: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The instances of ``labels``, without their classes.

    Returns:
        Segments (B, N, 2) in snippets, inside the video, and whether each is one (B, N) rather than padding.

    Raises:
        StaleError: a video has none, so that there is no truth to take the prediction's place.
    """
    segments, classes = segment_lists(videos, labels, num_snippets)
    known = (classes != PADDING) & (classes != IGNORED)
    without = [video.id for video, row in zip(videos, known, strict=True) if not row.any()]
    if without:
        raise StaleError(f"no ground truth of the classes under test, which an oracle needs, in {name_some(without)}")
    return segments.clamp(0, num_snippets).to(device), known.to(device)


def true_masks(videos: Sequence[Video], labels: Sequence[str], num_snippets: int, device: torch.device) -> Tensor:
    """The foreground of ``labels`` (B, T): 1 where a snippet lies in an instance, else 0."""
    segments, known = true_segments(videos, labels, num_snippets, device)
    return (inside_segments(segments, num_snippets) & known.unsqueeze(2)).any(1).float()
