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

from stale import parallel
from stale.data.annotations import Instance, Video
from stale.data.features import FeatureStore, MappedRows
from stale.errors import StaleError, name_some
from stale.memory import free_memory
from stale.segments import seconds_to_snippets

IGNORED = -1  # a segment of a class outside the vocabulary: neither background nor foreground
PADDING = -2  # no segment at all

FAR_SECONDS, FAR_SHARE = 3.0, 0.1  # features may last so much longer or shorter than the annotated duration

_CPU = torch.device("cpu")

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
    """Features and instances of a list of videos: in memory, or the features in their file.

    Attributes:
        videos: the annotated videos, in order; labels outside the vocabulary are empty.
        features: (videos, T, D), in the stored precision.
        segments, labels: as in :class:`Batch`, for all videos.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        store: FeatureStore,
        classes: Sequence[str],
        num_snippets: int,
        resident: str = "always",
        device: torch.device = _CPU,
    ) -> None:
        """Read and rescale the features of ``videos``, or prepare to read a batch at a time.

        Args:
            classes: the vocabulary; a label outside it leaves only an anonymous ``IGNORED`` segment behind.
            resident: see :func:`place_features`.
            device: where they will be trained on.
        """
        self.videos = anonymise(videos, classes)
        self.num_snippets = num_snippets
        self.features = place_features([video.id for video in videos], store, num_snippets, resident, device)
        self.segments, self.labels = segment_lists(videos, classes, num_snippets)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def index_device(self) -> torch.device:
        """Where :meth:`batch` is best given its indices: a GPU's would have to be waited for to read from a file."""
        return _CPU if isinstance(self.features, MappedFeatures) else self.features.device

    def to(self, device: torch.device) -> VideoDataset:
        """Move everything to ``device`` once, so that no batch has to travel, save features that stay in their file."""
        self.features, self.segments, self.labels = (
            tensor.to(device) for tensor in (self.features, self.segments, self.labels)
        )
        return self

    def batch(self, indices: Tensor) -> Batch:
        """The videos at ``indices`` (B), on the data's device."""
        return Batch(self.features[indices].float(), self.segments[indices], self.labels[indices])


class MappedFeatures:
    """Features that stay in their file, in the place of a tensor (videos, T, D) that is only indexed.

    Attributes:
        shape, dtype: as the tensor's.
    """

    def __init__(self, rows: MappedRows) -> None:
        self._rows, self._device = rows, _CPU
        self.shape, self.dtype = torch.Size(rows.shape), torch.from_numpy(np.empty(0, rows.dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device) -> MappedFeatures:
        """Have what is read from now on brought to ``device``."""
        self._device = device
        return self

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The videos at ``index``, read now: (B, T, D).

        Raises:
            StaleError: NaN or infinite values, named with their video.
        """
        places = np.arange(len(self))[index if isinstance(index, slice) else index.cpu().numpy()]
        on_gpu = self._device.type == "cuda"
        block = torch.empty(len(places), *self.shape[1:], dtype=self.dtype, pin_memory=on_gpu)
        self._rows.read(places, block.numpy())
        return block.to(self._device, non_blocking=on_gpu)


def place_features(
    ids: Sequence[str], store: FeatureStore, num_snippets: int, resident: str, device: torch.device
) -> Tensor | MappedFeatures:
    """Features of ``ids`` (videos, T, D) in memory, or in their file where they are packed to T snippets.

    Values are the same to the bit. In memory all are looked at for NaN now, in their file each when it is read.

    Args:
        resident: ``always`` in memory; ``never``; ``auto``: in memory where that takes at most half of what is free, on
            this machine and on ``device``, or where they are not packed to T snippets.

    Raises:
        StaleError: ``never``, and they are not packed to T snippets; or unusable features.
    """
    rows = None if resident == "always" else store.map_rows(ids, num_snippets)
    if rows is None:
        if resident == "never":
            raise StaleError(
                f"data.resident is never, but {store.path} does not hold {num_snippets} snippets of every video, "
                f"unpacked: make such a file by scripts/pack_features.py --snippets {num_snippets}, or use "
                "data.resident=auto"
            )
        return load_features(ids, store, num_snippets)
    amounts = [free for place in {_CPU, device} if (free := free_memory(place)) is not None]
    free = min(amounts) / parallel.size() if amounts else None  # each process keeps features of its own
    keep = resident == "auto" and (free is None or rows.nbytes <= free / 2)
    _log.info(
        "features of %d videos, %.2f GB: %s (data.resident=%s, %s)",
        len(ids),
        rows.nbytes / 1e9,
        "in memory" if keep else "read from their file batch by batch",
        resident,
        "free memory unknown" if free is None else f"{free / 1e9:.2f} GB of memory free",
    )
    return load_features(ids, store, num_snippets) if keep else MappedFeatures(rows)


def load_features(ids: Sequence[str], store: FeatureStore, num_snippets: int) -> Tensor:
    """Features of ``ids`` rescaled to (videos, T, D); half precision where all are stored in half."""
    rows = store.map_rows(ids, num_snippets)
    return _rescale_all(ids, store, num_snippets) if rows is None else MappedFeatures(rows)[:]


def _rescale_all(ids: Sequence[str], store: FeatureStore, num_snippets: int) -> Tensor:
    block: Tensor | None = None
    quiet = len(ids) < 50 or not parallel.is_first()
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


def with_features(videos: Sequence[Video], store: FeatureStore, missing: str, misfit: str = "stop") -> list[Video]:
    """The videos whose features exist and, as far as they tell, last as long as the video.

    Args:
        missing: ``stop`` raises when any is missing; ``skip`` goes on without them and logs how many.
        misfit: ``stop`` or ``skip`` in the same way, for features far longer or shorter than the annotated duration;
            ``keep`` does not ask.

    Raises:
        StaleError: what is to stop happened, or no video is left.
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
    return found if misfit == "keep" else _fitting(found, store, misfit)


def _fitting(videos: Sequence[Video], store: FeatureStore, misfit: str) -> list[Video]:
    """The videos whose features last as long as they do, or do not tell."""
    wrong = {video.id: fault for video in videos if (fault := _length_fault(video, store))}
    if not wrong:
        return list(videos)
    what = f"{len(wrong)} of {len(videos)} videos have features far longer or shorter than the annotated duration"
    if misfit == "stop":
        raise StaleError(
            f"{what}: {name_some(wrong.values())}; extract them again or correct the annotations, or go on without "
            "them by data.misfit=skip"
        )
    _log.warning("skipped: %s: %s", what, name_some(wrong.values()))
    left = [video for video in videos if video.id not in wrong]
    if not left:
        raise StaleError(f"{what}: {name_some(wrong.values())}; none is left")
    return left


def _length_fault(video: Video, store: FeatureStore) -> str:
    """What is wrong with the length of a video's features; "" where nothing is, or it is not known."""
    extents = ((source, extent) for source in store.sources for extent in source.extents(video.id))
    far = (
        f"{video.id} in {source.path} ({extent:.1f} s, annotated {video.duration:.1f} s)"
        for source, extent in extents
        if is_far(extent, video.duration)
    )
    return next(far, "")


def is_far(extent: float, duration: float) -> bool:
    """Whether features that last ``extent`` seconds cannot be those of a video that lasts ``duration`` seconds.

    A few snippets that a window at the end takes, another container or a rounded rate make up to some seconds: of 412
    features of THUMOS14 at two a second the farthest is off by 0.35 s, and by 1.5 %.
    """
    return abs(extent - duration) > max(FAR_SECONDS, FAR_SHARE * duration)
