"""Gaussian SoftNMS (Bodla et al., ICCV 2017), for many videos at once.

B videos, M candidates a video (padded with score 0).
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_nms(
    segments: Tensor, scores: Tensor, labels: Tensor, sigma: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Pick candidates by falling score, each lowering the scores of its class by exp(-tIoU² / sigma).

    Args:
        segments: (B, M, 2), any unit; candidates of different labels (B, M) do not touch each other.
        scores: (B, M), at least 0; 0 stands for padding.

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
        remaining = remaining * torch.exp(-tiou.square() / sigma)
        remaining.scatter_(1, best, -1.0)  # out of the game
    return torch.cat(picked, 1), torch.cat(picked_scores, 1).clamp(min=0)
