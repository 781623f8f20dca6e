"""From features to detections, batch by batch (B videos, T snippets, D feature width, K classes, C joint width)."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from stale import distributed
from stale.config import Config, DetectionConfig
from stale.data.annotations import Video
from stale.data.classes import NamedClass, fill_template, phrase
from stale.data.dataset import Features, load_sampled, move, read_ahead
from stale.data.embeddings import EmbeddingTable
from stale.data.selection import TestData, phrases
from stale.detection.baselines import OPTIONS as BASELINE_OPTIONS
from stale.detection.baselines import baseline_proposals
from stale.detection.decode import Proposals, class_scores, classify_proposals, decode, stack
from stale.detection.oracle import substitute, true_segments, true_targets
from stale.detection.soft_nms import soft_nms, vote
from stale.detection.windows import forward_in_windows
from stale.detection.writers import results_file, table
from stale.device import out_of_memory_hint
from stale.errors import name_some
from stale.io import remove_leftovers
from stale.model.stale import Outputs, Stale, training_free_text
from stale.model.text import FileEmbeddings
from stale.progress import progress_bar
from stale.segments import snippets_to_seconds

VideoResults = dict[str, list[dict[str, Any]]]  # video id → detections by falling score, segments in seconds
Loaded = TypeVar("Loaded")
Found = TypeVar("Found")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassFeatures:
    """A vocabulary: K labels and their text features (K, C), on the model's device."""

    labels: list[str]
    text: Tensor


@dataclass(frozen=True, eq=False)
class VideoDetections(Sequence):
    """One video's detections, and the scores and the mask they come from. A sequence of its detections."""

    video: Video  # with its duration and, if it has any, its ground truth
    classes: list[str]  # the K labels under test
    detections: list[dict[str, Any]]  # {"segment": [start, end] seconds, "label", "score"} by falling score
    class_scores: np.ndarray  # P without the background (K, T)
    foreground: np.ndarray | None  # L (T,); None for a model without a representation mask
    threshold: float  # θ_bin, the threshold of L
    thumbnails: Sequence[tuple[float, np.ndarray]] = ()  # (seconds, image (H, W, 3) uint8), of a decoded video

    def __len__(self) -> int:
        return len(self.detections)

    def __getitem__(self, index: Any) -> Any:
        return self.detections[index]

    def __str__(self) -> str:
        return table(self.video.id, self.detections)

    def curves(self) -> list[dict[str, Any]]:
        """L (label "") and P of the five best detected classes over time, in per cent."""
        best = list(dict.fromkeys(item["label"] for item in self.detections))[:5]
        rows = {label: self.class_scores[self.classes.index(label)] for label in best}
        rows |= {} if self.foreground is None else {"": self.foreground}
        return [{"label": label, "percent": (100 * row).round().astype(int).tolist()} for label, row in rows.items()]


@torch.inference_mode()
def class_features(
    model: Stale,
    classes: Sequence[str | NamedClass],
    templates: Sequence[str] = (),
    table: EmbeddingTable | None = None,
) -> ClassFeatures:
    """Encode a vocabulary once: a class is the mean of its phrases, each of unit length, in every template.

    Args:
        classes: labels of a data set, or classes with phrases of their own.
        templates: texts with ``{}`` for the phrase; default: the model's own prompt.
        table: embeddings in place of the model's own text encoder or table; without ``classes``, all of them.
    """
    model.eval()
    encoder = model.text if table is None else FileEmbeddings.replacing(model.text, table)
    classes = classes or (() if table is None else table.names)
    named = [NamedClass(item, (phrase(item),)) if isinstance(item, str) else item for item in classes]
    texts = [fill_template(item.phrases, templates) if templates else item.phrases for item in named]
    return ClassFeatures([item.label for item in named], encoder.describe(texts, "{}" if templates else None))


