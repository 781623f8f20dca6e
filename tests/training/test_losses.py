"""Each loss against a slow version of itself, which modules it trains, and that ignored snippets count in none."""

import math
from dataclasses import replace
from statistics import fmean as mean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import LossConfig, load_config
from stale.data.dataset import IGNORED, PADDING
from stale.errors import StaleError
from stale.model import localizer
from stale.model.localizer import PairScore
from stale.model.stale import Outputs, build_model
from stale.training import losses
from stale.training.losses import LossNormalizers, total_loss
from stale.training.targets import Targets, build_targets
from tests.helpers import LOSSES, tiny_text_transformer

B, T, C, K = 3, 16, 64, 4
SEGMENTS = torch.tensor([[[1.0, 5.0], [8.0, 12.0]], [[2.0, 9.0], [6.0, 14.0]], [[3.0, 7.0], [0.0, 0.0]]])
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


def loss_of(name: str, outputs: Outputs, targets: Targets, **options: Any) -> Tensor:
    """One loss, unweighted."""
    config = LossConfig(**{"consistency_snippets": 5, "consistency_threshold": 0.2} | options)
    return getattr(losses, f"{name}_loss")(outputs, targets, LossNormalizers.of(targets), config)


# Slow, obvious versions


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_dice(predicted: list[float], target: list[float]) -> float:
    overlap = sum(p * t for p, t in zip(predicted, target, strict=True))
    return (2 * overlap + 1) / (sum(predicted) + sum(target) + 1)


def slow_entropy(logits: list[float], shares: list[float], gamma: float) -> float:
    total = sum(map(math.exp, logits))
    p = [math.exp(logit) / total for logit in logits]
    return -sum(share * (1 - q) ** gamma * math.log(q) for share, q in zip(shares, p, strict=True))


@pytest.mark.parametrize(("form", "gamma"), [("cross_entropy", 0), ("focal", 2), ("batch_focal", 0)])
def test_classification_is_entropy_over_unambiguous_snippets_and_videos(
    outputs: Outputs, targets: Targets, form: str, gamma: int
) -> None:
    """The second video has a snippet of class 1 beside one of an unseen class; the third has no seen class."""
    snippets, video_logits = [], torch.randn(B, K, generator=torch.Generator().manual_seed(9))
    for b in range(B):
        for t in range(T):
            inside = [label for (start, end), label in zip(SEGMENTS[b], LABELS[b], strict=True) if start <= t < end]
            if IGNORED not in inside:
                shares = targets.classes[b, :, t].tolist()
                snippets.append(slow_entropy(outputs.class_logits[b, :, t].tolist(), shares, gamma))
    assert len(snippets) == B * T - 8 - 4
    shares = [[0.5, 0, 0, 0.5], [0, 1, 0, 0]]
    videos = [slow_entropy(video_logits[b].tolist(), shares[b], gamma) for b in (0, 1)]
    means = [mean(snippets), mean(videos)]
    if form == "batch_focal":
        means = [(1 - math.exp(-entropy)) ** 2 * entropy for entropy in means]
    assert loss_of("classification", outputs, targets, classification_form=form).item() == pytest.approx(means[0])
    outputs = replace(outputs, video_logits=video_logits)
    both = {"classification_snippets": 0.9, "classification_video": 2.0, "classification_form": form}
    assert loss_of("classification", outputs, targets, **both).item() == pytest.approx(0.9 * means[0] + 2 * means[1])


def test_sigmoid_form_is_binary_entropy_of_every_class_over_valid_snippets(outputs: Outputs) -> None:
    """Two seen classes at once are both positive, and so is a seen one beside an unseen one."""
    segments = torch.cat([SEGMENTS, torch.tensor([[[4.0, 10.0]]] * B)], 1)
    labels = torch.cat([LABELS, torch.tensor([[2], [PADDING], [PADDING]])], 1)
    targets, entropies = build_targets(segments, labels, K, T), []
    for b in range(B):
        for t in range(T):
            z = outputs.class_logits[b, :, t].tolist()
            rows = zip(segments[b].tolist(), labels[b].tolist(), strict=True)
            inside = {label for (start, end), label in rows if start <= t < end and label != PADDING}
            if inside != {IGNORED}:
                P = [sigmoid(z[k] - z[-1]) for k in range(K)]
                entropies.append(-sum(math.log(P[k] if k in inside else 1 - P[k]) for k in range(K)))
    assert len(entropies) == B * T - 5 - 4
    found = loss_of("classification", outputs, targets, classification_form="sigmoid")
    assert found.item() == pytest.approx(mean(entropies), rel=1e-5)


