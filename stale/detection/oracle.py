"""Ground truth in place of a prediction: what a stage would be worth if the one before it were perfect.

An upper bound and never a result: wherever it is used, the protocol of the detections says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stale.config import Config
from stale.data.annotations import Video
from stale.data.dataset import IGNORED, PADDING, inside_segments, segment_lists
from stale.errors import StaleError, name_some


def describe_oracle(config: Config) -> str:
    """Which ground truth takes a prediction's place, for the protocol."""
    masks, oracle = config.model.masking.kind == "gt", config.detection.oracle
    used = ["GROUND-TRUTH MASKS in training and at test time"] if masks else []
    if oracle == "masks" and not masks:
        used.append("GROUND-TRUTH MASKS at test time")
    if oracle == "proposals":
        used.append("GROUND-TRUTH SEGMENTS at test time")
    return ", ".join(used) or "none"


def true_segments(videos: Sequence[Video], labels: Sequence[str], num_snippets: int) -> tuple[Tensor, Tensor]:
    """The instances of ``labels``, without their classes: (B, N, 2) in snippets, and which are no padding (B, N).

    N are those of the video that has most; a video without any is a StaleError.
    """
    segments, classes = segment_lists(videos, labels, num_snippets)
    known = (classes != PADDING) & (classes != IGNORED)
    without = [video.id for video, row in zip(videos, known, strict=True) if not row.any()]
    if without:
        raise StaleError(f"no ground truth of the classes under test, which an oracle needs, in {name_some(without)}")
    return segments.clamp(0, num_snippets), known


def true_masks(videos: Sequence[Video], labels: Sequence[str], num_snippets: int) -> Tensor:
    """The foreground of ``labels`` (B, T): 1 where a snippet lies in an instance, else 0."""
    segments, known = true_segments(videos, labels, num_snippets)
    return (inside_segments(segments, num_snippets) & known.unsqueeze(2)).any(1).float()
