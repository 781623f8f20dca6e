"""Synthetic features around text embeddings: the demo's data set, and stand-ins for features of real annotations.

A snippet's feature is a sum of vectors, normalized to unit length: a direction that all image features share (CLIP's
gap between the modalities), a direction of the video, the text embedding of a scene, noise; inside an instance the text
embedding of its class and a direction that all actions share, outside that of something that is no action.
Results on such features show how long a run takes and whether it works, nothing about real videos.

There are two profiles (:data:`PROFILES`): ``long``, the demo's, has videos of about 100 s with few instances, one after
another; ``short`` has videos of about 30 s with overlapping instances of several classes, and features that tell the
classes apart as little as CLIP's do (:class:`FlatSynthesizer`).

S snippets of a video, C width, K classes.
"""

import io
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from data_preparation.converters import Annotations, write_as
from data_preparation.pack import Packed, write_packed
from stale.config import TextConfig
from stale.data.annotations import Instance, Video, all_labels, read_annotations
from stale.data.classes import phrase
from stale.data.embeddings import EmbeddingTable, read_embeddings
from stale.data.features import SIMULATED
from stale.errors import StaleError
from stale.io import atomic_path
from stale.model.clip import load_text_weights
from stale.model.text import Prompts, TextEncoder, TextTransformer
from stale.progress import progress_bar

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


class Synthesizer:
    """Makes features of videos of the classes ``labels``, in the joint space of text weights or of class embeddings."""

    def __init__(self, text: dict[str, Tensor] | EmbeddingTable, labels: Sequence[str], seed: int) -> None:
        self.seed, self.index = seed, {label: row for row, label in enumerate(labels)}
        if isinstance(text, EmbeddingTable):  # pauses and scenes are random mixtures of its classes
            self.classes = _unit(text.vectors[text.find(labels)].astype(np.float64))
            shares = np.random.default_rng([seed, 2]).dirichlet(np.full(len(text.vectors), 0.1), len(BETWEEN + SCENES))
            self.between, self.scenes = np.split(_unit(shares @ text.vectors), [len(BETWEEN)])
        else:
            self.classes = embed(text, [phrase(label) for label in labels])  # K × C
            self.between, self.scenes = embed(text, BETWEEN), embed(text, SCENES)
        shared = _unit(self.classes.mean(axis=0))
        common, activity = np.random.default_rng(seed).standard_normal((2, shared.size))
        self.common, self.activity = _unit(common - (common @ shared) * shared), _unit(activity)

    def __call__(self, video: Video, count: int) -> np.ndarray:
        """``count`` snippets of one video: (S, C) float16 of unit length."""
        rng = np.random.default_rng([self.seed, zlib.crc32(video.id.encode())])
        width = self.common.size
        centers = (np.arange(count) + 0.5) * video.duration / count  # seconds
        instances = sorted(video.instances, key=lambda item: item.start)
        active = np.zeros((count, len(self.classes)))  # S × K
        for item in instances:
            active[(centers >= item.start) & (centers < item.end), self.index[item.label]] = 1
        total = active.sum(axis=1, keepdims=True)

        x = 0.8 * self.common + 0.5 * _unit(rng.standard_normal(width))
        x = x + 0.5 * self.scenes[rng.integers(len(self.scenes))] + active / np.maximum(total, 1) @ self.classes
        pause = np.searchsorted([item.start for item in instances], centers)  # number of the pause between instances
        content = self.between[rng.integers(len(self.between), size=len(instances) + 1)][pause]
        x = x + np.where(total > 0, 0.5 * self.activity, content)
        x = x + 1.5 / math.sqrt(width) * rng.standard_normal((count, width), dtype=np.float32)
        return _unit(x).astype(np.float16)


