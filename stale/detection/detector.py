"""Model and videos → detections, in ActivityNet's results form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stale import parallel
from stale.config import DetectionConfig
from stale.data.annotations import Video
from stale.data.dataset import inside_segments
from stale.data.vocabulary import fill_template
from stale.detection.decode import Candidates, best_regions, decode_masks, stretch
from stale.detection.oracle import true_masks, true_segments
from stale.detection.soft_nms import soft_nms
from stale.memory import names_knob
from stale.model.stale import Outputs, Stale, name_pooled
from stale.segments import snippets_to_seconds

Results = dict[str, list[dict[str, Any]]]

_REGION_CLASSES = 10  # of a video, that the foreground's regions are named by; the rest is too unlikely to matter


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

    Several processes share the work; the first has the results of all of them, the others none.

    Args:
        features: (videos, T, D) or a multiple of T snippets, see :func:`read_videos`, on any device; batches move
            to the model's.

    Returns:
        Video id → detections by falling score, each ``{"segment": [start, end] seconds, "label", "score"}``.
        Every video has an entry, an empty list where nothing was found.
    """
    text = describe_classes(model, phrases, options.templates)
    firsts = range(0, len(videos), options.batch_size)
    places = [slice(first, first + options.batch_size) for first in firsts]
    own = (
        detect_batch(model, videos[place], features[place], text, labels, options) for place in parallel.share(places)
    )
    results: Results = {}
    with tqdm(total=len(videos), desc="detect", unit="video", leave=False, disable=not progress) as bar:
        for found in parallel.in_order(own, len(places)):
            results.update(found)
            bar.update(len(found))
    return results


