"""Videos as batches: features rescaled to T snippets, and segment lists (dense targets are made on the device).

B videos, T snippets, D feature width, N instances of the video that has most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from stale import distributed
from stale.data.annotations import Video
from stale.data.features import FeatureStore
from stale.segments import seconds_to_snippets

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


class VideoDataset:
    """Features and instances of a list of videos, in memory.

    Attributes:
        videos: the annotated videos, in order; a label outside ``classes`` is empty, and its segment ``IGNORED``.
        features: (videos, T, D), float16 if all are stored so, else float32.
        segments, labels: as in :class:`Batch`, for all videos.
    """

    def __init__(self, videos: Sequence[Video], store: FeatureStore, classes: Sequence[str], num_snippets: int) -> None:
        self.videos = []
        for video in videos:
            instances = (item if item.label in classes else replace(item, label="") for item in video.instances)
            self.videos.append(replace(video, instances=tuple(instances)))
        self.features = load_features([video.id for video in videos], store, num_snippets)
        self.segments, self.labels = segment_lists(videos, classes, num_snippets)

    def __len__(self) -> int:
        return len(self.videos)

    def to(self, device: torch.device) -> VideoDataset:
        """Move everything to ``device`` once, so that no batch has to be copied there."""
        self.features, self.segments = self.features.to(device), self.segments.to(device)
        self.labels = self.labels.to(device)
        return self

    def batch(self, indices: Tensor) -> Batch:
        """The videos at ``indices`` (B), on the data's device."""
        return Batch(self.features[indices].float(), self.segments[indices], self.labels[indices])


def load_features(ids: Sequence[str], store: FeatureStore, num_snippets: int) -> Tensor:
    """Load the features of ``ids``, rescaled to (videos, T, D); float16 if all are stored so, else float32."""
    block: Tensor | None = None
    quiet = len(ids) < 50 or not distributed.is_main_process()
    for row, video_id in enumerate(tqdm(ids, "features", unit="video", leave=False, disable=quiet)):
        parts = store.read_parts(video_id)
        dtype = torch.float16 if all(part.dtype == np.float16 for part in parts) else torch.float32
        if block is None:
            block = torch.empty(len(ids), num_snippets, store.width, dtype=dtype)
        elif dtype is torch.float32:
            block = block.float()  # a store of both precisions: nothing may be rounded, nothing overflow
        block[row] = torch.cat([rescale(torch.from_numpy(part), num_snippets) for part in parts], 1)
    return torch.empty(0, num_snippets, store.width) if block is None else block


def rescale(features: Tensor, num_snippets: int) -> Tensor:
    """Linear rescaling along time, (snippets, D) → (T, D) float32, with align_corners=False [P, C]."""
    if len(features) == num_snippets:
        return features.float()
    return F.interpolate(features.float().T[None], num_snippets, mode="linear", align_corners=False)[0].T


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
    """Which snippets each segment covers, at least one: (B, N, 2) in snippet units → (B, N, T) bool.

    A snippet belongs to a segment that contains its centre; a shorter segment covers the snippet at its middle.
    """
    position = torch.arange(num_snippets, device=segments.device)
    start, end = segments[..., :1], segments[..., 1:]
    middle = ((start + end) / 2).floor().clamp(0, num_snippets - 1)
    covered = (position + 0.5 >= start) & (position + 0.5 < end)
    return covered | ((position == middle) & ~covered.any(2, keepdim=True))


def read_ahead(load: Callable[[T], R], items: Iterable[T], depth: int = 1) -> Generator[tuple[T, R], None, None]:
    """Yield ``(item, load(item))`` in order, always loading ``depth`` items ahead in a background thread.

    ``items`` is advanced in the thread as well, so that a generator that decodes as it goes can be handed over with
    an identity for ``load``. Loading starts with the call. An error of ``load`` or ``items`` is raised at its item.
    When the consumer stops early, the thread ends and ``items`` is closed.
    """
    source = iter(items)
    end: Any = object()

    def advance() -> tuple[Any, Any]:
        item = next(source, end)
        return item, None if item is end else load(item)

    pool = ThreadPoolExecutor(max_workers=1)
    coming = deque(pool.submit(advance) for _ in range(depth))

    def results() -> Generator[tuple[T, R], None, None]:
        try:
            while True:
                item, result = coming.popleft().result()
                if item is end:
                    return
                coming.append(pool.submit(advance))
                yield item, result
                del item, result  # otherwise they would stay in memory while the item after the next is loaded
        finally:
            pool.shutdown(cancel_futures=True)
            if hasattr(source, "close"):
                source.close()

    return results()