@pytest.mark.parametrize("balance", ["column", "all"])
def test_localization_is_balanced_entropy_and_dice_of_columns(outputs: Outputs, targets: Targets, balance: str) -> None:
    logits = outputs.mask_logits.tolist()
    inside, outside, columns, dices = [], [], [], []
    for b in range(B):
        for t in range(T):
            positions = [s for s in range(T) if targets.valid[b, s] and targets.valid[b, t]]
            found = {True: [], False: []}
            for s in positions:
                belongs = bool(targets.masks[b, s, t])
                probability = sigmoid(logits[b][s][t])
                found[belongs].append(-math.log(probability if belongs else 1 - probability))
            inside += found[True]
            outside += found[False]
            if targets.foreground[b, t]:
                columns.append(mean(found[True]) + mean(found[False]))
                predicted = [sigmoid(logits[b][s][t]) for s in positions]
                dices.append(1 - slow_dice(predicted, [float(targets.masks[b, s, t]) for s in positions]))
    for bce, dice in [(1.0, 0.4), (0.4, 0.6)]:
        entropy = mean(columns) if balance == "column" else mean(inside) + mean(outside)
        loss = loss_of("localization", outputs, targets, bce=bce, dice=dice, localization_balance=balance)
        assert loss.item() == pytest.approx(bce * entropy / 2 + dice * mean(dices), rel=1e-5)


@pytest.mark.parametrize("balance", ["column", "all"])
def test_masks_in_parts_have_the_same_loss_and_gradient(
    monkeypatch: pytest.MonkeyPatch, outputs: Outputs, targets: Targets, balance: str
) -> None:
    """As many videos at once as fit: all, two, one."""
    torch.manual_seed(0)
    score, embedding, found = PairScore(), torch.randn(B, 4, T, requires_grad=True), []
    for most in (B * T**2, 2 * T**2, 1):
        monkeypatch.setattr(localizer, "_MOST_PAIRS", most)
        masks = replace(outputs, mask_logits=score(embedding, outputs.foreground_logits.detach()))
        loss = loss_of("localization", masks, targets, localization_balance=balance)
        found.append([loss, *torch.autograd.grad(loss, [embedding, *score.parameters()])])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["dice", "bce", "dice_bce"])
def test_foreground_is_dice_of_videos_or_bce_of_snippets(outputs: Outputs, targets: Targets, form: str) -> None:
    dices, entropies = [], []
    for b in range(B):
        positions = [t for t in range(T) if targets.valid[b, t]]
        predicted = [sigmoid(outputs.foreground_logits[b, t].item()) for t in positions]
        inside = [bool(targets.foreground[b, t]) for t in positions]
        dices.append(1 - slow_dice(predicted, [float(x) for x in inside]))
        entropies += [-math.log(p if x else 1 - p) for p, x in zip(predicted, inside, strict=True)]
    expected = {"dice": mean(dices), "bce": mean(entropies), "dice_bce": mean(dices) + mean(entropies)}[form]
    found = loss_of("foreground", outputs, targets, foreground_form=form)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("threshold", "background"), [(0.2, False), (0.5, False), (0.2, True)])
def test_consistency_compares_what_both_heads_pool(
    outputs: Outputs, targets: Targets, threshold: float, background: bool, centered: bool
) -> None:
    expected = []
    for b in range(B):
        scores = outputs.class_logits[b].softmax(0)[: K + background].amax(0).tolist()
        valid = [t for t in range(T) if targets.valid[b, t]]
        visual = outputs.visual[b].detach()
        if centered:
            visual = visual - sum(visual[t] for t in valid) / len(valid)
        f_clf, f_mask = torch.zeros(C), torch.zeros(C)
        for t in sorted(valid, key=lambda t: -scores[t])[:5]:
            if scores[t] > threshold:
                f_clf += scores[t] * visual[t]
            for s in valid:
                probability = sigmoid(outputs.mask_logits[b, s, t].item())
                if probability > threshold:
                    f_mask += probability * visual[s]
        nothing = centered and not (f_clf.any() and f_mask.any())
        expected.append(0.0 if nothing else 1 - float(F.cosine_similarity(f_clf, f_mask, dim=0)))
    options = {"consistency_threshold": threshold, "consistency_background": background}
    found = loss_of("consistency", outputs, targets, consistency_centered=centered, **options)
    assert found.item() == pytest.approx(mean(expected), abs=1e-5)


# Limits


@pytest.mark.parametrize("name", LOSSES[1:])
@pytest.mark.parametrize("label", [PADDING, IGNORED])
def test_videos_without_targets_are_finite(outputs: Outputs, name: str, label: int) -> None:
    whole = torch.tensor([[[0.0, float(T)]]]).expand(B, 1, 2)
    loss = loss_of(name, outputs, build_targets(whole, torch.full((B, 1), label), K, T))
    loss.backward()
    assert loss.isfinite()
    given = [value for value in vars(outputs).values() if isinstance(value, Tensor)]
    assert all(t.grad is None or t.grad.isfinite().all() for t in given)


