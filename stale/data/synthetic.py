"""A small synthetic data set to try the system on: annotations, features, and the text tower they belong to.

Nothing here was filmed. The tower is CLIP's text transformer with random weights: it knows no meaning, but names with
words in common get related embeddings. A snippet's feature is the embedding of what goes on in it, an action or
something in between, buried under what all features share, the video's scene, the video's own character and noise, as
in CLIP's image features. Besides, all actions have one direction in common, so that there is something to learn about
actions as such. All classes are made alike; which of them are unseen is decided by the split, afterwards.

W and C: widths of the tower and of its embedding, S: snippets of a video.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stale.data.annotations import Instance, Video
from stale.data.hdf5 import new_hdf5
from stale.data.vocabulary import phrase
from stale.files import atomic_path, write_json
from stale.model.text import TextEncoder, TextTower

CLASSES = (
    "Baking bread", "Brushing teeth", "Building a sandcastle", "Chopping vegetables", "Climbing a tree",
    "Folding laundry", "Ironing clothes", "Jumping rope", "Kicking a ball", "Mowing the lawn",
    "Painting a wall", "Playing guitar", "Playing piano", "Riding a bike", "Rowing a boat",
    "Shovelling snow", "Throwing a frisbee", "Walking the dog", "Washing a car", "Washing dishes",
)  # fmt: skip
BETWEEN = (
    "an empty room", "people talking", "a title screen", "a close-up of a face", "a crowd watching",
    "a man standing still", "looking for something", "the sky and some trees",
)  # fmt: skip
SCENES = (
    "small kitchen", "green garden", "busy street", "sandy beach", "living room", "public park",
    "dark workshop", "quiet lake", "white bathroom", "sports hall", "school yard", "roof terrace",
)  # fmt: skip

_VOCABULARY, _CONTEXT = 49408, 77  # CLIP's byte-pair encoding


@dataclass(frozen=True)
class Recipe:
    """How much data, and how hard. The weights are lengths of vectors that are added up in a feature."""

    seed: int = 0
    training_videos: int = 16  # a class
    validation_videos: int = 8  # a class
    guests: float = 0.2  # share of videos in which an instance of a second class happens
    shared: float = 0.8  # the direction that all features have in common
    content: float = 1.0  # the embedding of the action, or of what is in between
    activity: float = 0.5  # the direction that all actions have in common: somebody is up to something
    scene: float = 0.5  # the embedding of the scene, the same throughout a video
    video: float = 0.5  # a random direction, the same throughout a video
    noise: float = 1.5  # a random direction, another in every snippet


def write_synthetic(folder: str | Path, recipe: Recipe = Recipe()) -> tuple[list[Video], dict[str, Path]]:
    """Write ``annotations.json``, ``features.h5`` and ``text_tower.pt`` into ``folder``, each atomically.

    The same recipe gives the same data. Files of these names are replaced.

    Returns:
        The videos, and the three paths by the names ``annotations``, ``features``, ``text_tower``.
    """
    names = ("annotations.json", "features.h5", "text_tower.pt")
    paths = {name.split(".")[0]: Path(folder) / name for name in names}
    weights = random_tower(recipe.seed)
    videos = random_videos(recipe)
    _write_tower(paths["text_tower"], weights)
    _write_features(paths["features"], videos, weights, recipe)
    write_json(paths["annotations"], to_activitynet(videos), indent=1)
    return videos, paths


def random_tower(seed: int, width: int = 64, layers: int = 2, output_width: int = 64) -> dict[str, Tensor]:
    """Random weights of CLIP's text transformer under OpenAI's names, in float16.

    The embeddings of a random transformer are nearly parallel, for its prompts have most of their tokens in
    common. The projection turns most of that common part away, so that names end up as far apart as CLIP's.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "token_embedding.weight": normal(_VOCABULARY, width),
        "positional_embedding": normal(_CONTEXT, width, scale=0.1),
    }
    for layer in range(layers):
        block = {
            "ln_1.weight": torch.ones(width),
            "ln_1.bias": torch.zeros(width),
            "attn.in_proj_weight": normal(3 * width, width, scale=width**-0.5),
            "attn.in_proj_bias": torch.zeros(3 * width),
            "attn.out_proj.weight": normal(width, width, scale=width**-0.5),
            "attn.out_proj.bias": torch.zeros(width),
            "ln_2.weight": torch.ones(width),
            "ln_2.bias": torch.zeros(width),
            "mlp.c_fc.weight": normal(4 * width, width, scale=width**-0.5),
            "mlp.c_fc.bias": torch.zeros(4 * width),
            "mlp.c_proj.weight": normal(width, 4 * width, scale=0.5 * (4 * width) ** -0.5),
            "mlp.c_proj.bias": torch.zeros(width),
        }
        weights.update({f"transformer.resblocks.{layer}.{name}": tensor for name, tensor in block.items()})
    weights["ln_final.weight"], weights["ln_final.bias"] = torch.ones(width), torch.zeros(width)
    weights["text_projection"] = torch.eye(width)
    common = _common_direction(weights, generator)
    apart = torch.eye(width) - 0.85 * torch.outer(common, common)
    weights["text_projection"] = apart @ normal(width, output_width, scale=width**-0.5)
    return {name: tensor.half() for name, tensor in weights.items()}


