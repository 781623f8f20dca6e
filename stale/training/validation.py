"""How good the model of an epoch is, on what may choose the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from stale import parallel
from stale.build import phrases
from stale.config import Config
from stale.data.dataset import VideoDataset
from stale.detection.detector import detect
from stale.evaluation import default_tious, evaluate_results
from stale.model.stale import Stale
from stale.training.losses import Criterion, Sizes
from stale.training.objective import Objective, autocast
from stale.training.targets import build_targets


def held_out_map(
    model: Stale, held_out: VideoDataset, seen: Sequence[str], config: Config, precision: torch.dtype
) -> float:
    """The average mAP of the seen classes in the held-out seen videos; processes share the work and all get it."""
    options = replace(config.detection, oracle="none")  # which is a question to the test alone
    with autocast(model.background.device, precision):
        results = detect(model, held_out.videos, held_out.features, seen, phrases(seen), options, progress=False)
    if not parallel.is_first():
        return parallel.from_first(math.nan)
    found = evaluate_results(held_out.videos, results, seen, default_tious(config.data.dataset))
    return parallel.from_first(found.average)


@torch.no_grad()
def unseen_loss(
    model: Stale,
    criterion: Criterion,
    data: VideoDataset,
    unseen: Sequence[str],
    batch_size: int,
    precision: torch.dtype,
) -> float:
    """The loss on the unseen test classes, which zero-shot training must not know (released code).

    Every process computes all of it.
    """
    prompts = model.text.tokenize(phrases(unseen)).to(model.background.device)
    of_these = replace(criterion, anchor=None)  # which is of the classes trained on
    objective, total = Objective(model, of_these, prompts, precision).eval(), 0.0
    for indices in torch.arange(len(data), device=data.index_device).split(batch_size):
        batch = data.batch(indices)
        targets = build_targets(batch.segments, batch.labels, len(prompts.tokens), batch.features.shape[1])
        total += float(objective(batch.features, targets, Sizes.of(targets))[0]) * len(indices)
    return total / len(data)


def is_better(candidate: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """By the loss on unseen classes where that was asked for, else by the held-out mAP; the first of equals stays."""
    if "unseen_loss" in candidate:
        return candidate["unseen_loss"] < best.get("unseen_loss", math.inf)
    return candidate["mAP"] > best["mAP"]
