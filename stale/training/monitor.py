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
    deviation of L over those of a video, mean over the videos.
    """
    statistics = {}
    if outputs.foreground_logits is not None:
        L = outputs.foreground_logits.float().sigmoid()  # B × T
        passing = (threshold < L) & targets.valid
        share = targets.valid / targets.valid.sum(1, keepdim=True).clamp(min=1)  # B × T
        variance = (share * (L - (share * L).sum(1, keepdim=True)).square()).sum(1)
        statistics["passing"] = passing.sum() / normalizers.valid.clamp(min=1)
        statistics["foreground_deviation"] = variance.sqrt().sum() / normalizers.videos
    return statistics


def warnings(config: Config, num_classes: int, means: Mapping[str, float], moved: Mapping[str, float]) -> Iterator[str]:
    """One line for each part that does nothing, with what to change.

    ``means`` are an epoch's losses and statistics, ``moved`` the :func:`relative_changes` of the weights in it.
    """
    masking, loss = config.model.masking, config.loss
    passing = means.get("passing", 0.5)
    if masking.applied and masking.gradient != "soft" and (passing < 1e-4 or passing > 1 - 1e-4):
        amount, change = ("nothing", "lower") if passing < 0.5 else ("everything", "raise")
        yield f"the representation mask passes {amount}: {change} model.masking.threshold ({masking.threshold:g})"
    if means.get("foreground_deviation", 1.0) < _FLAT:
        yield (
            "the representation mask is constant over time: raise train.learning_rate, set "
            "loss.foreground_form=dice_bce, or give it context by model.masking.blocks"
        )
    trivial = math.log(num_classes + 1)
    if loss.classification_form == "cross_entropy" and abs(means.get("classification", 0.0) - trivial) < 1e-3:
        yield f"the classification loss is that of guessing, ln(K+1) = {trivial:.4g}: does the mask pass anything?"
    trivial = 0.0 if loss.consistency_centered else 1.0
    if abs(means.get("consistency", 0.5) - trivial) < 1e-5:
        threshold = loss.consistency_threshold
        yield f"the consistency loss is constant: no score is above loss.consistency_threshold ({threshold:g})"
    has_background = {"classification", "consistency"} & means.keys() and loss.classification_form != "pooled"
    for name, movement in moved.items():
        if movement <= _MOVED and (has_background or name != "background"):
            yield f"the weights of {name} have not moved: no gradient reaches them, or their rate is too low"


def components(model: Stale) -> dict[str, list[torch.nn.Parameter]]:
    """The trained parameters of each component, by the name of its settings."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            component = "text.context" if name == "text.context" else name.split(".")[0]
            found.setdefault(component, []).append(parameter)
    return found


def copied_weights(model: Stale) -> dict[str, Tensor]:
    """The trained weights of each component on the CPU, one after the other."""
    return {name: torch.cat([p.detach().flatten().cpu() for p in own]) for name, own in components(model).items()}


def relative_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """‖θ - θ_0‖ / ‖θ_0‖ of each component, from its :func:`copied_weights`; ‖θ‖ where θ_0 is 0."""
    return {name: float((end - before[name]).norm() / (before[name].norm() or 1.0)) for name, end in after.items()}
