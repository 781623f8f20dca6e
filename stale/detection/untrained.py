"""Rows that need no training: what the features and the original text tower give by themselves.

V videos, T snippets, K classes under test, C joint width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.data.annotations import Video
from stale.detection.decode import Candidates, best_regions
from stale.detection.detector import Results, to_results

ROWS = ("whole_video", "snippets")
_TEMPERATURE = 0.01  # CLIP's


def detect_untrained(
    row: str, videos: Sequence[Video], features: Tensor, text: Tensor, labels: Sequence[str], options: DetectionConfig
) -> Results:
    """Detections of one of :data:`ROWS`.

    ``whole_video``: similarity of the mean-pooled features; its best class on the whole video.
    ``snippets``: the similarity of each snippet to that class, from its lowest to its highest value in the video
    thresholded at ``options.thresholds``; the regions' highest values are their scores.

    Args:
        features: (V, T, C).
        text: (K, C) features of the classes under test, from the untrained tower.
    """
    results: Results = {}
    for first in range(0, len(videos), options.batch_size):
        part = videos[first : first + options.batch_size]
        similarity = _similarity(features[first : first + len(part)].float(), text)  # B × K × T
        candidates = _whole_video(similarity) if row == "whole_video" else _snippets(similarity, options)
        results.update(to_results(part, candidates, labels, features.shape[1], options))
    return results


def _similarity(features: Tensor, text: Tensor) -> Tensor:
    return F.normalize(text, dim=-1) @ F.normalize(features, dim=-1).transpose(1, 2)


def _whole_video(similarity: Tensor) -> Candidates:
    B, _, T = similarity.shape
    score, label = (similarity.mean(2) / _TEMPERATURE).softmax(1).max(1, keepdim=True)
    return Candidates(torch.tensor([0.0, T]).expand(B, 1, 2), score, label)


def _snippets(similarity: Tensor, options: DetectionConfig) -> Candidates:
    score, label = (similarity.mean(2) / _TEMPERATURE).softmax(1).max(1, keepdim=True)  # B × 1
    curve = similarity.gather(1, label.unsqueeze(2).expand(-1, -1, similarity.shape[2]))  # B × 1 × T
    low, high = curve.amin(2, keepdim=True), curve.amax(2, keepdim=True)
    curve = (curve - low) / (high - low).clamp(min=1e-6)
    return best_regions(curve, score, label, options.thresholds, options.candidates, options.min_length)
