"""Rows that need no training: what the features and the original text tower give by themselves.

B videos, T snippets, K classes under test, C joint width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.data.annotations import Video
from stale.detection.decode import Candidates, best_regions, stretch
from stale.detection.detector import Results, to_results

ROWS = ("whole_video", "snippets")
_TEMPERATURE = 0.01  # CLIP's


def detect_untrained(
    row: str, videos: Sequence[Video], features: Tensor, text: Tensor, labels: Sequence[str], options: DetectionConfig
) -> Results:
    """A batch's detections of one of :data:`ROWS`.

    ``whole_video``: similarity of the mean-pooled features; its best class on the whole video.
    ``snippets``: the similarity of each snippet to that class, from its lowest to its highest value in the video
    thresholded at ``options.thresholds``; the regions' highest values are their scores.

    Args:
        features: (B, T, C).
        text: (K, C) features of the classes under test, from the untrained tower.
    """
    snippets, names = F.normalize(features.float(), dim=-1), F.normalize(text, dim=-1)
    video = (F.normalize(snippets.mean(1), dim=-1) @ names.T / _TEMPERATURE).softmax(1)  # B × K
    score, label = video.max(1, keepdim=True)
    if row == "whole_video":
        span = snippets.new_tensor([0.0, features.shape[1]]).expand(len(videos), 1, 2)
        candidates = Candidates(span, score, label)
    else:
        curve = stretch(names[label] @ snippets.transpose(1, 2))  # B × 1 × T
        candidates = best_regions(curve, score, label, options.thresholds, options.candidates, options.min_length)
    return to_results(videos, candidates, labels, features.shape[1], options)
