"""Gaussian SoftNMS (Bodla et al., ICCV 2017), for many videos at once.

B videos, M candidates a video (padded with score 0).
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_nms(
    segments: Tensor, scores: Tensor, labels: Tensor, sigma: float, max_detections: int, form: str = "gaussian"
) -> tuple[Tensor, Tensor]:
    """Pick candidates by falling score, each lowering the scores of its class by exp(-tIoU² / sigma).

    Args:
        segments: (B, M, 2), any unit; candidates of different labels (B, M) do not touch each other.
        scores: (B, M), at least 0; 0 stands for padding.
        form: ``gaussian``, or ``official``: of what overlaps at all, the factor is exp(-10 · tIoU²) / 0.6, the
            released code's, above 1 where the overlap is slight.

    Returns:
        Of at most ``max_detections`` picks a video, in order: indices (B, P) into M and their lowered scores (B, P).
    """
    start, end = segments.unbind(2)
    length = end - start
    remaining = scores.clone()
    picked, picked_scores = [], []
    for _ in range(min(max_detections, scores.shape[1])):
        best_score, best = remaining.max(1, keepdim=True)  # B × 1
        picked.append(best)
        picked_scores.append(best_score)
        overlap = torch.minimum(end, end.gather(1, best)) - torch.maximum(start, start.gather(1, best))
        overlap = overlap.clamp(min=0) * (labels == labels.gather(1, best))
        tiou = overlap / (length + length.gather(1, best) - overlap).clamp(min=1e-8)
        remaining = remaining * _decay(tiou, sigma, form)
        remaining.scatter_(1, best, -1.0)  # out of the game
    return torch.cat(picked, 1), torch.cat(picked_scores, 1).clamp(min=0)


def _decay(tiou: Tensor, sigma: float, form: str) -> Tensor:
    if form == "gaussian":
        return torch.exp(-tiou.square() / sigma)
    return torch.where(tiou > 0, torch.exp(-10 * tiou.square()) / 0.6, torch.ones_like(tiou))
