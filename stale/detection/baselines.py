"""Training-free baselines, with settings of their own (B videos, T snippets, K classes under test, C joint width)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.detection.decode import Proposals, threshold_masks
from stale.run_folder import BASELINES

# Low thresholds only add long segments that the highest value scores alike.
_TOP_CLASS = DetectionConfig(thresholds=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], max_proposals=1000)
_ALL_CLASSES = _TOP_CLASS.model_copy(update={"max_detections": 200})
OPTIONS = {name: _ALL_CLASSES if name.endswith("_all_classes") else _TOP_CLASS for name in BASELINES}
_TEMPERATURE = 0.01  # CLIP's


def baseline_proposals(name: str, features: Tensor, text: Tensor) -> Proposals:
    """Proposals of a baseline in a batch.

    ``whole_video``: the video's best class on the whole video, scored by its probability. ``snippets``: the similarity
    of each snippet to that class, min-max normalized and thresholded. ``*_all_classes``: the same for every class.
    Features are (B, T, C), text features (K, C) of the original text encoder.
    """
    snippets, classes = F.normalize(features.float(), dim=-1), F.normalize(text, dim=-1)
    video = (F.normalize(snippets.mean(1), dim=-1) @ classes.T / _TEMPERATURE).softmax(1)  # B × K
    score, label = video.topk(len(classes) if name.endswith("_all_classes") else 1)  # B × n classes that are detected
    if name.startswith("whole_video"):
        segments = snippets.new_tensor([0.0, features.shape[1]]).expand(*score.shape, 2)
        return Proposals(segments, score, label, features.shape[1])
    curves = min_max_normalize(classes[label] @ snippets.transpose(1, 2))  # B × n × T
    scores = torch.zeros_like(video).unsqueeze(2).repeat(1, 1, score.shape[1])  # B × K × n: each curve has one class
    scores.scatter_(1, label.unsqueeze(1), score.unsqueeze(1))
    options = OPTIONS[name].model_copy(update={"top_snippets": score.shape[1]})
    return threshold_masks(scores, curves.transpose(1, 2), options)


def min_max_normalize(curves: Tensor) -> Tensor:
    """Scale curves (..., T) to 0 at their lowest value and 1 at their highest; a flat one becomes 0."""
    low, high = curves.amin(-1, keepdim=True), curves.amax(-1, keepdim=True)
    return (curves - low) / (high - low).clamp(min=1e-6)