def detect(
    model: Stale,
    videos: Sequence[Video],
    features: Features,
    classes: ClassFeatures,
    *,
    options: DetectionConfig,
    progress: bool = True,
) -> VideoResults:
    """Detect ``classes`` in every video by features (videos, T, D) or (snippets, D) of each; rank 0 has the results."""

    def work(part: slice, block: Features) -> list[tuple[str, list[dict[str, Any]]]]:
        found = detect_batch(model, videos[part], block, classes, options=options)
        return [(item.video.id, item.detections) for item in found]

    size = options.batch_size
    found = over_batches(len(videos), lambda part: features[part], work, size=size, progress=progress)
    return {video: detections for results in found for video, detections in results}


def over_batches(
    count: int, load: Callable[[slice], Loaded], work: Callable[[slice, Loaded], Found], *, size: int, progress: bool
) -> Iterator[Found]:
    """Yield on rank 0 the result of each batch of ``size`` videos, loaded ahead and shared by the processes."""
    batches = [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def own() -> Iterator[Found]:
        for part, loaded in read_ahead(load, distributed.shard(batches)):
            with out_of_memory_hint("detection.batch_size", size, "; a run's config.yaml may be changed there"):
                found = work(part, loaded)
            del loaded  # or it would be in memory while the batch after the next is loaded
            yield found

    with progress_bar(total=count, desc="detect", unit="video", leave=False, disable=not progress) as bar:
        for found, part in zip(distributed.gather_in_order(own(), len(batches)), batches, strict=False):
            yield found
            bar.update(part.stop - part.start)


@torch.inference_mode()
def detect_batch(
    model: Stale, videos: Sequence[Video], features: Features, classes: ClassFeatures, *, options: DetectionConfig
) -> list[VideoDetections]:
    """Detect ``classes`` in one batch of videos, features (B, T, D) or (snippets, D) of each, on any device."""
    model.eval()
    # Videos of different lengths are forwarded one by one, so that none is padded.
    groups = [videos] if isinstance(features, Tensor) else [[video] for video in videos]
    blocks = [features] if isinstance(features, Tensor) else [item[None] for item in features]
    scores, masks, found, empty = [], [], [], []
    for part, block in zip(groups, blocks, strict=True):
        outputs, proposals = propose(model, part, block.to(model.background.device).float(), classes, options=options)
        found.append(proposals)
        assert outputs.mask is not None
        empty += [video.id for video, some in zip(part, outputs.mask.any(1).tolist(), strict=True) if not some]
        scores += [*class_scores(outputs, options).cpu().numpy()]
        masks += [None] * len(part) if outputs.foreground is None else [*outputs.foreground.float().cpu().numpy()]
    decided = options.classify_by != "snippets" or options.video_score or options.oracle or len(classes.labels) == 1
    if empty and not decided:  # all classes score the same, and their order decides
        _log.warning("no snippet passes L (model.masking.threshold), and labels mean nothing, in %s", name_some(empty))
    results = to_results(videos, found[0] if len(found) == 1 else stack(found), classes.labels, options)
    return [
        VideoDetections(video, classes.labels, results[video.id], P, L, model.config.masking.threshold)
        for video, P, L in zip(videos, scores, masks, strict=True)
    ]


def predict(
    model: Stale, videos: Sequence[Video], features: Tensor, classes: ClassFeatures, *, options: DetectionConfig
) -> Outputs:
    """A batch's outputs; ground truth is used only for an oracle. Features are (B, T, D)."""
    num_snippets, device = features.shape[1], features.device
    truth = true_targets(videos, classes.labels, num_snippets, device) if model.mask_given or options.oracle else None
    given_mask = None
    if truth is not None and (model.mask_given or "masks" in options.oracle):
        given_mask = truth.foreground.float()
    outputs = forward_in_windows(model, features, classes.text, given_mask)
    if options.video_score or options.classify_by == "calibrated":
        outputs = replace(outputs, video_cosine=model.video_cosine(features, classes.text))
    return outputs if truth is None else substitute(outputs, truth, options.oracle)


def propose(
    model: Stale, videos: Sequence[Video], features: Tensor, classes: ClassFeatures, *, options: DetectionConfig
) -> tuple[Outputs, Proposals]:
    """A batch's :func:`predict` and the proposals."""
    outputs, device = predict(model, videos, features, classes, options=options), features.device
    if "proposals" in options.oracle:
        segments, known = true_segments(videos, classes.labels, features.shape[1])
        return outputs, classify_proposals(outputs, segments.to(device), (known >= 0).to(device).float(), options)
    return outputs, decode(outputs, options)


def to_results(
    videos: Sequence[Video], proposals: Proposals, labels: Sequence[str], options: DetectionConfig
) -> VideoResults:
    """SoftNMS and segment voting over a batch's proposals, then seconds (to the millisecond) and class labels."""
    picked, scores = soft_nms(proposals.segments, proposals.scores, proposals.labels, options)  # B × P
    segments = proposals.segments.gather(1, picked.unsqueeze(2).expand(-1, -1, 2))  # B × P × 2
    if options.voting:
        segments = vote(proposals.segments, proposals.scores, proposals.labels, picked, threshold=options.voting)
    durations = torch.tensor([video.duration for video in videos], dtype=torch.float64).view(-1, 1, 1)
    counts = torch.tensor(proposals.num_snippets).view(-1, 1, 1)
    seconds = snippets_to_seconds(segments.double().cpu(), durations, counts).round(decimals=3).tolist()
    numbers = proposals.labels.gather(1, picked).tolist()
    results: VideoResults = {}
    for video, *rows in zip(videos, seconds, numbers, scores.tolist(), strict=True):
        results[video.id] = [
            {"segment": segment, "label": labels[number], "score": score}
            for segment, number, score in zip(*rows, strict=True)
            if score > 0
        ]
    return results


# A run's test videos


def write_test_detections(
    model: Stale, config: Config, test: TestData, *, files: Mapping[str, Path], protocol: Mapping[str, Any]
) -> None:
    """Write the results ``files`` of ``model`` and training-free baselines, by name, in one pass over the features."""
    options, device = config.detection, model.background.device
    classes = class_features(model, test.classes)
    if files.keys() - {"model", "curves"}:
        text = training_free_text(model, phrases(test.classes)).to(device)
    lengths: dict[str, int | None] = dict.fromkeys(files, config.data.num_snippets)  # None: the videos' own rate
    lengths["model"] = config.tested_snippets
    lengths.pop("curves", None)

    def load(part: slice) -> dict[int | None, Features]:
        videos = test.videos[part]
        return {length: load_sampled(videos, test.store, config.data, length) for length in set(lengths.values())}

    @torch.inference_mode()
    def work(part: slice, features: dict[int | None, Features]) -> dict[str, VideoResults]:
        videos, found = test.videos[part], {}
        features = {length: move(block, device) for length, block in features.items()}
        for name, length in lengths.items():
            block = features[length]
            if name == "model":
                of_model = detect_batch(model, videos, block, classes, options=options)
                found[name] = {item.video.id: item.detections for item in of_model}
                if "curves" in files:
                    found["curves"] = {item.video.id: item.curves() for item in of_model}
            else:
                assert isinstance(block, Tensor)
                block = block[..., : text.shape[1]]  # without the features for the point head alone
                proposals = baseline_proposals(name, block, text)
                found[name] = to_results(videos, proposals, test.classes, BASELINE_OPTIONS[name])
        return found

    no_training = {"checkpoint": "none", "checkpoint_chosen_on": "nothing: training-free", "oracle": "none"}
    writes = distributed.is_main_process()
    with ExitStack() as stack:
        write = {}
        for name, path in files.items() if writes else ():
            remove_leftovers(path)
            made_by = {**protocol, **({} if name in ("model", "curves") else no_training)}
            write[name] = stack.enter_context(results_file(path, protocol=made_by))
        for found in over_batches(len(test.videos), load, work, size=options.batch_size, progress=writes):
            for name, results in found.items():
                write[name](results)