class FlatSynthesizer(Synthesizer):
    """Makes features whose cosines with the class names are as flat as those of CLIP on similar indoor videos.

    Over all snippets, the cosine with a class name is 0.22 on average; its standard deviation over the classes is 0.015
    and that over time 0.010. Two snippets have the cosine 0.72 on average, two of the same video 0.91.

    A class shows in the features as follows: inside an instance the cosine with the name of its class is 0.016 higher
    than outside, and the cosines with names related to it rise with it. All else that tells class names apart is noise:
    an offset that all videos share, one of the video, and one that drifts over time. By its mean feature a video ranks
    its classes above the others with an AUC of about 0.7; a class ranks its snippets in a video with one of about 0.8.
    Orthogonal to all names, and hence without a class, are the directions of all features, of the video, of all actions
    and of each instance.
    """

    def __init__(self, text: dict[str, Tensor] | EmbeddingTable, labels: Sequence[str], seed: int) -> None:
        super().__init__(text, labels, seed)
        width, inverse = self.common.size, np.linalg.pinv(self.classes)  # C × K
        level = 0.22 * inverse.sum(axis=1)  # has this inner product with every class name
        gap = _unit(self.common - inverse @ (self.classes @ self.common))
        self.common = level + math.sqrt(max(0.77 - level @ level, 0)) * gap  # of the same length for every seed
        spanned = np.vstack([self.classes, gap])
        self.outside = np.eye(width) - np.linalg.pinv(spanned) @ spanned  # projects onto what is orthogonal to these
        centered = self.classes - self.classes.mean(axis=0)
        self.inside = np.linalg.pinv(centered) @ centered  # projects onto the differences of class names
        self.signal = centered / (centered**2).sum(axis=1, keepdims=True)  # K × C, cosine 1 more with the own class
        self.offset = np.random.default_rng([seed, 1]).standard_normal(width)

    def __call__(self, video: Video, count: int) -> np.ndarray:
        """``count`` snippets of one video: (S, C) float16 of unit length."""
        rng = np.random.default_rng([self.seed, zlib.crc32(video.id.encode())])
        width = self.common.size
        centers = (np.arange(count)[:, None] + 0.5) * video.duration / count  # seconds
        start, end = np.array([(item.start, item.end) for item in video.instances]).T
        active = ((centers >= start) & (centers < end)).astype(float)  # S × I, of I instances
        signal = self.signal[[self.index[item.label] for item in video.instances]]  # I × C
        drift = rng.standard_normal((count, width))
        for now in range(1, count):
            drift[now] = 0.8 * drift[now - 1] + 0.6 * drift[now]

        names = 0.011 * self.offset + 0.013 * rng.standard_normal(width) + 0.009 * drift
        rest = 0.50 * _unit(rng.standard_normal(width)) + 0.2 * self.activity * active.any(axis=1, keepdims=True)
        rest = rest + 0.15 * active @ _unit(rng.standard_normal((len(start), width))) + 0.047 * drift
        x = self.common + 0.016 * active @ signal + names @ self.inside + rest @ self.outside
        return _unit(x).astype(np.float16)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@torch.no_grad()
def embed(weights: dict[str, Tensor], phrases: Sequence[str]) -> np.ndarray:
    """Unit text embeddings (K, C) of ``phrases`` in the text encoder's default template."""
    transformer = TextTransformer.from_weights({name: tensor.float() for name, tensor in weights.items()})
    encoder = TextEncoder(transformer, TextConfig(prompt="template"))
    return _unit(encoder(encoder.tokenize(list(phrases))).double().numpy())


def simulate(
    annotations: Path | str,
    text: str,
    output: Path | str,
    *,
    embeddings: bool = False,
    num_snippets: int | None = None,
    rate: float = 1.0,
) -> None:
    """Write features of all videos with instances to the packed folder ``output``, which says that they are simulated.

    ``text`` are CLIP weights or, with ``embeddings``, a file of class embeddings. Each video has ``num_snippets`` or,
    if that is None, ``rate`` snippets a second.
    """
    if SIMULATED not in Path(output).name:
        raise StaleError(f"--output {output}: the name must contain '{SIMULATED}', so that nobody takes it for real")
    chosen = [video for video in read_annotations(annotations).values() if video.instances]
    labels = all_labels(chosen)
    if not labels:
        raise StaleError(f"annotation file {annotations}: no video has an instance")
    source = read_embeddings(text) if embeddings else load_text_weights(text)
    synthesize = Synthesizer(source, labels, seed=0)

    def videos() -> Iterator[Packed]:
        for video in progress_bar(chosen, "simulated features", unit="video", leave=False, disable=len(chosen) < 50):
            count = num_snippets or max(round(video.duration * rate), 1)
            record = {"duration": video.duration, "sampling": f"{SIMULATED}: not extracted from any video"}
            yield video.id, record | ({} if num_snippets else {"fps": count / video.duration}), synthesize(video, count)

    notes = {"snippets": num_snippets, SIMULATED: True, "annotations": Path(annotations).name}
    write_packed(output, videos(), width=synthesize.common.size, precision="float16", notes=notes)


def write_synthetic(
    folder: str | Path, seed: int = 0, *, profile: str = "long", training_videos: int = 16, validation_videos: int = 8
) -> list[Video]:
    """Write a profile's ``annotations.json``, ``features.h5`` and ``text_encoder.pt`` into ``folder``, each atomically.

    The same arguments give the same data. The numbers of videos are those of each class.
    """
    folder, (make_videos, synthesizer, rate) = Path(folder), PROFILES[profile]
    weights, videos = random_text_weights(seed), make_videos(seed, training_videos, validation_videos)
    synthesize = synthesizer(weights, CLASSES, seed)
    buffer = io.BytesIO()
    torch.save(weights, buffer)  # into memory, because torch writes a file's name into the file
    with atomic_path(folder / "text_encoder.pt") as temporary:
        temporary.write_bytes(buffer.getvalue())
    with atomic_path(folder / "features.h5") as temporary, h5py.File(temporary, "w") as file:
        for video in videos:
            file[video.id] = synthesize(video, round(rate * video.duration))
    write_as("activitynet", Annotations({video.id: video for video in videos}), folder / "annotations.json")
    return videos