@torch.no_grad()
def _common_direction(weights: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """The unit mean (W,) of the tower's output over prompts with random words in them."""
    encoder = TextEncoder(TextTower.from_weights(weights), "template")
    prompts = encoder.tokenize(["word word"] * 256)
    word = encoder.tokenize(["word"]).tokens[0, -2]
    random = torch.randint(512, _VOCABULARY - 2, prompts.tokens.shape, generator=generator)
    prompts.tokens[:] = torch.where(prompts.tokens == word, random, prompts.tokens)
    return torch.nn.functional.normalize(encoder(prompts).mean(0), dim=0)


@torch.no_grad()
def embed(weights: dict[str, Tensor], phrases: Sequence[str]) -> np.ndarray:
    """Unit-length text embeddings (K, C) of ``phrases`` in the tower's default template."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    encoder = TextEncoder(TextTower.from_weights(weights), "template")
    return _unit(encoder(encoder.tokenize(list(phrases))).double().numpy())


def random_videos(recipe: Recipe) -> list[Video]:
    """Annotated videos of every class for both subsets: one to four instances each, some with a guest class."""
    rng = np.random.default_rng(recipe.seed)
    counts = {"training": recipe.training_videos, "validation": recipe.validation_videos}
    videos = []
    for subset, count in counts.items():
        for label in np.repeat(CLASSES, count).tolist():
            duration = round(float(rng.uniform(40, 160)), 2)
            instances = _random_instances(rng, label, duration, recipe.guests)
            videos.append(Video(f"demo_{len(videos):04d}", subset, duration, instances))
    return videos


def _random_instances(rng: np.random.Generator, label: str, duration: float, guests: float) -> tuple[Instance, ...]:
    count = int(rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.2, 0.15]))
    actions = rng.uniform(0.3, 1.0, count)  # relative lengths
    gaps = rng.uniform(0.2, 1.0, count + 1)
    share = rng.uniform(0.25, 0.85)  # of the video that is action
    pieces = np.empty(2 * count + 1)
    pieces[1::2] = actions / actions.sum() * share
    pieces[::2] = gaps / gaps.sum() * (1 - share)
    times = np.round(np.cumsum(pieces) * duration, 2).tolist()
    labels = [label] * count
    if count > 1 and rng.random() < guests:
        labels[int(rng.integers(count))] = str(rng.choice([other for other in CLASSES if other != label]))
    return tuple(Instance(times[2 * i], times[2 * i + 1], labels[i]) for i in range(count))


def random_features(videos: Sequence[Video], weights: dict[str, Tensor], recipe: Recipe) -> dict[str, np.ndarray]:
    """Features of every video: (S, C) float16 of unit length, one snippet a second."""
    rng = np.random.default_rng(recipe.seed + 1)
    actions = dict(zip(CLASSES, embed(weights, [phrase(label) for label in CLASSES]), strict=True))
    between, scenes = embed(weights, BETWEEN), embed(weights, SCENES)
    width = scenes.shape[1]
    shared, activity = _unit(rng.standard_normal((2, width)))

    features = {}
    for video in videos:
        content, active = _content(video, actions, between, rng)
        own = recipe.scene * scenes[rng.integers(len(scenes))] + recipe.video * _unit(rng.standard_normal(width))
        x = recipe.shared * shared + own + recipe.content * content + recipe.activity * active[:, None] * activity
        x = x + recipe.noise * _unit(rng.standard_normal(content.shape))
        features[video.id] = _unit(x).astype(np.float16)
    return features


def _content(
    video: Video, actions: dict[str, np.ndarray], between: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The embedding of what goes on in each second (S, C), and whether it is an action (S,).

    Each stretch between two instances is one thing of ``between`` (number of things, C).
    """
    centres = np.arange(int(np.ceil(video.duration))) + 0.5
    starts = np.array([instance.start for instance in video.instances])
    stretches = between[rng.integers(len(between), size=len(starts) + 1)]
    content, active = stretches[np.searchsorted(starts, centres)], np.zeros(len(centres))
    for instance in video.instances:
        inside = (centres >= instance.start) & (centres < instance.end)
        content[inside], active[inside] = actions[instance.label], 1
    return content, active


def to_activitynet(videos: Sequence[Video]) -> dict[str, Any]:
    """ActivityNet's annotation layout."""
    database = {}
    for video in videos:
        annotations = [{"segment": [item.start, item.end], "label": item.label} for item in video.instances]
        database[video.id] = {"subset": video.subset, "duration": video.duration, "annotations": annotations}
    return {"version": "synthetic", "database": database}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _write_tower(path: Path, weights: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(weights, buffer)  # into memory, for torch writes a file's name into the file
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _write_features(path: Path, videos: Sequence[Video], weights: dict[str, Tensor], recipe: Recipe) -> None:
    with new_hdf5(path) as file:
        for video_id, array in random_features(videos, weights, recipe).items():
            file.create_dataset(video_id, data=array)
