"""Simulated features over real annotations, to rehearse a run at full size before the real features are there.

A snippet's feature is a sum of vectors whose lengths are the strengths, brought to unit length:

* what all image features share: one direction, apart from the direction that all texts share (the gap between the
  modalities of CLIP's joint space);
* the video's own: another direction for every video;
* its classes: what sets the text embedding of a class apart from the others', at full strength inside its instances and
  weaker outside, for a video about high jump looks like high jump all along;
* confusion: every class is seen in every video a little, some of it all along, some of it now and then;
* noise that drifts, as the confusion does: neighbouring snippets are alike.

So the features have the traits of CLIP's that make detection hard, and none of the content of the videos: results on
them say how long a run takes and whether it is correct, nothing else. Files say of themselves that they are simulated,
by an attribute and by their name. S: snippets of a video, C: width, K: classes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from stale.data.annotations import Video, all_labels, read_annotations
from stale.data.hdf5 import as_ids, new_hdf5
from stale.data.vocabulary import phrase
from stale.errors import StaleError
from stale.preparation.converters import check_ids
from stale.preparation.downloads import sha256_of

MARK = "simulated"  # in the attributes and in the name of every file


@dataclass(frozen=True)
class Strengths:
    """Lengths of the parts of a feature, and how they behave."""

    common: float = 1.0  # what all image features share
    gap: float = 0.9  # 0: that is what all texts share; 1: it is at right angles to it
    video: float = 0.7  # the video's own direction
    inside: float = 0.3  # the class, inside its instances
    outside: float = 0.2  # the class, in the rest of its video
    confusion: float = 0.12  # spread of the similarity to any class; half of the variance is the video's, half drifts
    noise: float = 0.6  # what drifts
    smoothness: float = 2.0  # seconds after which the drift has forgotten all but a third


@dataclass(frozen=True)
class Grid:
    """Where snippets lie: ``count`` of them in every video, or ``rate`` a second."""

    count: int | None = None
    rate: float = 1.0

    def snippets(self, video: Video) -> int:
        """S."""
        return self.count or max(round(video.duration * self.rate), 1)


@dataclass(frozen=True)
class Space:
    """The joint space that the features shall lie in.

    Attributes:
        classes: (K, C) unit directions of the classes, without what all texts share.
        common: (C) unit direction that all image features share.
        index: label → row of ``classes``.
        spread: of the projection on a class of normal random weights of all classes, which resemble each other.
    """

    classes: np.ndarray
    common: np.ndarray
    index: dict[str, int]
    spread: float


def simulate(
    annotations: str | Path,
    text_weights: str | Path,
    output: str | Path,
    grid: Grid = Grid(count=100),
    strengths: Strengths = Strengths(),
    seed: int = 0,
    everything: bool = False,
) -> dict[str, float]:
    """Write features of the videos of ``annotations`` to the HDF5 file ``output``, one video in memory at a time.

    With ``grid.count`` it is a packed block (videos × T × C), else a dataset a video; float16.

    Args:
        text_weights: the tower whose joint space they shall lie in.
        everything: also the videos without instances (ActivityNet's testing subset).

    Returns:
        What a sample of them looks like: see :func:`describe`.

    Raises:
        StaleError: the name does not say that it is simulated, a strength is impossible, or an input is unusable.
    """
    if MARK not in Path(output).name:
        raise StaleError(f"--output {output}: the name must have '{MARK}' in it, so that nobody takes it for real")
    _check_strengths(strengths)
    chosen = _choose(annotations, everything)
    space = make_space(all_labels(chosen), embed_labels(text_weights, all_labels(chosen)), strengths.gap, seed)

    def make(video: Video) -> np.ndarray:
        return simulate_video(video, space, grid, strengths, seed)

    with new_hdf5(output) as file:
        file.attrs.update(_label(annotations, text_weights, grid, strengths, seed))
        _write(file, chosen, make, grid, space.common.size)
    return describe(_sample(chosen, 200), make, space)


def _choose(annotations: str | Path, everything: bool) -> list[Video]:
    videos = read_annotations(annotations)
    check_ids(videos, f"annotation file {annotations}")
    chosen = [video for video in videos.values() if video.instances or everything]
    if not all_labels(chosen):
        raise StaleError(f"annotation file {annotations}: no video has an instance")
    return chosen


def _label(
    annotations: str | Path, text_weights: str | Path, grid: Grid, strengths: Strengths, seed: int
) -> dict[str, Any]:
    """What the file says of itself."""
    label: dict[str, Any] = {
        MARK: True,
        "sampling": f"{MARK}: not extracted from any video",
        "strengths": json.dumps(asdict(strengths)),
        "seed": seed,
        "annotations": f"{Path(annotations).name}, SHA-256 {sha256_of(annotations)}",
        "text_weights": Path(text_weights).name,
    }
    return label if grid.count else {**label, "fps": grid.rate}


def embed_labels(text_weights: str | Path, labels: Sequence[str]) -> np.ndarray:
    """Unit text embeddings (K, C) of the labels' phrases."""
    from stale.data.synthetic import embed  # here: all else in this module does without torch
    from stale.model.text import load_text_weights

    return embed(load_text_weights(text_weights), [phrase(label) for label in labels])


def make_space(labels: Sequence[str], text: np.ndarray, gap: float, seed: int) -> Space:
    """The directions of ``labels``, whose unit text embeddings are ``text`` (K, C)."""
    shared = _unit(text.mean(axis=0))
    classes = _unit(text - (text @ shared)[:, None] * shared if len(text) > 1 else text)
    other = np.random.default_rng(seed).standard_normal(shared.size)
    other = _unit(other - (other @ shared) * shared)
    common = math.sqrt(1 - gap**2) * shared + gap * other
    spread = math.sqrt(float(((classes @ classes.T) ** 2).sum(axis=1).mean()))
    return Space(classes, common, {label: row for row, label in enumerate(labels)}, spread)


def simulate_video(video: Video, space: Space, grid: Grid, strengths: Strengths, seed: int) -> np.ndarray:
    """Features (S, C) of one video, float16 of unit length; the same whatever other videos there are."""
    rng = np.random.default_rng([seed, zlib.crc32(video.id.encode())])
    count, width = grid.snippets(video), space.common.size
    step = video.duration / count  # seconds from one snippet to the next
    own = strengths.common * space.common + strengths.video * _random_unit(rng, width)
    x = strengths.noise / math.sqrt(width) * _drift(rng, count, width, step, strengths.smoothness)
    classes = _class_weights(video, space, (np.arange(count) + 0.5) * step, strengths)
    confusion = rng.standard_normal(len(space.classes), dtype=np.float32)
    confusion = confusion + _drift(rng, count, len(confusion), step, strengths.smoothness)
    classes += strengths.confusion / space.spread * math.sqrt(0.5) * confusion
    x += own.astype(np.float32) + classes @ space.classes.astype(np.float32)
    return _unit(x).astype(np.float16)


def _class_weights(video: Video, space: Space, centres: np.ndarray, strengths: Strengths) -> np.ndarray:
    """(S, K): inside an instance its class, where several overlap their mean; outside, all classes of the video."""
    weights = np.zeros((len(centres), len(space.classes)), dtype=np.float32)
    rows = sorted({space.index[instance.label] for instance in video.instances})
    if not rows:
        return weights
    active = np.zeros((len(centres), len(rows)), dtype=np.float32)
    for instance in video.instances:
        inside = (centres >= instance.start) & (centres < instance.end)
        active[inside, rows.index(space.index[instance.label])] = 1
    total = active.sum(axis=1, keepdims=True)
    inside = strengths.inside * active / np.maximum(total, 1)
    weights[:, rows] = np.where(total > 0, inside, strengths.outside / len(rows))
    return weights


def _drift(rng: np.random.Generator, count: int, width: int, step: float, smoothness: float) -> np.ndarray:
    """Normal noise (S, width) whose memory fades by a factor e in ``smoothness`` seconds."""
    noise = rng.standard_normal((count, width), dtype=np.float32)
    keep = math.exp(-step / smoothness) if smoothness > 0 else 0.0
    fresh = math.sqrt(1 - keep**2)
    for i in range(1, count):
        noise[i] = keep * noise[i - 1] + fresh * noise[i]
    return noise


def _write(
    file: h5py.File, videos: Sequence[Video], make: Callable[[Video], np.ndarray], grid: Grid, width: int
) -> None:
    if grid.count is None:
        for video, features in _made(videos, make):
            file.create_dataset(video.id, data=features)
        return
    file["ids"] = as_ids([video.id for video in videos])
    shape = (len(videos), grid.count, width)
    block = file.create_dataset("features", shape, np.float16, chunks=(1, grid.count, width))
    for row, (_, features) in enumerate(_made(videos, make)):
        block[row] = features


def _made(videos: Iterable[Video], make: Callable[[Video], np.ndarray]) -> Iterator[tuple[Video, np.ndarray]]:
    videos = list(videos)
    for video in tqdm(videos, "simulated features", unit="video", leave=False, disable=len(videos) < 50):
        yield video, make(video)


def describe(videos: Sequence[Video], make: Callable[[Video], np.ndarray], space: Space) -> dict[str, float]:
    """Statistics of the features of ``videos``, to hold against those of real ones.

    Returns:
        Mean cosines of snippets of two videos, of one video, and of neighbours; how often the mean similarity to the
        classes names a video right; and the AUC of snippets inside instances against those outside.
    """
    between, within, neighbours, named, aucs = [], [], [], [], []
    last: np.ndarray | None = None
    for video in videos:
        x = _unit(make(video).astype(np.float32))
        if last is not None:
            between.append(float(x.mean(axis=0) @ last))
        last = x.mean(axis=0)
        within.append(float(last @ last))
        neighbours.append(float((x[1:] * x[:-1]).sum(axis=1).mean()) if len(x) > 1 else math.nan)
        if video.instances:
            similarity = x @ space.classes.T.astype(np.float32)  # S × K
            rows = {space.index[instance.label] for instance in video.instances}
            named.append(int(similarity.mean(axis=0).argmax()) in rows)
            aucs.append(_auc(video, similarity, space))
    columns = {
        "cosine, two videos": between,
        "cosine, one video": within,
        "cosine, neighbouring snippets": neighbours,
        "videos named right": named,
        "AUC, inside against outside": aucs,
    }
    means = {name: [value for value in values if not math.isnan(value)] for name, values in columns.items()}
    return {name: float(np.mean(values)) for name, values in means.items() if values}


def _auc(video: Video, similarity: np.ndarray, space: Space) -> float:
    """Of the similarity to the first instance's class; NaN where the video is all of it or none."""
    label = video.instances[0].label
    centres = (np.arange(len(similarity)) + 0.5) * video.duration / len(similarity)
    inside = np.zeros(len(similarity), dtype=bool)
    for instance in video.instances:
        inside |= (centres >= instance.start) & (centres < instance.end) & (instance.label == label)
    scores = similarity[:, space.index[label]]
    if inside.all() or not inside.any():
        return math.nan
    return float((scores[inside][:, None] > scores[~inside][None, :]).mean())


def _sample(videos: Sequence[Video], count: int) -> list[Video]:
    if len(videos) <= count:
        return list(videos)
    return [videos[i] for i in np.linspace(0, len(videos) - 1, count).astype(int)]


def _check_strengths(strengths: Strengths) -> None:
    values: dict[str, Any] = asdict(strengths)
    bad = [f"{name} is {value}" for name, value in values.items() if not 0 <= value < 1e6]
    bad += [f"gap is {strengths.gap}, above 1"] if strengths.gap > 1 else []
    if bad:
        raise StaleError(f"strengths must not be below 0: {'; '.join(bad)}")
    if not any(asdict(replace(strengths, gap=0, smoothness=0)).values()):
        raise StaleError("all strengths are 0: nothing is left of the features")


def _random_unit(rng: np.random.Generator, width: int) -> np.ndarray:
    return _unit(rng.standard_normal(width))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
