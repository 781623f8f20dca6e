"""From a batch to what is minimised, as one module: what several processes distribute, and a compiler sees."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stale import parallel
from stale.errors import StaleError
from stale.model.stale import Stale
from stale.model.text import Prompts
from stale.training.losses import Criterion, Sizes
from stale.training.targets import Targets


class Objective(nn.Module):
    """Model and losses. Whoever saves weights saves the model's, so that their names do not depend on this."""

    def __init__(self, model: Stale, criterion: Criterion, prompts: Prompts, precision: torch.dtype) -> None:
        """Args:
        prompts: of the classes trained on, on the model's device.
        precision: of what the model computes; the losses take float32.
        """
        super().__init__()
        self.model, self.criterion, self.prompts, self.precision = model, criterion, prompts, precision
        self._share = _share_of(prompts)
        self._fixed_text: Tensor | None = None

    def forward(self, features: Tensor, targets: Targets, sizes: Sizes) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, T, D) → the weighted sum of the losses, and each by name, unweighted."""
        given_mask = targets.foreground.float() if self.model.mask_given else None
        with autocast(features.device, self.precision):
            outputs = self.model(features, self._text(), given_mask)
        return self.criterion(outputs, targets, sizes)

    def _text(self) -> Tensor:
        """Text features (K, C): each process computes some classes'; all, and once, where none of it is trained."""
        if not self.model.text.fixed:
            return parallel.concatenate(self.model.text(self._share).float())[: len(self.prompts.tokens)]
        if self._fixed_text is None:
            self._fixed_text = self.model.text(self.prompts)
        return self._fixed_text


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Inside, matrices are multiplied in ``precision``; float32 changes nothing."""
    enabled = precision is not torch.float32
    return torch.autocast(device.type, precision if enabled else torch.bfloat16, enabled=enabled)


def _share_of(prompts: Prompts) -> Prompts:
    """This process's classes: as many as any other's, so that the last may compute some a second time."""
    classes = len(prompts.tokens)
    count = math.ceil(classes / parallel.size())
    rows = torch.arange(parallel.rank() * count, (parallel.rank() + 1) * count) % classes
    return Prompts(prompts.tokens[rows], prompts.end[rows])


def compile_step(objective: Objective) -> None:
    """Have torch.compile translate it at its first step, and again at the first of another number of videos.

    Raises:
        StaleError: there are several processes.
    """
    if parallel.size() > 1:
        raise StaleError("train.compile=true is for one process: what several exchange is not compiled; set it false")
    objective.compile()


@contextmanager
def names_compiler() -> Iterator[None]:
    """Inside, what torch.compile cannot do here is a :class:`StaleError` that says to do without it."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(error).split())[:300]
        raise StaleError(f"train.compile=true: torch cannot compile the step here ({reason}): set it false") from error


def distribute(objective: Objective) -> nn.Module:
    """The same for several processes, whose gradients are averaged while they are computed; a single one's as it is."""
    if parallel.size() == 1:
        return objective
    # The one buffer, the token embedding, never changes: sent at every step it would weigh as much as the gradients.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # in older torch
    # Static: every step trains the same parameters, which with some settings are not all.
    return DistributedDataParallel(objective, static_graph=True, gradient_as_bucket_view=True, **{buffers: False})