def random_videos(seed: int, training: int, validation: int) -> list[Video]:
    """Annotated videos, so many of every class: one to four instances each, a fifth with one of a second class."""
    rng = np.random.default_rng(seed)
    videos: list[Video] = []
    for subset, number in (("training", training), ("validation", validation)):
        for label in np.repeat(CLASSES, number).tolist():
            duration = round(float(rng.uniform(40, 160)), 2)
            count = int(rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.2, 0.15]))
            actions, gaps = rng.uniform(0.3, 1.0, count), rng.uniform(0.2, 1.0, count + 1)  # relative lengths
            share = rng.uniform(0.25, 0.85)  # of the video that is action
            pieces = np.empty(2 * count + 1)
            pieces[1::2], pieces[::2] = actions / actions.sum() * share, gaps / gaps.sum() * (1 - share)
            times = np.round(np.cumsum(pieces) * duration, 2).tolist()
            labels = [label] * count
            if count > 1 and rng.random() < 0.2:
                labels[int(rng.integers(count))] = str(rng.choice([other for other in CLASSES if other != label]))
            instances = tuple(Instance(times[2 * i], times[2 * i + 1], labels[i]) for i in range(count))
            videos.append(Video(f"demo_{len(videos):04d}", subset, duration, instances))
    return videos


def short_videos(seed: int, training: int, validation: int) -> list[Video]:
    """Annotated videos, so many of every class: about four classes each, whose instances overlap.

    A class has one instance, which can be the whole video, or two.
    """
    rng = np.random.default_rng(seed)
    videos: list[Video] = []
    for subset, number in (("training", training), ("validation", validation)):
        for label in np.repeat(CLASSES, number).tolist():
            duration = round(float(rng.uniform(24, 36)), 2)
            others = rng.permutation([other for other in CLASSES if other != label])
            instances = []
            for name in [label, *others[: rng.integers(1, 6)].tolist()]:  # two to six classes
                length = min(rng.uniform(0.2, 1.1), 1)
                start = rng.uniform(0, 1 - length)
                cuts = [start, start + length]
                if rng.random() < 0.2:
                    cuts[1:1] = start + length * np.array([rng.uniform(0.3, 0.45), rng.uniform(0.55, 0.7)])
                times = [round(float(cut) * duration, 2) for cut in cuts]
                instances += [Instance(*pair, name) for pair in zip(times[::2], times[1::2], strict=True)]
            instances.sort(key=lambda item: (item.start, item.end))
            videos.append(Video(f"short_{len(videos):04d}", subset, duration, tuple(instances)))
    return videos


# Name → videos, features, snippets a second
PROFILES = {"long": (random_videos, Synthesizer, 1), "short": (short_videos, FlatSynthesizer, 2)}


def random_text_weights(seed: int, width: int = 64, layers: int = 2) -> dict[str, Tensor]:
    """Random weights of CLIP's text transformer under OpenAI's names, in float16.

    Names with words in common get related embeddings. All are nearly parallel, because prompts share most of their
    tokens; the projection removes most of that common part, so that names end up as far apart as CLIP's.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "token_embedding.weight": normal(_VOCABULARY, width),
        "positional_embedding": normal(_CONTEXT, width, scale=0.1),
    }
    shapes = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
    for block in (f"transformer.resblocks.{layer}." for layer in range(layers)):
        for name, (rows, columns) in shapes.items():
            scale = (columns * width) ** -0.5 / (2 if columns > 1 else 1)
            weights[f"{block}{name}weight"] = normal(rows * width, columns * width, scale=scale)
            weights[f"{block}{name}bias"] = torch.zeros(rows * width)
        for name in ("ln_1", "ln_2"):
            weights[f"{block}{name}.weight"], weights[f"{block}{name}.bias"] = torch.ones(width), torch.zeros(width)
    weights["ln_final.weight"], weights["ln_final.bias"] = torch.ones(width), torch.zeros(width)
    weights["text_projection"] = torch.eye(width)

    with torch.no_grad():  # the mean output over prompts of random words
        encoder = TextEncoder(TextTransformer.from_weights(weights), TextConfig(prompt="template"))
        prompts = encoder.tokenize(["word word"] * 256)
        word = encoder.tokenize(["word"]).tokens[0, -2]
        random = torch.randint(512, _VOCABULARY - 2, prompts.tokens.shape, generator=generator)
        prompts = Prompts.of(torch.where(prompts.tokens == word, random, prompts.tokens), prompts.end)
        common = torch.nn.functional.normalize(encoder(prompts).mean(0), dim=0)
    apart = torch.eye(width) - 0.85 * torch.outer(common, common)
    weights["text_projection"] = apart @ normal(width, width, scale=width**-0.5)
    return {name: tensor.half() for name, tensor in weights.items()}
