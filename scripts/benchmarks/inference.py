"""The model's outputs for videos: batches and the vocabulary read once, against a video and its text at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from scripts.benchmarks.models import Size, random_features, random_model, random_phrases
from scripts.benchmarks.rows import Row, best_of, clock_of, require_equal
from scripts.benchmarks.text import pad_prompts, plain_text
from stale.config import DetectionConfig
from stale.detection.detector import describe_classes
from stale.model.stale import Outputs, Stale
from stale.model.text import Prompts


@torch.inference_mode()
def bench(scale: float, device: torch.device) -> Iterator[Row]:
    """Two batches of videos and the 50 unseen classes of ActivityNet 75/25; seconds a video."""
    size, B, clock = Size.scaled(scale, classes=50), DetectionConfig().batch_size, clock_of(device)
    model, phrases = random_model(size).to(device).eval(), random_phrases(size.classes)
    features = random_features(2 * B, size).to(device)
    padded = pad_prompts(model.text, model.text.tokenize(phrases)).to(device)
    text = describe_classes(model, phrases)
    require_same(model(features[:B].float(), text), plain_forward(model, features[:2], padded))

    def forward() -> list[Outputs]:
        return [model(batch.float(), describe_classes(model, phrases) if first else text) for first, batch in batches]

    batches = [(True, features[:B]), (False, features[B:])]
    plain = best_of(lambda: plain_forward(model, features[:2], padded), 2, clock) / 2
    ours = best_of(forward, 3, clock) / len(features)
    yield Row("inference: a video", plain, ours, f"a video of {len(features)} (plain: of 2), {size}")
    alone = best_of(lambda: [model(one[None].float(), text) for one in features[:8]], 3, clock) / 8
    batched = best_of(lambda: model(features[:B].float(), text), 3, clock) / B
    yield Row(
        "inference: a video, its text read before on both sides",
        alone,
        batched,
        f"a video of {B} (plain: of 8), {size}",
    )


def plain_forward(model: Stale, features: Tensor, padded: Prompts) -> list[Outputs]:
    """Outputs of the videos (B, T, D), each by itself and with the text encoder run for it."""
    return [model(one[None].float(), plain_text(model.text, padded)) for one in features]


def require_same(ours: Outputs, plain: list[Outputs]) -> None:
    """Stop unless the first videos' logits agree; in float32 a hundred times a cosine has an error of about 1e-5."""
    for video, outputs in enumerate(plain):
        for name in ("class_logits", "mask_logits", "foreground_logits"):
            mine, its = getattr(ours, name)[video], getattr(outputs, name)[0]
            require_equal(f"inference: {name}", mine.cpu(), its.cpu(), 1e-4)
