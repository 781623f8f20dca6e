"""Model and videos → detections, in ActivityNet's results form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stale.config import DetectionConfig
from stale.data.annotations import Video
from stale.data.dataset import inside_segments
from stale.detection.decode import Candidates, decode_masks
from stale.detection.oracle import true_masks, true_segments
from stale.detection.soft_nms import soft_nms
from stale.memory import names_knob
from stale.model.stale import Outputs, Stale, name_pooled
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
            with names_knob("detection.batch_size", options.batch_size, "; a run's config.yaml may be changed there"):
                snippets = features[first : first + len(part)].to(device).float()
                _, candidates = read_videos(model, part, snippets, text, labels, options)
                results.update(to_results(part, candidates, labels, features.shape[1], options))
            bar.update(len(part))
    return results


def read_videos(
    model: Stale,
    videos: Sequence[Video],
    features: Tensor,
    text: Tensor,
    labels: Sequence[str],
    options: DetectionConfig,
) -> tuple[Outputs, Candidates]:
    """A batch's outputs and candidates; features (B, T, D) and text (K, C) on the model's device.

    The videos' ground truth is read only where the model or ``options.oracle`` has it stand in for a prediction.
    """
    num_snippets, device = features.shape[1], features.device
    masked = model.mask_given or options.oracle == "masks"
    outputs = model(features, text, true_masks(videos, labels, num_snippets, device) if masked else None)
    if options.oracle != "proposals":
        return outputs, candidates_of(outputs, options)
    segments, known = true_segments(videos, labels, num_snippets, device)
    return outputs, name_segments(outputs, segments, known.float(), options)


def candidates_of(outputs: Outputs, options: DetectionConfig) -> Candidates:
    """Decode a batch's outputs: by class, or class-agnostic proposals that are named afterwards."""
    if options.name_by == "snippets":
        return _decode(outputs, class_scores_of(outputs, options.foreground_weight), options)
    proposals = _decode(outputs, outputs.foreground.float().unsqueeze(1), options)
    return name_segments(outputs, proposals.segments, proposals.scores, options)


def name_segments(outputs: Outputs, segments: Tensor, scores: Tensor, options: DetectionConfig) -> Candidates:
    """Give every class to every segment: the segment's score times the probability of the class.

    That is of the features pooled over the segment (``options.name_by=proposals``), else the mean over its snippets.

    Args:
        segments: (B, M, 2) in snippets.
        scores: (B, M); 0 stands for padding.
    """
    inside = inside_segments(segments, outputs.class_logits.shape[2]).float()  # B × M × T
    if options.name_by == "proposals":
        pooled = inside @ outputs.evidence.float()  # B × M × C; the cosine needs no mean
        names = name_pooled(pooled, outputs.language[:, :-1], outputs.temperature).softmax(2)  # B × M × K
    else:
        of_snippets = class_scores_of(outputs, options.foreground_weight).transpose(1, 2)
        names = inside @ of_snippets / inside.sum(2, keepdim=True)
    every = (scores.unsqueeze(2) * names).flatten(1)  # B × M·K
    best, place = every.topk(min(options.candidates, every.shape[1]), dim=1)
    segment = (place // names.shape[2]).unsqueeze(2).expand(-1, -1, 2)
    return Candidates(segments.gather(1, segment), best, place % names.shape[2])


def _decode(outputs: Outputs, class_scores: Tensor, options: DetectionConfig) -> Candidates:
    return decode_masks(
        class_scores,
        outputs.mask_logits.float().sigmoid(),
        options.top_snippets,
        options.thresholds,
        options.candidates,
        options.min_length,
        options.region_score,
        options.fill_holes,
    )


def class_scores_of(outputs: Outputs, foreground_weight: bool) -> Tensor:
    """Scores (B, K, T) of the classes under test; the background takes part in the softmax and is left out.

    A masked-out snippet has cosine 0 with every class, so the softmax alone gives it the same probability for each,
    which can be more than a true foreground snippet has: ``foreground_weight`` multiplies L in.
    """
    class_scores = outputs.class_logits.float().softmax(1)[:, :-1]
    if foreground_weight and outputs.foreground is not None:
        return class_scores * outputs.foreground.float().unsqueeze(1)
    return class_scores


def to_results(
    videos: Sequence[Video], candidates: Candidates, labels: Sequence[str], num_snippets: int, options: DetectionConfig
) -> Results:
    """SoftNMS over a batch's candidates, then seconds and class labels."""
    picked, scores = soft_nms(
        candidates.segments,
        candidates.scores,
        candidates.labels,
        options.nms_sigma,
        options.max_detections,
        options.nms,
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
