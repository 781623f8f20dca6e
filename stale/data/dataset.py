"""Videos as batches: features rescaled to T snippets, and segment lists (dense targets are made on the device).

With ``data.sampling=native`` videos keep their own number of snippets, and T is that of a batch's longest.

B videos, T snippets, D feature width, N instances of the video that has most.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stale import distributed
from stale.config import DataConfig
from stale.data.annotations import Video
from stale.data.features import FeatureStore
from stale.progress import progress_bar
from stale.segments import seconds_to_snippets

# Of several videos: rescaled (B, T, D), or at their own rate (snippets, D) of each.
Features = Tensor | Sequence[Tensor]

T = TypeVar("T")
R = TypeVar("R")

IGNORED = -1  # a segment of a class outside the vocabulary: neither background nor foreground
PADDING = -2  # no segment at all


@dataclass(frozen=True)
class Batch:
    """One batch on one device."""

    features: Tensor  # (B, T, D) float32
    segments: Tensor  # (B, N, 2) start and end in snippet units
    labels: Tensor  # (B, N) class index in the vocabulary, IGNORED or PADDING
    valid: Tensor | None = None  # (B, T) bool, False for snippets after the end of their video; None: all are valid


class VideoDataset:
    """Features and instances of a list of videos, in memory.

    Attributes:
        videos: the annotated videos, in order; a label outside ``classes`` is empty, and its segment ``IGNORED``.
        features: (videos, T, D), float16 if all are stored so, else float32.
        lengths: snippets of each video; segments, labels: as in :class:`Batch`, for all videos.
    """

    def __init__(self, videos: Sequence[Video], store: FeatureStore, classes: Sequence[str], data: DataConfig) -> None:
        self.videos = relabel(videos, classes)
        self.features = load_sampled(videos, store, data, None if data.sampling == "native" else data.num_snippets)
        self.lengths = torch.tensor([len(item) for item in self.features])
        self.segments, self.labels = segment_lists(videos, classes, self.lengths.tolist())

    def __len__(self) -> int:
        return len(self.videos)

    def to(self, device: torch.device) -> "VideoDataset":
        """Move everything to ``device`` once, so that no batch has to be copied there."""
        self.features = move(self.features, device)
        self.segments, self.labels = self.segments.to(device), self.labels.to(device)
        return self

    def batches(self, size: int, generator: torch.Generator) -> Sequence[Tensor]:
        """The indices of an epoch's batches of ``size`` videos, in random order."""
        return torch.randperm(len(self), generator=generator).to(self.labels.device).split(size)

    def batch(self, indices: Tensor) -> Batch:
        """The videos at ``indices`` (B), on the data's device."""
        assert isinstance(self.features, Tensor)
        return Batch(self.features[indices].float(), self.segments[indices], self.labels[indices])


class NativeDataset(VideoDataset):
    """Videos with a number of snippets of their own; ``features`` is a list with (snippets, D) of each.

    A batch holds videos of similar length, padded with zeros. In training a video longer than ``max_snippets`` is
    cropped at random, anew in each epoch. An instance of which less than half is left in the crop is ``IGNORED``, and
    one outside the crop is no instance of it.
    """

    def __init__(self, videos: Sequence[Video], store: FeatureStore, classes: Sequence[str], data: DataConfig) -> None:
        super().__init__(videos, store, classes, data)
        self.max_snippets = data.max_snippets
        self._crops = torch.zeros(len(videos), dtype=torch.long)  # the first snippet of each video's crop

    def batches(self, size: int, generator: torch.Generator) -> Sequence[Tensor]:
        """The indices of an epoch's batches, of similar length, and new crops."""
        order = torch.randperm(len(self), generator=generator)
        spare = (self.lengths - self.max_snippets).clamp(min=0)
        self._crops = (torch.rand(len(self), generator=generator) * (spare + 1)).long()
        batches: list[Tensor] = []
        for group in order.split(8 * size):
            batches += group[self.lengths[group].argsort(stable=True)].split(size)
        return [batches[number] for number in torch.randperm(len(batches), generator=generator)]

    def batch(self, indices: Tensor) -> Batch:
        """The videos at ``indices`` (B), cropped and padded to the longest (B, T, D)."""
        first = self._crops[indices.cpu()]
        crops = [
            self.features[video][start : start + self.max_snippets].float()
            for video, start in zip(indices.tolist(), first.tolist(), strict=True)
        ]
        features, valid = pad(crops)
        segments, labels = self.segments[indices], self.labels[indices]
        shifted = segments - first.view(-1, 1, 1).to(segments.device)
        cropped = shifted.clamp(min=0).minimum(valid.sum(1).view(-1, 1, 1))
        lost = (cropped - shifted).diff().squeeze(2) < -0.5 * segments.diff().squeeze(2)  # over half of the length
        labels = labels.masked_fill(lost & (labels != PADDING), IGNORED)
        outside = lost & (cropped.diff().squeeze(2) <= 0)
        return Batch(features, cropped, labels.masked_fill(outside, PADDING), valid)


def relabel(videos: Sequence[Video], classes: Sequence[str]) -> list[Video]:
    """The videos with empty labels of the instances of other classes."""
    relabeled = []
    for video in videos:
        instances = (item if item.label in classes else replace(item, label="") for item in video.instances)
        relabeled.append(replace(video, instances=tuple(instances)))
    return relabeled


