"""Videos as batches: features rescaled to T snippets, and segment lists (never dense targets).

B videos, T snippets, D feature width, N instances of the video that has most.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from stale.data.annotations import Instance, Video
from stale.data.features import FeatureStore
from stale.errors import StaleError, name_some
from stale.segments import seconds_to_snippets

IGNORED = -1  # a segment of a class outside the vocabulary: neither background nor foreground
PADDING = -2  # no segment at all

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One batch on one device.

    Attributes:
        features: (B, T, D) float32.
        segments: (B, N, 2) start and end in snippet units.
        labels: (B, N) class index in the vocabulary, IGNORED or PADDING.
    """

    features: Tensor
    segments: Tensor
    labels: Tensor


class VideoDataset:
    """Features and instances of a list of videos, resident in memory.

    Attributes:
        videos: the annotated videos, in order; labels outside the vocabulary are empty.
        features: (videos, T, D), in the stored precision.
        segments, labels: as in :class:`Batch`, for all videos.
    """

    def __init__(self, videos: Sequence[Video], store: FeatureStore, classes: Sequence[str], num_snippets: int) -> None:
        """Read and rescale the features of ``videos``.

        Args:
            classes: the vocabulary; a label outside it leaves only an anonymous ``IGNORED`` segment behind.
        """
        self.videos = anonymise(videos, classes)
        self.num_snippets = num_snippets
        self.features = load_features([video.id for video in videos], store, num_snippets)
        self.segments, self.labels = segment_lists(videos, classes, num_snippets)

    def __len__(self) -> int:
        return len(self.videos)

    def to(self, device: torch.device) -> VideoDataset:
        """Move everything to ``device`` once, so that no batch has to travel."""
        self.features, self.segments, self.labels = (
            tensor.to(device) for tensor in (self.features, self.segments, self.labels)
        )
        return self

    def batch(self, indices: Tensor) -> Batch:
        """The videos at ``indices`` (B,), which lie on the data's device."""
        return Batch(self.features[indices].float(), self.segments[indices], self.labels[indices])


def load_features(ids: Sequence[str], store: FeatureStore, num_snippets: int) -> Tensor:
    """Features of ``ids`` rescaled to (videos, T, D); half precision where all are stored in half."""
    block: Tensor | None = None
    for row, video_id in enumerate(tqdm(ids, "features", unit="video", leave=False, disable=len(ids) < 50)):
        parts = store.read_parts(video_id)
        dtype = torch.float16 if all(part.dtype == np.float16 for part in parts) else torch.float32
        if block is None:
            block = torch.empty(len(ids), num_snippets, store.width, dtype=dtype)
        elif dtype is torch.float32:
            block = block.float()  # a store of both precisions: nothing may be rounded, nothing overflow
        block[row] = torch.cat([rescale(torch.from_numpy(part), num_snippets) for part in parts], 1)
    return torch.empty(0, num_snippets, store.width) if block is None else block


def rescale(features: Tensor, num_snippets: int) -> Tensor:
    """Linear rescaling along time, (snippets, D) → (T, D) float32, align_corners false (paper, released code)."""
    columns = features.float().T[None]
    return F.interpolate(columns, num_snippets, mode="linear", align_corners=False)[0].T


def segment_lists(videos: Sequence[Video], classes: Sequence[str], num_snippets: int) -> tuple[Tensor, Tensor]:
    """Instances as padded lists: segments (videos, N, 2) in snippet units and labels (videos, N).

    A label outside ``classes`` becomes IGNORED here, and nothing after this point can tell which it was.
    """
    index = {label: number for number, label in enumerate(classes)}
    longest = max((len(video.instances) for video in videos), default=0)
    segments = torch.zeros(len(videos), max(longest, 1), 2)
    labels = torch.full(segments.shape[:2], PADDING)
    for row, video in enumerate(videos):
        for column, instance in enumerate(video.instances):
            span = torch.tensor([instance.start, instance.end])
            segments[row, column] = seconds_to_snippets(span, video.duration, num_snippets)
            labels[row, column] = index.get(instance.label, IGNORED)
    return segments, labels


