"""Inference of the paper: class scores and masks → scored proposals (stale/README.md, Inference).

B videos, T snippets, K classes under test, N masks a video, M proposals a video, R connected regions, C joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.data.dataset import covered_snippets, inside_segments, pad
from stale.model.stale import Outputs, classify_pooled

SOURCES = ("masks", "foreground", "points", "classes")  # of proposals
_TENSORS = ("segments", "scores", "labels")


@dataclass(frozen=True)
class Proposals:
    """Scored segments of a batch's videos, padded with score 0."""

    segments: Tensor  # (B, M, 2) in snippets
    scores: Tensor  # (B, M)
    labels: Tensor  # (B, M)
    num_snippets: int | list[int]  # T, of all videos or of each


def decode(outputs: Outputs, options: DetectionConfig) -> Proposals:
    """Decode a batch's outputs into proposals; SoftNMS follows.

    By default P and M through :func:`threshold_masks`; other proposals score quality × class probability [ours].
    """
    parts = []
    for source in options.proposals:
        if source == "masks" and options.classify_by == "snippets":
            assert outputs.mask_logits is not None  # as the configuration is checked for
            P, video = class_scores(outputs, options), video_scores(outputs, options)  # B × K × T, B × K
            M = outputs.mask_logits.float().sigmoid()  # B × T × T
            parts.append(threshold_masks(P if video is None else P * video.unsqueeze(2), M, options))
            continue
        if source == "classes":
            part = class_regions(outputs, options)
        else:
            part = classify_proposals(outputs, *agnostic_proposals(outputs, options, source), options)
        if options.classify_by == "calibrated":
            assert outputs.quality_scales is not None
            scales = outputs.quality_scales / outputs.quality_scales.max()  # no score is above 1
            part = replace(part, scores=part.scores * scales[SOURCES.index(source)])
        parts.append(part)
    segments, scores, labels = (torch.cat([getattr(part, name) for part in parts], 1) for name in _TENSORS)
    return Proposals(segments, scores, labels, outputs.num_snippets)


def stack(videos: Sequence[Proposals]) -> Proposals:
    """The proposals of videos of different lengths, each of a single one, padded with score 0."""
    rows = {name: [getattr(video, name)[0] for video in videos] for name in _TENSORS}
    padded = {name: pad(items)[0] for name, items in rows.items()}
    return Proposals(**padded, num_snippets=[video.num_snippets for video in videos])  # type: ignore[misc]


def class_regions(outputs: Outputs, options: DetectionConfig) -> Proposals:
    """Regions of each class [ours]: where the snippets are more similar to it than the video is on average.

    Its mask is the sigmoid of the difference, smoothed over time and times the calibrated weight. A region scores its
    contrast times the probability of the class in the whole video.
    """
    assert outputs.text is not None and outputs.classifier_features is not None and outputs.class_weights is not None
    cosine = classify_pooled(outputs.classifier_features, outputs.text[None], temperature=1.0).mT  # B × K × T
    cosine = F.avg_pool1d(cosine, 2 * options.smoothing + 1, 1, options.smoothing, count_include_pad=False)
    masks = (outputs.class_weights[1] * (cosine - cosine.mean(2, keepdim=True))).sigmoid()
    whole = cosine.new_tensor([0, outputs.num_snippets]).expand(len(cosine), 1, 2)
    P = class_probabilities(outputs, whole, options).squeeze(1).diag_embed()  # B × K × K: mask k is of class k
    changes = {"top_snippets": P.shape[1], "proposal_score": "contrast", "fill_holes": False}
    return threshold_masks(P, masks.mT, options.model_copy(update=changes))


def agnostic_proposals(outputs: Outputs, options: DetectionConfig, source: str) -> tuple[Tensor, Tensor]:
    """Class-agnostic proposals of one of :data:`SOURCES`: segments (B, M, 2) in snippets and their quality (B, M)."""
    L = outputs.foreground
    if source == "points":
        assert outputs.points is not None
        quality = outputs.points.scores()  # B × P
        best, index = quality.topk(min(options.max_proposals, quality.shape[1]), dim=1)
        return _rows(outputs.points.segments().clamp(0, outputs.num_snippets), index), best
    assert L is not None
    if source == "masks":
        assert outputs.mask_logits is not None
        found = threshold_masks(L.unsqueeze(1), outputs.mask_logits.float().sigmoid(), options)
    else:
        changes = {"proposal_score": options.foreground_score, "fill_holes": False}
        mask = (L / L.amax(1, keepdim=True)).unsqueeze(2)  # B × T × 1, one mask for all classes
        found = threshold_masks(torch.ones_like(mask[:, :1]), mask, options.model_copy(update=changes))
    return found.segments, found.scores