@torch.inference_mode()
def describe_classes(model: Stale, phrases: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
    """Text features (K, C) of ``phrases``, on the model's device: once for a vocabulary.

    Args:
        templates: texts with ``{}`` for the phrase, whose mean is the class; default: the model's own prompt.
    """
    model.eval()
    if templates:
        return describe_groups(model, [[phrase] for phrase in phrases], templates)
    return model.text(model.text.tokenize(phrases).to(model.background.device))


def describe_groups(model: Stale, groups: Sequence[Sequence[str]], templates: Sequence[str] = ()) -> Tensor:
    """Text features (K, C) of classes of several phrases each: the mean over phrases and ``templates``, if any."""
    filled = [fill_template(group, templates) for group in groups] if templates else groups
    return model.text.describe(filled, "{}" if templates else None)


@torch.inference_mode()
def detect_batch(
    model: Stale,
    videos: Sequence[Video],
    features: Tensor,
    text: Tensor,
    labels: Sequence[str],
    options: DetectionConfig,
) -> Results:
    """What :func:`detect` returns, of one batch; features (B, n·T, D) on any device, ``text`` as described."""
    model.eval()
    with names_knob("detection.batch_size", options.batch_size, "; a run's config.yaml may be changed there"):
        snippets = features.to(model.background.device).float()
        outputs, candidates = read_videos(model, videos, snippets, text, labels, options)
        return to_results(videos, candidates, labels, outputs.num_snippets, options)


def read_videos(
    model: Stale,
    videos: Sequence[Video],
    features: Tensor,
    text: Tensor,
    labels: Sequence[str],
    options: DetectionConfig,
) -> tuple[Outputs, Candidates]:
    """A batch's outputs and candidates, both in T snippets; text (K, C) on the model's device.

    The videos' ground truth is read only where the model or ``options.oracle`` has it stand in for a prediction.

    Args:
        features: (B, n·T, D) on the model's device: the model sees them at T snippets, the foreground's own regions
            are read at all n·T.
    """
    coarse = model.coarsen(features)
    num_snippets, device = coarse.shape[1], coarse.device
    masked = model.mask_given or options.oracle == "masks"
    outputs = model(coarse, text, true_masks(videos, labels, num_snippets, device) if masked else None)
    if options.video_evidence:
        outputs = replace(outputs, video_cosine=model.compare_video(coarse, text))
    if options.oracle != "proposals":
        finer = not masked and features is not coarse
        foreground = model.read_foreground(features) if finer and options.regions != "masks" else None
        candidates = candidates_of(outputs, options, foreground)
        if finer and options.windows:
            candidates = Candidates.joined([candidates, read_windows(model, features, text, outputs, options)])
        return outputs, candidates
    segments, known = true_segments(videos, labels, num_snippets, device)
    return outputs, name_segments(outputs, segments, known.float(), options)


def read_windows(model: Stale, features: Tensor, text: Tensor, whole: Outputs, options: DetectionConfig) -> Candidates:
    """Candidates, in T snippets of the video, from its windows of T finer ones, each begun in the middle of another.

    What ends where its window does is cut off there, and whole in another window, unless the video ends there too.

    Args:
        features: (B, n·T, D) on the model's device.
        whole: of the same videos at T snippets; the classes of a whole video are its.
    """
    T, length = whole.num_snippets, features.shape[1]
    options = replace(options, regions="masks")
    found = []
    for first in (step * T // 2 for step in range(2 * length // T - 1)):
        outputs = replace(model(features[:, first : first + T], text), video_cosine=whole.video_cosine)
        window = candidates_of(outputs, options)
        start, end = (window.segments + first).unbind(2)
        cut = (start == first) & (first > 0) | (end == first + T) & (first + T < length)
        segments = torch.stack([start, end], 2) * (T / length)
        found.append(Candidates(segments, window.scores.masked_fill(cut, 0), window.labels))
    return Candidates.joined(found)


def candidates_of(outputs: Outputs, options: DetectionConfig, finer: Tensor | None = None) -> Candidates:
    """Decode a batch's outputs: by class, or class-agnostic proposals that are named afterwards.

    Args:
        finer: L (B, n·T) in place of the outputs' own, for its regions.
    """
    if options.name_by == "proposals":
        proposals = _decode(outputs, outputs.foreground.float().unsqueeze(1), options)
        return name_segments(outputs, proposals.segments, proposals.scores, options)
    class_scores = class_scores_of(outputs, options)  # B × K × T
    video = _video_scores(outputs, options)  # B × K
    found = []
    if options.regions != "foreground":
        weighed = class_scores if video is None else class_scores * video.unsqueeze(2)
        found.append(_decode(outputs, weighed, options))
    if options.regions != "masks":
        names = class_scores.mean(2) if video is None else video
        found.append(_foreground_regions(outputs.foreground if finer is None else finer, names, outputs, options))
    return found[0] if len(found) == 1 else Candidates.joined(found)


def _video_scores(outputs: Outputs, options: DetectionConfig) -> Tensor | None:
    """Probability (B, K) of the classes under test given the whole video, where it is asked for."""
    if not options.video_evidence:
        return None
    return (outputs.video_cosine / options.video_temperature).softmax(1)


def _foreground_regions(foreground: Tensor, names: Tensor, outputs: Outputs, options: DetectionConfig) -> Candidates:
    """Regions of L (B, n·T), stretched from 0 to 1 in each video, under its likeliest classes by ``names`` (B, K).

    A region's score is ``options.foreground_score`` of its values times the class's.
    """
    scores, labels = names.topk(min(_REGION_CLASSES, names.shape[1]), dim=1)
    curves = stretch(foreground).unsqueeze(1).expand(-1, scores.shape[1], -1)
    limits = options.candidates, options.min_length, options.foreground_score
    regions = best_regions(curves, scores, labels, options.thresholds, *limits)
    return replace(regions, segments=regions.segments * (outputs.num_snippets / foreground.shape[1]))


def name_segments(outputs: Outputs, segments: Tensor, scores: Tensor, options: DetectionConfig) -> Candidates:
    """Give every class to every segment: the segment's score times the probability of the class.

    That is of the features pooled over the segment (``options.name_by=proposals``), else the mean over its snippets.

    Args:
        segments: (B, M, 2) in snippets.
        scores: (B, M); 0 stands for padding.
    """
    inside = inside_segments(segments, outputs.num_snippets).float()  # B × M × T
    if options.name_by == "proposals":
        pooled = inside @ outputs.evidence.float()  # B × M × C; the cosine needs no mean
        names = name_pooled(pooled, outputs.language[:, :-1], outputs.temperature).softmax(2)  # B × M × K
    else:
        of_snippets = class_scores_of(outputs, options).transpose(1, 2)
        names = inside @ of_snippets / inside.sum(2, keepdim=True)
    video = _video_scores(outputs, options)
    names = names if video is None else names * video.unsqueeze(1)
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


def class_scores_of(outputs: Outputs, options: DetectionConfig) -> Tensor:
    """Scores (B, K, T) of the classes under test; the background takes part in the softmax and is left out.

    A masked-out snippet has cosine 0 with every class, so the softmax alone gives it the same probability for each,
    which can be more than a true foreground snippet has: ``foreground_weight`` multiplies L in.
    """
    logits = outputs.class_logits.float()
    if options.background_bias:
        logits = torch.cat([logits[:, :-1], logits[:, -1:] + options.background_bias], 1)
    class_scores = logits.softmax(1)[:, :-1]
    if options.foreground_weight and outputs.foreground is not None:
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
    segments = candidates.segments.gather(1, picked.unsqueeze(2).expand(-1, -1, 2)).double().cpu()  # B × P × 2
    durations = torch.tensor([video.duration for video in videos], dtype=torch.float64).view(-1, 1, 1)
    spans = round_to_milliseconds(snippets_to_seconds(segments, durations, num_snippets).numpy()).tolist()
    names, scores = candidates.labels.gather(1, picked).tolist(), scores.tolist()
    results: Results = {}
    for video, *rows in zip(videos, spans, names, scores, strict=True):
        results[video.id] = [
            {"segment": span, "label": labels[name], "score": score}
            for span, name, score in zip(*rows, strict=True)
            if score > 0
        ]
    return results


def round_to_milliseconds(seconds: np.ndarray) -> np.ndarray:
    """``round(x, 3)`` of each: numpy multiplies first, which decides halves of a millisecond by chance."""
    rounded = seconds.round(3)
    halves = np.abs(seconds * 1000 % 1 - 0.5) < 1e-6
    rounded[halves] = [round(x, 3) for x in seconds[halves].tolist()]
    return rounded
