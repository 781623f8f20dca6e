"""Training-free baselines: what the features and CLIP's original text encoder give by themselves.

They have settings of their own (:data:`OPTIONS`), whatever the model's.

B videos, T snippets, K classes under test, C joint width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.detection.decode import Proposals, min_max_normalize, threshold_masks

# One curve a video, that of its best class; low thresholds only add long segments that the highest value scores alike.
OPTIONS = DetectionConfig(top_snippets=1, thresholds=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], max_proposals=1000)
_TEMPERATURE = 0.01  # CLIP's


def baseline_proposals(name: str, features: Tensor, text: Tensor) -> Proposals:
    """Proposals of a baseline in a batch.

    ``whole_video``: similarity of the mean-pooled features; the video's best class on the whole video.
    ``snippets``: the similarity of each snippet to that class, min-max normalised and thresholded; a region's score
    is its highest value times the class's.

    Args:
        features: (B, T, C).
        text: (K, C) features of the classes under test, by the original text encoder.
    """
    snippets, classes = F.normalize(features.float(), dim=-1), F.normalize(text, dim=-1)
    video = (F.normalize(snippets.mean(1), dim=-1) @ classes.T / _TEMPERATURE).softmax(1)  # B × K
    score, label = video.max(1, keepdim=True)
    if name == "whole_video":
        segment = snippets.new_tensor([0.0, features.shape[1]]).expand(len(features), 1, 2)
        return Proposals(segment, score, label, features.shape[1])
    similarity = (classes[label] @ snippets.transpose(1, 2)).squeeze(1)  # B × T
    return threshold_masks(video.unsqueeze(2), min_max_normalize(similarity).unsqueeze(2), OPTIONS)
