"""From the configuration to what a step minimises, in which precision, and by which optimiser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stale.config import LossConfig, TrainConfig
from stale.errors import StaleError
from stale.model.stale import Stale
from stale.training.losses import Criterion


def build_criterion(config: LossConfig, anchor: Tensor | None = None) -> Criterion:
    """The losses with their configured weights.

    Args:
        anchor: text features (K, C) that the classes' stay near by ``loss.anchor``.
    """
    names = ("classification", "localization", "foreground", "consistency", "anchor")
    weights = {name: getattr(config, name) for name in names}
    return Criterion(
        weights,
        config.dice,
        config.foreground_form,
        config.consistency_snippets,
        config.consistency_threshold,
        config.consistency_gradient,
        config.classification_form,
        anchor,
    )


def build_optimizer(model: Stale, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay on matrices; the text encoder may have a learning rate of its own.

    Decoupled, because Adam would rescale a decay inside the gradient to full steps wherever the loss says nothing.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learned_name = name in ("text.context", "text.embedding")  # a vector a token or class, not a matrix
            in_text = name.startswith("text.") and name != "text.embedding"  # which starts from nothing
            key = (in_text, parameter.ndim >= 2 and not learned_name)
            groups.setdefault(key, []).append(parameter)
    text_rate = config.learning_rate if config.text_learning_rate is None else config.text_learning_rate
    settings = [
        {
            "params": parameters,
            "lr": text_rate if in_text else config.learning_rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (in_text, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, fused=next(model.parameters()).is_cuda)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a GPU, float32 elsewhere; otherwise as named."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, the same to the bit on a GPU too, if ``wanted``; cuBLAS asks for its setting before its first use."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    former = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        raise StaleError(f"train.deterministic=true cannot be kept on this device ({reason}): set it false") from error
    finally:
        torch.use_deterministic_algorithms(former)