def pad(videos: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack (snippets, ...) of different lengths: (B, T, ...), zero after a video's end, and which are valid (B, T)."""
    length = torch.tensor([len(item) for item in videos], device=videos[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(videos), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=length.device) < length.unsqueeze(1)


def move(features: Features, device: torch.device) -> Features:
    """``features`` on ``device``."""
    return features.to(device) if isinstance(features, Tensor) else [item.to(device) for item in features]


def load_features(ids: Sequence[str], store: FeatureStore, num_snippets: int) -> Tensor:
    """Load the features of ``ids``, rescaled to (videos, T, D); float16 if all are stored so, else float32."""
    block: Tensor | None = None
    quiet = len(ids) < 50 or not distributed.is_main_process()
    for row, video_id in enumerate(progress_bar(ids, "features", unit="video", leave=False, disable=quiet)):
        parts = store.read_parts(video_id)
        dtype = torch.float16 if all(part.dtype == np.float16 for part in parts) else torch.float32
        if block is None:
            block = torch.empty(len(ids), num_snippets, store.width, dtype=dtype)
        elif dtype is torch.float32:
            block = block.float()  # a store of both precisions: nothing may be rounded, nothing overflow
        block[row] = torch.cat([rescale(torch.from_numpy(part), num_snippets) for part in parts], 1)
    return torch.empty(0, num_snippets, store.width) if block is None else block


def load_sampled(videos: Sequence[Video], store: FeatureStore, data: DataConfig, num_snippets: int | None) -> Features:
    """Load the features of ``videos``, rescaled to ``num_snippets``; with None (snippets, D) of each, at ``data.rate``.

    Where several sources stand side by side, all take the number of snippets of the one that has most.
    """
    if num_snippets is not None:
        return load_features([video.id for video in videos], store, num_snippets)
    loaded = []
    for video in videos:
        parts = [torch.from_numpy(part) for part in store.read_parts(video.id)]
        count = native_length(max(map(len, parts)), video.duration, data.rate)
        loaded.append(torch.cat([part if len(part) == count else rescale(part, count) for part in parts], 1))
    return loaded


def native_length(length: int, duration: float, rate: float | None) -> int:
    """Number of snippets of a video of ``duration`` seconds at ``rate``, or its own ``length`` without any."""
    return length if rate is None else max(round(rate * duration), 1)


def rescale(features: Tensor, num_snippets: int) -> Tensor:
    """Linear rescaling along time, (snippets, D) → (T, D) float32, with align_corners=False [P, C]."""
    if len(features) == num_snippets:
        return features.float()
    return F.interpolate(features.float().T[None], num_snippets, mode="linear", align_corners=False)[0].T


def segment_lists(
    videos: Sequence[Video], classes: Sequence[str], num_snippets: int | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Instances as padded lists: segments (videos, N, 2) in snippet units and labels (videos, N).

    ``num_snippets`` is that of all videos or of each. A label outside ``classes`` becomes IGNORED here, and nothing
    after this point can tell which it was.
    """
    index = {label: number for number, label in enumerate(classes)}
    longest = max((len(video.instances) for video in videos), default=0)
    segments = torch.zeros(len(videos), max(longest, 1), 2)
    labels = torch.full(segments.shape[:2], PADDING)
    counts = [num_snippets] * len(videos) if isinstance(num_snippets, int) else num_snippets
    for row, (video, count) in enumerate(zip(videos, counts, strict=True)):
        for column, instance in enumerate(video.instances):
            span = torch.tensor([instance.start, instance.end])
            segments[row, column] = seconds_to_snippets(span, video.duration, count)
            labels[row, column] = index.get(instance.label, IGNORED)
    return segments, labels


def covered_snippets(segments: Tensor, num_snippets: int) -> tuple[Tensor, Tensor]:
    """First snippet of each segment (B, N, 2) in snippet units, and the one after its last, (B, N) each.

    A snippet belongs to a segment that contains its center; a shorter segment covers the snippet at its middle.
    """
    first, last = (segments - 0.5).ceil().clamp(0, num_snippets).long().unbind(2)
    middle = segments.mean(2).floor().clamp(0, num_snippets - 1).long()
    return torch.where(first < last, first, middle), torch.where(first < last, last, middle + 1)


def inside_segments(segments: Tensor, num_snippets: int) -> Tensor:
    """Which :func:`covered_snippets` each segment has: (B, N, 2) in snippet units → (B, N, T) bool."""
    first, last = (edge.unsqueeze(2) for edge in covered_snippets(segments, num_snippets))
    position = torch.arange(num_snippets, device=segments.device)
    return (first <= position) & (position < last)


def read_ahead(load: Callable[[T], R], items: Iterable[T], depth: int = 1) -> Generator[tuple[T, R], None, None]:
    """Yield ``(item, load(item))`` in order, always loading ``depth`` items ahead in a background thread.

    ``items`` is advanced in the thread as well, so that a generator that decodes as it goes can be handed over with
    an identity for ``load``. Loading starts with the call. An error of ``load`` or ``items`` is raised at its item.
    When the consumer stops early, the thread ends and ``items`` is closed.
    """
    source, pool = iter(items), ThreadPoolExecutor(max_workers=1)

    def advance() -> tuple[T, R] | None:
        for item in source:
            return item, load(item)
        return None

    coming = deque(pool.submit(advance) for _ in range(depth))

    def results() -> Generator[tuple[T, R], None, None]:
        try:
            while (found := coming.popleft().result()) is not None:
                coming.append(pool.submit(advance))
                yield found
                del found  # otherwise it would stay in memory while the item after the next is loaded
        finally:
            pool.shutdown(cancel_futures=True)
            if hasattr(source, "close"):
                source.close()

    return results()