def threshold_masks(P: Tensor, M: Tensor, options: DetectionConfig) -> Proposals:
    """Threshold the masks of the top-scoring snippets; each connected region is a proposal [U].

    Its score is the class score times the highest mask score inside [U], or with ``proposal_score=contrast`` the mean
    minus that of a quarter of its length on either side (AutoLoc). Of equal segments of a class only the best is kept.
    P (B, K, N) are class scores of N snippets, M (B, T, N) their masks.
    """
    (B, K, N), T = P.shape, M.shape[1]
    class_score, pair = P.flatten(1).topk(min(options.top_snippets, K * N), dim=1)  # the top-scoring snippets
    label, snippet = pair // N, pair % N
    masks = M[torch.arange(B, device=M.device).unsqueeze(1), :, snippet].flatten(0, 1)  # their columns of M
    row, start, end = _find_regions(masks, options.thresholds, options.fill_holes)  # R regions, for every threshold
    mask_score = _max if options.proposal_score == "max" else _contrast
    score = class_score.flatten()[row] * mask_score(masks, row, start, end)

    keep = ((end - start >= options.min_length * T) & (score > 0)).nonzero().squeeze(1)
    regions = torch.stack([row // pair.shape[1], label.flatten()[row], start, end], 1)[keep]
    return _best_of_equals(regions, score[keep], (B, K, T), options.max_proposals)


def class_scores(outputs: Outputs, options: DetectionConfig) -> Tensor:
    """P (B, K, T) without the background, times L [ours]; with ``one_label`` of the likeliest class alone [C]."""
    scores = outputs.probabilities[:, :-1]
    if options.one_label:
        label = outputs.class_logits[:, :-1].float().mean(2).argmax(1)  # B
        scores = scores * F.one_hot(label, scores.shape[1]).unsqueeze(2)
    if options.foreground_weight and outputs.foreground is not None:
        return scores * outputs.foreground.float().unsqueeze(1)
    return scores


def video_scores(outputs: Outputs, options: DetectionConfig) -> Tensor | None:
    """Video-level scores (B, K): probabilities of the classes in the whole video; None where they are off [ours]."""
    if not options.video_score or outputs.video_cosine is None:
        return None
    return (outputs.video_cosine / options.video_temperature).softmax(1)


def classify_proposals(outputs: Outputs, segments: Tensor, scores: Tensor, options: DetectionConfig) -> Proposals:
    """Give every class to every segment: the segment's score times :func:`class_probabilities`.

    Segments are (B, M, 2) in snippets, scores (B, M); 0 stands for padding.
    """
    scores = scores.unsqueeze(2) * class_probabilities(outputs, segments, options)  # B × M × K
    K, pairs = scores.shape[2], scores.flatten(1)  # B × M·K
    best, index = pairs.topk(min(options.max_proposals, pairs.shape[1]), dim=1)
    return Proposals(_rows(segments, index // K), best, index % K, outputs.num_snippets)


def class_probabilities(outputs: Outputs, segments: Tensor, options: DetectionConfig) -> Tensor:
    """The probability (B, M or 1, K) of each class in segments (B, M, 2) in snippets.

    It is that of the features pooled over the segment (``classify_by=proposals``), the mean over its snippets
    (``snippets``), each times the video-level score if that is on, or the video-level score alone (``video``).
    ``calibrated`` [ours] is the softmax over the classes of the weighted sum of both :func:`similarities`.
    """
    classes, video = None, video_scores(outputs, options)  # B × M × K, B × K
    if options.classify_by == "snippets":
        inside = inside_segments(segments, outputs.num_snippets).float()  # B × M × T
        classes = inside @ class_scores(outputs, options).transpose(1, 2) / inside.sum(2, keepdim=True)
    elif options.classify_by != "video":
        if options.classify_by == "calibrated":
            assert outputs.class_weights is not None
            logits = options.confidence * (similarities(outputs, segments) @ outputs.class_weights)
        else:
            assert outputs.language is not None
            cosine = classify_pooled(_pool(outputs, segments), outputs.language, outputs.temperature)  # B × M × K+1
            logits = cosine[..., :-1] - cosine[..., -1:]
        if outputs.true_classes is not None:
            logits = logits.masked_fill(~outputs.true_classes.unsqueeze(1), -torch.inf)
        one_class = options.classify_by == "calibrated" or not outputs.multi_label
        classes = logits.softmax(2) if one_class else logits.sigmoid()
    if video is not None:
        classes = video.unsqueeze(1) if classes is None else classes * video.unsqueeze(1)
    assert classes is not None  # as the configuration is checked for
    return classes


def similarities(outputs: Outputs, segments: Tensor) -> Tensor:
    """Cosines (B, M, K, 2) of each class, not adapted, with the video and with M segments (B, M, 2) in snippets."""
    assert outputs.video_cosine is not None and outputs.text is not None
    text = outputs.text.expand(len(segments), -1, -1)
    inside = classify_pooled(_pool(outputs, segments), text, temperature=1.0)
    return torch.stack([outputs.video_cosine.unsqueeze(1).expand_as(inside), inside], 3)


def _pool(outputs: Outputs, segments: Tensor) -> Tensor:
    """Sums (B, M, C) of the classified features inside each segment (B, M, 2); a cosine needs no mean."""
    assert outputs.classifier_features is not None
    sums = _running_sums(outputs.classifier_features.mT).mT  # B × T+1 × C
    first, last = covered_snippets(segments, outputs.num_snippets)
    video = torch.arange(len(sums), device=sums.device).unsqueeze(1)
    return (sums[video, last] - sums[video, first]).float()


def _running_sums(values: Tensor) -> Tensor:
    """(..., T) → (..., T+1) in double precision: the sums of what comes before each snippet, and of everything."""
    return F.pad(values.cpu().double().cumsum(-1), (1, 0)).to(values.device)  # on a GPU it is not deterministic


def _rows(segments: Tensor, index: Tensor) -> Tensor:
    """The segments (B, N, 2) at ``index`` (B, N) of ``segments`` (B, M, 2)."""
    return segments.gather(1, index.unsqueeze(2).expand(-1, -1, 2))


# Connected regions, of all masks at once


def _find_regions(masks: Tensor, thresholds: Sequence[float], fill_holes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row, first snippet, and snippet after the last, (R,) each, of the regions of ``masks > threshold`` (rows, T)."""
    length = masks.shape[1] + 2
    # No region continues in the next row; numpy compares eight times and searches four times faster than torch.
    padded, found = F.pad(masks, (1, 1), value=-torch.inf).flatten().cpu().numpy(), []
    for threshold in thresholds:
        above = padded > threshold
        crossings = torch.from_numpy(np.flatnonzero(above[1:] != above[:-1]))
        regions = crossings.view(-1, 2)  # up and down alternate
        if fill_holes:
            row = regions[:, 0] // length
            first = row.diff(prepend=row.new_full((1,), -1)) > 0
            regions = torch.stack([regions[first, 0], regions[first.roll(-1), 1]], 1)  # the last before the next row's
        found.append(regions)
    begin, end = torch.cat(found).to(masks.device).unbind(1)
    row = begin // length
    return row, begin - row * length, end - row * length


def _max(values: Tensor, row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Maxima (R,) of ``values[row, start:end]``."""
    edges = row * values.shape[1] + torch.stack([start, end])  # 2 × R, in the list of all values
    padded = F.pad(values.flatten(), (0, 1)).cpu().numpy()  # the last region may end at the end of the list
    return torch.from_numpy(np.maximum.reduceat(padded, edges.T.flatten().cpu().numpy())[::2]).to(values.device)


def _contrast(values: Tensor, row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Means (R,) of ``values[row, start:end]`` minus those of the surroundings, 0 where there are none."""
    T, length = values.shape[1], end - start
    sums, reach = _running_sums(values), (length // 4).clamp(min=1)
    first, last = (start - reach).clamp(min=0), (end + reach).clamp(max=T)
    inner = sums[row, end] - sums[row, start]
    outer, around = sums[row, last] - sums[row, first] - inner, last - first - length
    return (inner / length - outer / around.clamp(min=1)).to(values.dtype)


def _best_of_equals(regions: Tensor, score: Tensor, shape: tuple[int, int, int], limit: int) -> Proposals:
    """Keep the best of equal regions (R, 4): video, class, start, end; at most ``limit`` a video; ``shape`` B, K, T."""
    (B, K, T), (video, label, start, end) = shape, regions.unbind(1)
    key = ((video * K + label) * (T + 1) + start) * (T + 1) + end
    # Equal keys in any order; numpy sorts five times faster than torch.
    order = torch.from_numpy(np.argsort(key.cpu().numpy())).to(key.device)
    new = key[order].diff(prepend=key.new_full((1,), -1)) > 0
    regions, video = regions[order[new]], video[order[new]]  # by rising video
    score = score.new_zeros(len(video)).scatter_reduce(0, new.cumsum(0) - 1, score[order], "amax")

    count = torch.bincount(video, minlength=B)
    first = count.cumsum(0) - count  # B, of each video in the list
    table = score.new_zeros(B, max(1, int(count.max())))
    table[video, torch.arange(len(video), device=video.device) - first[video]] = score
    scores, ranks = table.sort(dim=1, descending=True, stable=True)
    scores, index = scores[:, :limit], first.unsqueeze(1) + ranks[:, :limit]  # B × M
    index = torch.where(scores > 0, index, len(video))  # padding takes the row of zeros at the end
    padded = F.pad(regions, (0, 0, 0, 1))[index]  # B × M × 4
    return Proposals(padded[..., 2:].to(score.dtype), scores, padded[..., 1], T)
