"""Ground truth in place of a prediction: an upper bound and no result (B videos, N instances, T snippets)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import Config
from stale.data.annotations import Video
from stale.data.dataset import segment_lists
from stale.errors import StaleError, name_some
from stale.model.stale import Outputs
from stale.training.targets import Targets, build_targets

_NAMES = {
    "masks": "GROUND-TRUTH FOREGROUND MASKS L",
    "localizer": "GROUND-TRUTH INSTANCE MASKS M",
    "labels": "GROUND-TRUTH VIDEO LABELS",
    "proposals": "GROUND-TRUTH SEGMENTS",
}


def describe_oracle(config: Config) -> str:
    """Which ground truth takes a prediction's place, for the protocol."""
    given = config.model.masking.kind == "gt"
    used = [f"{_NAMES['masks']} in training and at test time"] if given else []
    tested = [name for name in _NAMES if name in config.detection.oracle and not (given and name == "masks")]
    return ", ".join([*used, *(f"{_NAMES[name]} at test time" for name in tested)]) or "none"


def true_segments(videos: Sequence[Video], labels: Sequence[str], num_snippets: int) -> tuple[Tensor, Tensor]:
    """Instances of ``labels``, of which every video must have one: segments (B, N, 2) in snippets, classes (B, N)."""
    segments, classes = segment_lists(videos, labels, num_snippets)
    without = [video.id for video, row in zip(videos, classes >= 0, strict=True) if not row.any()]
    if without:
        raise StaleError(f"no ground truth of the classes under test, which an oracle needs, in {name_some(without)}")
    return segments.clamp(0, num_snippets), classes


def true_targets(
    videos: Sequence[Video], labels: Sequence[str], num_snippets: int, device: torch.device | None = None
) -> Targets:
    """The targets of the instances of ``labels``, as for training; a video without any is a StaleError."""
    segments, classes = true_segments(videos, labels, num_snippets)
    return build_targets(segments.to(device), classes.to(device), len(labels), num_snippets)


def substitute(outputs: Outputs, truth: Targets, oracle: Sequence[str]) -> Outputs:
    """Put ground truth in place of M (``localizer``) and of the classes of each video (``labels``)."""
    if "localizer" in oracle:
        assert truth.masks is not None
        inside = truth.masks.float()
        outputs = replace(outputs, mask_logits=(inside - 0.5) * torch.inf)  # their sigmoid is 0 or 1
    if "labels" in oracle:
        present = truth.classes[:, :-1].amax(2) > 0  # B × K
        absent = F.pad(~present, (0, 1))  # the background is never absent
        video = outputs.video_cosine
        outputs = replace(
            outputs,
            class_logits=outputs.class_logits.masked_fill(absent.unsqueeze(2), -torch.inf),
            video_cosine=None if video is None else video.masked_fill(~present, -torch.inf),
            true_classes=present,
        )
    return outputs
