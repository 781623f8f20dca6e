"""Gaussian SoftNMS (Bodla et al., ICCV 2017), for many videos at once (stale/README.md, Inference).

B videos, M proposals a video (padded with score 0), P picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stale.config import DetectionConfig

# Pairs of proposals up to which the factors of all are computed before the first pick: on a CPU as many as its cache
# holds, on a GPU as its memory may. Beyond, each pick computes its own. Both ways give the same to the bit.
_MOST_PAIRS = {"cpu": 1 << 18, "cuda": 1 << 26}


def soft_nms(segments: Tensor, scores: Tensor, labels: Tensor, options: DetectionConfig) -> tuple[Tensor, Tensor]:
    """Pick proposals by falling score, each lowering the scores of its class by exp(-tIoU² / σ).

    With ``options.nms=official`` the factor is exp(-10 · tIoU²) / 0.6 wherever two overlap [C], which is above 1 where
    the overlap is slight.

    Args:
        segments: (B, M, 2), any unit; proposals of different labels (B, M) do not affect each other.
        scores: (B, M), at least 0; 0 stands for padding.

    Returns:
        Of at most ``options.max_detections`` picks a video, in order: indices (B, P) into M and their lowered scores
        (B, P); where the score is 0 nothing was left to pick, and the index is any.
    """

    def factors(segment: Tensor, label: Tensor) -> Tensor:
        """The factors (B, P, M) of P proposals (B, P, 2) and (B, P) on the scores of all."""
        (start, end), (begin, stop) = segment.unsqueeze(2).unbind(3), segments.unsqueeze(1).unbind(3)
        overlap = (torch.minimum(end, stop) - torch.maximum(start, begin)).clamp_(min=0)
        union = (end - start) + (stop - begin) - overlap
        tiou = overlap / union.clamp_(min=1e-8) * (label.unsqueeze(2) == labels.unsqueeze(1))
        if options.nms == "gaussian":
            return tiou.square_().div_(-options.nms_sigma).exp_()
        return torch.where(tiou > 0, torch.exp(-10 * tiou.square()) / 0.6, torch.ones_like(tiou))

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
