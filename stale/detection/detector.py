"""Model and videos → detections, in ActivityNet's results form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stale.config import DetectionConfig
from stale.data.annotations import Video
from stale.detection.decode import Candidates, decode_masks
from stale.detection.soft_nms import soft_nms
from stale.model.stale import Outputs, Stale
from stale.segments import snippets_to_seconds

Results = dict[str, list[dict[str, Any]]]


@torch.inference_mode()
def detect(
    model: Stale,
    videos: Sequence[Video],
    features: Tensor,
    labels: Sequence[str],
    phrases: Sequence[str],
    options: DetectionConfig,
    progress: bool = True,
) -> Results:
    """Detect the classes ``labels``, named by ``phrases``, in every video.

    Args:
        features: (videos, T, D) on any device; batches move to the model's.

    Returns:
        Video id → detections by falling score, each ``{"segment": [start, end] seconds, "label", "score"}``.
        Every video has an entry, an empty list where nothing was found.
    """
    model.eval()
    device = model.background.device
    text = model.text(model.text.tokenize(phrases).to(device))  # once for the vocabulary
    results: Results = {}
    with tqdm(total=len(videos), desc="detect", unit="video", leave=False, disable=not progress) as bar:
        for first in range(0, len(videos), options.batch_size):
            part = videos[first : first + options.batch_size]
            outputs = model(features[first : first + len(part)].to(device).float(), text)
            results.update(to_results(part, candidates_of(outputs, options), labels, features.shape[1], options))
            bar.update(len(part))
    return results


def candidates_of(outputs: Outputs, options: DetectionConfig) -> Candidates:
    """Decode a batch's outputs; the background takes part in the softmax and names no candidate.

    A masked-out snippet has cosine 0 with every class, so the softmax alone gives it the same probability for each,
    which can be more than a true foreground snippet has: ``options.foreground_weight`` multiplies L in.
    """
    class_scores = outputs.class_logits.float().softmax(1)[:, :-1]
    if options.foreground_weight and outputs.foreground_logits is not None:
        class_scores = class_scores * outputs.foreground_logits.float().sigmoid().unsqueeze(1)
    masks = outputs.mask_logits.float().sigmoid()
    return decode_masks(
        class_scores,
        masks,
        options.top_snippets,
        options.thresholds,
        options.candidates,
        options.min_length,
        options.region_score,
    )


def to_results(
    videos: Sequence[Video], candidates: Candidates, labels: Sequence[str], num_snippets: int, options: DetectionConfig
) -> Results:
    """SoftNMS over a batch's candidates, then seconds and class labels."""
    picked, scores = soft_nms(
        candidates.segments, candidates.scores, candidates.labels, options.nms_sigma, options.max_detections
    )
    segments = candidates.segments.gather(1, picked.unsqueeze(2).expand(-1, -1, 2)).tolist()
    names, scores = candidates.labels.gather(1, picked).tolist(), scores.tolist()
    results: Results = {}
    for video, *rows in zip(videos, segments, names, scores, strict=True):
        results[video.id] = [
            {
                "segment": [round(snippets_to_seconds(x, video.duration, num_snippets), 3) for x in segment],
                "label": labels[name],
                "score": score,
            }
            for segment, name, score in zip(*rows, strict=True)
            if score > 0
        ]
    return results
