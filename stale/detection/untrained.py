"""Rows that need no training: what the features and the original text tower give by themselves.

V videos, T snippets, K classes under test, C joint width.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        snippets = F.normalize(features[first : first + len(part)].float(), dim=-1)  # B × T × C
        names = F.normalize(text, dim=-1)
        video = (F.normalize(snippets.mean(1), dim=-1) @ names.T / _TEMPERATURE).softmax(1)  # B × K
        score, label = video.max(1, keepdim=True)
        if row == "whole_video":
            span = snippets.new_tensor([0.0, features.shape[1]]).expand(len(part), 1, 2)
            candidates = Candidates(span, score, label)
        else:
            candidates = _snippets(snippets, names[label], score, label, options)
        results.update(to_results(part, candidates, labels, features.shape[1], options))
    return results


def _snippets(snippets: Tensor, name: Tensor, score: Tensor, label: Tensor, options: DetectionConfig) -> Candidates:
    """Thresholded similarity of snippets (B, T, C) to each video's class (B, 1, C), its ``score`` and ``label``."""
    curve = name @ snippets.transpose(1, 2)  # B × 1 × T
    low, high = curve.amin(2, keepdim=True), curve.amax(2, keepdim=True)
    curve = (curve - low) / (high - low).clamp(min=1e-6)
    return best_regions(curve, score, label, options.thresholds, options.candidates, options.min_length)