def inside_segments(segments: Tensor, num_snippets: int) -> Tensor:
    """Segments (B, N, 2) in snippets → (B, N, T): which snippets each covers, at least one.

    A snippet belongs to a segment that contains its centre; a segment too short for that keeps the snippet at its
    middle.
    """
    place = torch.arange(num_snippets, device=segments.device)
    start, end = segments[..., :1], segments[..., 1:]
    middle = ((start + end) / 2).floor().clamp(0, num_snippets - 1)
    covered = (place + 0.5 >= start) & (place + 0.5 < end)
    return covered | ((place == middle) & ~covered.any(2, keepdim=True))


def reduce_instances(
    videos: Sequence[Video], classes: Sequence[str], num_snippets: int, last: bool, shrink: float, drop_shorter: float
) -> list[Video]:
    """Training videos as the released code saw them, by three switches; instances beyond ``classes`` stay.

    Args:
        last: keep of each video's instances the last of the file alone.
        shrink: snippets taken off on each side; an instance of which nothing is left is dropped.
        drop_shorter: snippets; an instance that is then shorter is dropped.

    Returns:
        The videos with an instance of ``classes`` left.
    """
    wanted = set(classes)

    def reduced(video: Video) -> Video:
        snippet = video.duration / num_snippets
        known = [item for item in video.instances if item.label in wanted][-1 if last else 0 :]
        others = [item for item in video.instances if item.label not in wanted]
        smaller = [
            replace(item, start=item.start + shrink * snippet, end=item.end - shrink * snippet) for item in known
        ]
        kept = [item for item in smaller if item.end - item.start > max(drop_shorter * snippet - 1e-9, 0)]
        return replace(video, instances=(*kept, *others))

    return with_any_of([reduced(video) for video in videos], classes)


def with_any_of(videos: Sequence[Video], classes: Sequence[str]) -> list[Video]:
    """The videos with at least one instance of ``classes``."""
    wanted = set(classes)
    return [video for video in videos if any(instance.label in wanted for instance in video.instances)]


def anonymise(videos: Sequence[Video], classes: Sequence[str]) -> list[Video]:
    """The videos with every label outside ``classes`` made empty; its segment stays."""
    wanted = set(classes)

    def without_name(instance: Instance) -> Instance:
        return instance if instance.label in wanted else replace(instance, label="")

    return [replace(video, instances=tuple(map(without_name, video.instances))) for video in videos]


def hold_out(
    videos: Sequence[Video], classes: Sequence[str], share: float, seed: int
) -> tuple[list[Video], list[Video]]:
    """Split training videos into (kept, held out), seeded, spread evenly over ``classes``.

    Videos are shuffled, then ordered by their first instance of ``classes``; every (1 / share)-th is held out,
    save where a class would lose its last video.
    """
    rng = np.random.default_rng(seed)
    wanted = set(classes)

    def labels(video: Video) -> list[str]:
        return [instance.label for instance in video.instances if instance.label in wanted]

    shuffled = [videos[i] for i in rng.permutation(len(videos))]
    ordered = sorted(shuffled, key=lambda video: next(iter(labels(video)), ""))
    count = round(share * len(videos))
    positions = (np.arange(count) + rng.random()) * len(videos) / max(count, 1)
    left = Counter(label for video in videos for label in set(labels(video)))  # videos of each class to train on
    chosen: set[int] = set()
    for position in positions.astype(int).tolist():
        its_labels = set(labels(ordered[position]))
        if all(left[label] > 1 for label in its_labels):
            left.subtract(its_labels)
            chosen.add(position)
    kept = [video for position, video in enumerate(ordered) if position not in chosen]
    return kept, [ordered[position] for position in sorted(chosen)]


def with_features(videos: Sequence[Video], store: FeatureStore, missing: str) -> list[Video]:
    """The videos whose features exist.

    Args:
        missing: ``stop`` raises when any is missing; ``skip`` goes on without them and logs how many.

    Raises:
        StaleError: features are missing and ``missing`` is ``stop``, or none are left.
    """
    found = [video for video in videos if store.find(video.id) is not None]
    absent = [video.id for video in videos if store.find(video.id) is None]
    if absent and missing == "stop":
        raise StaleError(
            f"{len(absent)} of {len(videos)} videos have no features in {store.path}: {name_some(absent)}; "
            "add them, or go on without them by data.missing=skip"
        )
    if absent:
        _log.warning("%d of %d videos skipped, no features: %s", len(absent), len(videos), name_some(absent))
    if not found:
        raise StaleError(f"none of the {len(videos)} videos has features in {store.path}")
    return found
