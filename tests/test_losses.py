"""Each loss against a slow version of itself, which modules it trains, and that ignored snippets count in none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import tiny_tower
from torch import Tensor
from torch.nn import functional as F

from stale.build import build_model
from stale.config import load_config
from stale.data.dataset import IGNORED, PADDING
from stale.errors import StaleError
from stale.model.stale import Outputs
from stale.training.losses import (
    Criterion,
    classification_loss,
    consistency_loss,
    foreground_loss,
    localization_loss,
)
from stale.training.targets import Targets, build_targets

B, T, C, K = 3, 16, 64, 4
SEGMENTS = torch.tensor(
    [[[1.0, 5.0], [8.0, 12.0]], [[2.0, 9.0], [6.0, 14.0]], [[3.0, 7.0], [0.0, 0.0]]],
)
LABELS = torch.tensor([[0, 3], [1, IGNORED], [IGNORED, PADDING]])
"""Two instances; an instance that overlaps one of an unseen class; an unseen class alone."""


@pytest.fixture(scope="module")
def targets() -> Targets:
    return build_targets(SEGMENTS, LABELS, K, T)


@pytest.fixture(params=range(3))
def outputs(request: pytest.FixtureRequest) -> Outputs:
    generator = torch.Generator().manual_seed(request.param)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    return Outputs(
        random(B, T, C, scale=1), random(B, K + 1, T, scale=4), random(B, T, T, scale=2), random(B, T, scale=2)
    )


LOSSES: dict[str, Callable[[Outputs, Targets], Tensor]] = {
    "classification": lambda outputs, targets: classification_loss(outputs.class_logits, targets),
    "localization": lambda outputs, targets: localization_loss(outputs.mask_logits, targets, 0.4),
    "foreground": lambda outputs, targets: foreground_loss(outputs.foreground_logits, targets),
    "consistency": lambda outputs, targets: consistency_loss(outputs, targets, 5, 0.2),
}


# Slow, obvious versions


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_dice(predicted: list[float], target: list[float]) -> float:
    overlap = sum(p * t for p, t in zip(predicted, target, strict=True))
    return (2 * overlap + 1) / (sum(predicted) + sum(target) + 1)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_classification_is_cross_entropy_over_valid_snippets(outputs: Outputs, targets: Targets) -> None:
    logits, entropies = outputs.class_logits.tolist(), []
    for b in range(B):
        for t in range(T):
            if targets.valid[b, t]:
                total = sum(math.exp(logits[b][k][t]) for k in range(K + 1))
                share = targets.classes[b, :, t].tolist()
                entropies.append(-sum(share[k] * math.log(math.exp(logits[b][k][t]) / total) for k in range(K + 1)))
    assert len(entropies) < B * T
    assert classification_loss(outputs.class_logits, targets).item() == pytest.approx(mean(entropies), rel=1e-5)


def test_localization_is_balanced_entropy_and_dice_of_columns(outputs: Outputs, targets: Targets) -> None:
    logits = outputs.mask_logits.tolist()
    inside, outside, dices = [], [], []
    for b in range(B):
        for t in range(T):
            places = [s for s in range(T) if targets.valid[b, s] and targets.valid[b, t]]
            for s in places:
                belongs = bool(targets.masks[b, s, t])
                probability = sigmoid(logits[b][s][t])
                (inside if belongs else outside).append(-math.log(probability if belongs else 1 - probability))
            if targets.foreground[b, t]:
                predicted = [sigmoid(logits[b][s][t]) for s in places]
                dices.append(1 - slow_dice(predicted, [float(targets.masks[b, s, t]) for s in places]))
    expected = (mean(inside) + mean(outside)) / 2 + 0.4 * mean(dices)
    assert localization_loss(outputs.mask_logits, targets, 0.4).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["dice", "bce", "dice_bce"])
def test_foreground_is_dice_a_video_or_bce_a_snippet(outputs: Outputs, targets: Targets, form: str) -> None:
    expected, entropies = [], []
    for b in range(B):
        places = [t for t in range(T) if targets.valid[b, t]]
        predicted = [sigmoid(outputs.foreground_logits[b, t].item()) for t in places]
        inside = [bool(targets.foreground[b, t]) for t in places]
        expected.append(1 - slow_dice(predicted, [float(x) for x in inside]))
        entropies += [-math.log(p if x else 1 - p) for p, x in zip(predicted, inside, strict=True)]
    loss = {"dice": mean(expected), "bce": mean(entropies), "dice_bce": mean(expected) + mean(entropies)}[form]
    assert foreground_loss(outputs.foreground_logits, targets, form).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_consistency_compares_what_both_heads_pool(outputs: Outputs, targets: Targets, threshold: float) -> None:
    expected = []
    for b in range(B):
        scores = outputs.class_logits[b].softmax(0)[:-1].amax(0).tolist()
        valid = [t for t in range(T) if targets.valid[b, t]]
        top = sorted(valid, key=lambda t: -scores[t])[:5]
        by_class, by_mask = torch.zeros(C), torch.zeros(C)
        for t in top:
            if scores[t] > threshold:
                by_class += scores[t] * outputs.visual[b, t].detach()
            for s in valid:
                probability = sigmoid(outputs.mask_logits[b, s, t].item())
                if probability > threshold:
                    by_mask += probability * outputs.visual[b, s].detach()
        expected.append(1 - float(F.cosine_similarity(by_class, by_mask, dim=0)))
    assert consistency_loss(outputs, targets, 5, threshold).item() == pytest.approx(mean(expected), abs=1e-5)


# Limits


def perfect(targets: Targets) -> Outputs:
    """Outputs that say exactly what the targets say."""
    visual = torch.randn(B, 1, C) * targets.foreground.unsqueeze(2) + 0.0
    sure = 50.0
    return Outputs(
        visual,
        sure * targets.classes,
        sure * (2 * targets.masks.float() - 1),
        sure * (2 * targets.foreground.float() - 1),
    )


@pytest.mark.parametrize("name", ["classification", "localization", "foreground"])
def test_perfect_outputs_cost_nothing(name: str) -> None:
    targets = build_targets(SEGMENTS[:, :1], torch.tensor([[0], [1], [2]]), K, T)
    assert LOSSES[name](perfect(targets), targets).item() == pytest.approx(0, abs=1e-4)


def test_heads_that_agree_are_consistent() -> None:
    targets = build_targets(SEGMENTS[:, :1], torch.tensor([[0], [1], [2]]), K, T)
    assert consistency_loss(perfect(targets), targets, 3, 0.5).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [PADDING, IGNORED])
def test_videos_of_nothing_to_learn_are_finite(outputs: Outputs, name: str, label: int) -> None:
    whole = torch.tensor([[[0.0, float(T)]]]).expand(B, 1, 2)
    loss = LOSSES[name](outputs, build_targets(whole, torch.full((B, 1), label), K, T))
    loss.backward()
    assert loss.isfinite()
    given = [value for value in vars(outputs).values() if isinstance(value, Tensor)]
    assert all(t.grad is None or t.grad.isfinite().all() for t in given)


def test_the_heavier_side_does_not_outweigh_the_lighter() -> None:
    """Localization: everything inside wrong costs as much as everything outside wrong."""
    targets = build_targets(torch.tensor([[[4.0, 6.0]]]), torch.tensor([[0]]), K, T)
    right = 10 * (2 * targets.masks.float() - 1)
    costs = [
        localization_loss(torch.where(side, -right, right), targets, 0.0).item()
        for side in (targets.masks, ~targets.masks)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)


# Ignored snippets


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_snippets_change_no_loss(outputs: Outputs, targets: Targets, name: str) -> None:
    invalid = ~targets.valid
    assert invalid.any(1).tolist() == [False, True, True]

    def shaken(tensor: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, tensor.detach() + 5, tensor.detach())

    changed = Outputs(
        shaken(outputs.visual, invalid.unsqueeze(2)),
        shaken(outputs.class_logits, invalid.unsqueeze(1) & (torch.arange(K + 1) == 1).view(1, -1, 1)),
        shaken(outputs.mask_logits, invalid.unsqueeze(1) | invalid.unsqueeze(2)),
        shaken(outputs.foreground_logits, invalid),
    )
    assert LOSSES[name](changed, targets).item() == pytest.approx(LOSSES[name](outputs, targets).item(), rel=1e-6)
    everywhere = replace(targets, valid=torch.ones_like(targets.valid))
    assert LOSSES[name](changed, everywhere).item() != pytest.approx(LOSSES[name](outputs, everywhere).item())


# Which modules each loss trains


PARTS = (
    "text.tower",
    "text.context",
    "background",
    "projection",
    "temporal",
    "masking",
    "adaptation",
    "localizer",
)
LANGUAGE = {"text.tower", "text.context", "background", "adaptation"}
VISUAL = {"projection", "temporal"}


def trained_by(name: str, *assignments: str) -> set[str]:
    """The parts of the model in which some parameter receives gradient from one loss."""
    torch.manual_seed(0)
    settings = ["model.visual_projection=true", "model.localizer.hidden=8", "model.adaptation.alpha=0.1", *assignments]
    model = build_model(load_config((), settings).model, T, C, tiny_tower(layers=1)).eval()  # no dropout
    if model.masking is not None:
        model.masking.weigh.bias.data.fill_(-model.masking.weigh.weight.sum().item() / 2)
    features = torch.randn(B, T, C)
    outputs = model(features, model.text(model.text.tokenize(["diving", "high jump", "shot put", "golf swing"])))
    if model.masking is not None:
        assert 0 < (outputs.foreground_logits > 0).float().mean() < 1, "the case must be a real one"
    LOSSES[name](outputs, build_targets(SEGMENTS, LABELS, K, T)).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {part for part in PARTS if any(parameter.startswith(part) for parameter in reached)}
    assert all(parameter.startswith(PARTS) for parameter in reached)
    return parts


def test_classification_trains_the_language_side_and_the_temporal_model() -> None:
    assert trained_by("classification") == LANGUAGE | VISUAL


@pytest.mark.parametrize("gradient", ["straight_through", "soft"])
def test_classification_trains_the_mask_where_its_threshold_passes_gradient(gradient: str) -> None:
    assert trained_by("classification", f"model.masking.gradient={gradient}") == LANGUAGE | VISUAL | {"masking"}


def test_localization_trains_the_localizer_and_the_temporal_model() -> None:
    assert trained_by("localization") == {"localizer"} | VISUAL


def test_foreground_trains_the_mask_and_the_temporal_model() -> None:
    assert trained_by("foreground") == {"masking"} | VISUAL


def test_consistency_trains_both_branches() -> None:
    assert trained_by("consistency") == LANGUAGE | {"localizer"} | VISUAL


def test_a_frozen_tower_leaves_the_context_to_train() -> None:
    frozen = "model.text.encoder=frozen"
    assert trained_by("classification", frozen) == LANGUAGE - {"text.tower"} | VISUAL
    assert trained_by("consistency", frozen) == LANGUAGE - {"text.tower"} | {"localizer"} | VISUAL


def test_consistency_alone_reaches_both_heads_outputs(outputs: Outputs, targets: Targets) -> None:
    consistency_loss(outputs, targets, 5, 0.2).backward()
    assert outputs.class_logits.grad.abs().sum() > 0
    assert outputs.mask_logits.grad.abs().sum() > 0
    assert outputs.visual.grad.abs().sum() > 0


# The sum


def test_the_criterion_weighs_and_names_every_loss(outputs: Outputs, targets: Targets) -> None:
    weights = {"classification": 0.4, "localization": 0.3, "foreground": 0.1, "consistency": 2.0}
    total, losses = Criterion(weights, dice=0.4, consistency_snippets=5, consistency_threshold=0.2)(outputs, targets)
    assert set(losses) == set(LOSSES)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(LOSSES[name](outputs, targets).item())
    assert total.item() == pytest.approx(sum(weights[name] * loss.item() for name, loss in losses.items()))


def test_a_loss_of_weight_0_is_left_out(outputs: Outputs, targets: Targets) -> None:
    weights = {"classification": 1.0, "localization": 0.0, "foreground": 1.0, "consistency": 0.0}
    total, losses = Criterion(weights)(replace(outputs, foreground_logits=None), targets)
    assert set(losses) == {"classification"}
    assert total.item() == pytest.approx(losses["classification"].item())


def test_no_loss_at_all_is_an_error(outputs: Outputs, targets: Targets) -> None:
    weights = {"classification": 0.0, "localization": 0.0, "foreground": 1.0, "consistency": 0.0}
    with pytest.raises(StaleError, match="no loss is left"):
        Criterion(weights)(replace(outputs, foreground_logits=None), targets)
