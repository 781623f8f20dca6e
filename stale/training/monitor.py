"""Warnings during training where a part of the model does nothing, although the loss falls.

B videos, T snippets, K seen classes.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stale.config import Config
from stale.model.stale import Outputs, Stale
from stale.training.losses import LossNormalizers
from stale.training.targets import Targets

_MOVED = 1e-5  # relative change of a component's weights in an epoch, below which it has not moved
_FLAT = 1e-3  # standard deviation over time, below which a mask is constant


@torch.no_grad()
def part_statistics(
    outputs: Outputs, targets: Targets, normalizers: LossNormalizers, threshold: float
) -> dict[str, Tensor]:
    """What the masks of a batch do; the values of all processes add up, as losses do.

    ``passing``: share of the valid snippets whose L is above ``threshold``, θ_bin; ``foreground_deviation``: standard
    deviation of L over time, mean over the videos.
    """
    statistics = {}
    if outputs.foreground_logits is not None:
        L = outputs.foreground_logits.float().sigmoid()  # B × T
        passing = (threshold < L) & targets.valid
        statistics["passing"] = passing.sum() / normalizers.valid.clamp(min=1)
        statistics["foreground_deviation"] = L.std(1).sum() / normalizers.videos
    return statistics


class Monitor:
    """Compares an epoch's mean losses and statistics with what a part gives that does nothing."""

    def __init__(self, config: Config, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes
        self._start: dict[str, list[Tensor]] = {}

    def begin(self, model: Stale) -> None:
        """Remember the weights at the start of an epoch."""
        self._start = {name: [p.detach().cpu().clone() for p in own] for name, own in components(model).items()}

    def movement(self, model: Stale) -> dict[str, float]:
        """Change of each component's weights since :meth:`begin`, relative to their norms then."""
        change = {}
        for name, weights in components(model).items():
            pairs = list(zip(weights, self._start[name], strict=True))
            norm = sum(float(q.norm()) for _, q in pairs)
            change[name] = sum(float((p.detach().cpu() - q).norm()) for p, q in pairs) / max(norm, 1e-12)
        return change

    def warnings(self, means: Mapping[str, float], moved: Mapping[str, float]) -> Iterator[str]:
        """One line for each part that does nothing, with what to change; ``moved`` is of :meth:`movement`."""
        masking, loss = self.config.model.masking, self.config.loss
        passing = means.get("passing", 0.5)
        if masking.applied and (passing < 1e-4 or passing > 1 - 1e-4):
            amount, change = ("nothing", "lower") if passing < 0.5 else ("everything", "raise")
            yield f"the representation mask passes {amount}: {change} model.masking.threshold ({masking.threshold:g})"
        if means.get("foreground_deviation", 1.0) < _FLAT:
            yield (
                "the representation mask is constant over time: raise train.learning_rate, set "
                "loss.foreground_form=dice_bce, or give it context by model.masking.blocks"
            )
        trivial = math.log(self.num_classes + 1)
        if loss.classification_form == "cross_entropy" and abs(means.get("classification", 0.0) - trivial) < 1e-3:
            yield f"the classification loss is that of guessing, ln(K+1) = {trivial:.4g}: does the mask pass anything?"
        trivial = 0.0 if loss.consistency_centered else 1.0
        if abs(means.get("consistency", 0.5) - trivial) < 1e-5:
            threshold = loss.consistency_threshold
            yield f"the consistency loss is constant: no score is above loss.consistency_threshold ({threshold:g})"
        for name, movement in moved.items():
            if name == "background" and loss.classification_form == "pooled":  # which does not use it
                continue
            if movement <= _MOVED:
                yield f"the weights of {name} have not moved: no gradient reaches them, or their rate is too low"


def components(model: Stale) -> dict[str, list[torch.nn.Parameter]]:
    """The trained parameters of each component, by the name of its settings."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            component = "text.context" if name == "text.context" else name.split(".")[0]
            found.setdefault(component, []).append(parameter)
    return found