@pytest.mark.parametrize("name", LOSSES[1:])
def test_ignored_snippets_change_no_loss(outputs: Outputs, targets: Targets, name: str) -> None:
    invalid = ~targets.valid
    assert invalid.any(1).tolist() == [False, True, True]

    def shaken(tensor: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, tensor.detach() + 5, tensor.detach())

    unclassified = ~targets.unambiguous if name == "classification" else invalid
    changed = Outputs(
        shaken(outputs.visual, invalid.unsqueeze(2)),
        shaken(outputs.class_logits, unclassified.unsqueeze(1) & (torch.arange(K + 1) == 1).view(1, -1, 1)),
        shaken(outputs.mask_logits, invalid.unsqueeze(1) | invalid.unsqueeze(2)),
        shaken(outputs.foreground_logits, invalid),
    )
    assert loss_of(name, changed, targets).item() == pytest.approx(loss_of(name, outputs, targets).item(), rel=1e-6)
    all_snippets = torch.ones_like(targets.valid)
    everywhere = replace(targets, valid=all_snippets, unambiguous=all_snippets)
    assert loss_of(name, changed, everywhere).item() != pytest.approx(loss_of(name, outputs, everywhere).item())


# Which modules each loss trains

LANGUAGE = {"text", "text.context", "background", "adaptation", "log_temperature"}
VISUAL = {"projection", "temporal"}


@pytest.mark.parametrize(
    ("name", "setting", "parts"),
    [
        ("classification", "masking.gradient=hard", LANGUAGE | VISUAL),
        ("classification", "masking.gradient=straight_through", LANGUAGE | VISUAL | {"masking"}),
        ("classification", "masking.gradient=soft", LANGUAGE | VISUAL | {"masking"}),
        ("classification", "text.encoder=frozen", LANGUAGE - {"text"} | VISUAL),
        ("localization", "text.encoder=finetune", {"localizer"} | VISUAL),
        ("foreground", "text.encoder=finetune", {"masking"} | VISUAL),
        ("consistency", "text.encoder=finetune", LANGUAGE | {"localizer"} | VISUAL),
        ("consistency", "text.encoder=frozen", LANGUAGE - {"text"} | {"localizer"} | VISUAL),
    ],
)
def test_parts_that_a_loss_trains(name: str, setting: str, parts: set[str]) -> None:
    torch.manual_seed(0)
    settings = ["visual_projection=true", "localizer.hidden=8", "adaptation.alpha=0.1", setting]
    config = load_config((), [f"model.{assignment}" for assignment in settings])
    model = build_model(config.model, T, C, tiny_text_transformer(layers=1)).eval()  # no dropout
    model.masking.weigh.bias.data.fill_(-model.masking.weigh.weight.sum().item() / 2)
    features = torch.randn(B, T, C)
    outputs = model(features, model.text(model.text.tokenize(["diving", "high jump", "shot put", "golf swing"])))
    assert 0 < (outputs.foreground_logits > 0).float().mean() < 1, "some snippets are masked, not all"
    loss_of(name, outputs, build_targets(SEGMENTS, LABELS, K, T)).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {n if n == "text.context" else n.partition(".")[0] for n in reached} == parts


def test_consistency_sends_no_gradient_into_the_heads_as_released(outputs: Outputs, targets: Targets) -> None:
    loss_of("consistency", outputs, targets, consistency_gradient="visual").backward()
    assert outputs.visual.grad.abs().sum() > 0
    assert outputs.class_logits.grad is outputs.mask_logits.grad is None


# The sum


def test_the_criterion_weighs_and_names_every_loss(outputs: Outputs, targets: Targets) -> None:
    weights = {"classification": 0.4, "localization": 0.3, "foreground": 0.1, "consistency": 2.0}
    config = LossConfig(**weights, consistency_snippets=5, consistency_threshold=0.2)
    total, found = total_loss(outputs, targets, LossNormalizers.of(targets), config)
    assert set(found) == set(LOSSES[1:])
    for name, loss in found.items():
        assert loss.item() == pytest.approx(loss_of(name, outputs, targets).item())
    assert total.item() == pytest.approx(sum(weights[name] * loss.item() for name, loss in found.items()))


def test_losses_of_weight_0_and_of_absent_outputs_are_left_out(outputs: Outputs, targets: Targets) -> None:
    inputs = replace(outputs, foreground_logits=None), targets, LossNormalizers.of(targets)
    total, found = total_loss(*inputs, LossConfig(localization=0, consistency=0))
    assert set(found) == {"classification"}
    assert total.item() == pytest.approx(found["classification"].item())
    with pytest.raises(StaleError, match="no loss is left"):
        total_loss(*inputs, LossConfig(classification=0, localization=0, consistency=0))
