"""Models and videos to measure with: random weights and features, in the sizes of ActivityNet and CLIP ViT-B/16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from stale.build import build_model
from stale.config import ModelConfig
from stale.data.annotations import Instance, Video
from stale.data.synthetic import CLASSES, random_tower
from stale.model.stale import Stale
from stale.model.text import TextEncoder, TextTower


@dataclass(frozen=True)
class Size:
    """Of a problem; at scale 1 that of ActivityNet with CLIP ViT-B/16.

    Attributes:
        classes: K of the vocabulary.
        snippets: T.
        width: of the text tower, its embedding and the features.
        layers: of the text tower.
    """

    classes: int
    snippets: int
    width: int
    layers: int

    @classmethod
    def scaled(cls, scale: float, classes: int) -> Size:
        """The size with ``scale`` times as many of everything, the width in whole heads of 64."""
        width = 64 * max(round(8 * scale), 1)
        return cls(max(round(classes * scale), 3), max(round(100 * scale), 16), width, max(round(12 * scale), 2))

    def __str__(self) -> str:
        tower = f"text tower {self.width} wide, {self.layers} layers"
        return f"{self.snippets} snippets, {self.classes} classes, {tower}"


def random_phrases(count: int) -> list[str]:
    """So many class names of the length that ActivityNet's have: the demo's verbs and objects, combined."""
    words = [name.split(maxsplit=1) for name in CLASSES]
    pairs = (
        (words[(first + shift) % len(words)][0], thing) for shift in range(20) for first, (_, thing) in enumerate(words)
    )
    names = list(dict.fromkeys(map(" ".join, pairs)))
    if count > len(names):
        raise ValueError(f"{count} names are too many, {len(names)} can be made")
    return names[:count]


def random_encoder(size: Size, prompt: str = "learned", seed: int = 0) -> TextEncoder:
    """A text encoder of that size with random weights."""
    torch.manual_seed(seed)
    return TextEncoder(TextTower.from_weights(random_tower(seed, size.width, size.layers, size.width)), prompt)


def random_model(size: Size, seed: int = 0) -> Stale:
    """STALE as configured by default around a random tower, made comparable.

    There is no dropout, and the mask weighs features instead of cutting them off at a threshold: otherwise two sides
    that differ in the order of sums alone would differ in what they drop.
    """
    torch.manual_seed(seed)
    config = comparable(ModelConfig())
    tower = TextTower.from_weights(random_tower(seed, size.width, size.layers, size.width))
    return build_model(config, size.snippets, size.width, tower)


def comparable(config: ModelConfig) -> ModelConfig:
    """``config`` without dropout and with the soft mask."""
    config.temporal.dropout = config.masking.dropout = config.adaptation.dropout = 0.0
    config.masking.gradient = "soft"
    return config


def random_videos(count: int, labels: Sequence[str], seed: int = 0) -> list[Video]:
    """Videos of half a minute to four, each with one to three instances of one class."""
    rng = np.random.default_rng(seed)
    videos = []
    for number in range(count):
        duration, label = float(rng.uniform(30, 240)), labels[int(rng.integers(len(labels)))]
        times = np.sort(rng.uniform(0, duration, (int(rng.integers(1, 4)), 2)), axis=1).tolist()
        videos.append(Video(f"video_{number:05d}", "bench", duration, tuple(Instance(*span, label) for span in times)))
    return videos


def random_features(count: int, size: Size, seed: int = 0) -> Tensor:
    """Features (count, T, D), in half precision as they are stored."""
    return torch.randn(count, size.snippets, size.width, generator=torch.Generator().manual_seed(seed)).half()


def write_packed(path: Path, videos: Sequence[Video], features: Tensor) -> None:
    """Features (V, T, D) of ``videos`` as a packed block."""
    with h5py.File(path, "w") as file:
        file["features"] = features.numpy()
        file["ids"] = np.array([video.id for video in videos], h5py.string_dtype())
