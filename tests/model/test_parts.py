"""Every part does its work: at the start, in the first steps of the shipped configurations, and on what it is for.

B videos, T snippets, C joint width, K classes.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.config import Config, TextConfig, load_config
from stale.model.localizer import MaskLocalizer
from stale.model.stale import Stale, build_model
from stale.model.temporal import attend
from stale.model.text import TextEncoder, TextTransformer
from stale.training.losses import LossNormalizers, total_loss
from stale.training.monitor import copied_weights, relative_changes, warnings
from stale.training.targets import Targets, build_targets
from stale.training.trainer import TrainStep, build_optimizer
from tests.helpers import REPOSITORY, tiny_text_transformer

B, T, C = 4, 32, 64
NAMES = ("baseball pitch", "clean and jerk", "diving", "hammer throw", "long jump", "shotput")
K = len(NAMES)
SHIPPED = ("thumos14", "activitynet", "demo", "thumos14_captions")
STEPS = 80


@pytest.fixture(scope="module")
def transformer() -> TextTransformer:
    return tiny_text_transformer(layers=1)


@pytest.fixture(scope="module")
def class_text(transformer: TextTransformer) -> Tensor:
    """Text features (K, C) of the untrained encoder, of unit length."""
    encoder = TextEncoder(copy.deepcopy(transformer), TextConfig(prompt="template"))
    with torch.no_grad():
        return F.normalize(encoder(encoder.tokenize(NAMES)), dim=-1)


def model_of(config: Config, transformer: TextTransformer, seed: int) -> Stale:
    torch.manual_seed(seed)
    return build_model(config.model, T, C, copy.deepcopy(transformer), NAMES)


def videos(class_text: Tensor, seed: int) -> tuple[Tensor, Targets, Tensor]:
    """Features (B, T, C), targets and labels (B, 2) of videos with an instance of one class in each half.

    The features are noise around the classes' mean text. Inside an instance, what is specific to its class is added.
    """
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(class_text.mean(0), dim=-1) * C**0.5 + 0.7 * torch.randn(B, T, C, generator=generator)
    labels = torch.randint(K, (B, 2), generator=generator)
    start = torch.randint(T // 4, (B, 2), generator=generator) + torch.tensor([0, T // 2])
    segments = torch.stack([start, start + torch.randint(3, T // 4, (B, 2), generator=generator)], 2)
    direction = F.normalize(class_text - class_text.mean(0), dim=-1) * C**0.5
    for b in range(B):
        for (first, last), label in zip(segments[b].tolist(), labels[b].tolist(), strict=True):
            features[b, first:last] += 2 * direction[label]
    return features, build_targets(segments.float(), labels, K, T), labels


def first_steps(model: Stale, config: Config, class_text: Tensor, steps: int = STEPS) -> list[dict[str, float]]:
    """The losses and statistics of the first steps of training, each on other videos."""
    step = TrainStep(model.train(), config.loss, NAMES, torch.float32)
    optimizer, found = build_optimizer(model, config.train), []
    for number in range(steps):
        features, targets, _ = videos(class_text, number)
        total, losses = step(features, targets, LossNormalizers.of(targets))
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm or math.inf)
        optimizer.step()
        found.append({name: float(value.detach()) for name, value in losses.items()})
    return found


@pytest.mark.parametrize("seed", range(12))
def test_every_snippet_passes_at_first_and_gradient_reaches_what_names_it(
    transformer: TextTransformer, class_text: Tensor, seed: int
) -> None:
    config = load_config()
    model, (features, targets, _) = model_of(config, transformer, seed).train(), videos(class_text, seed)
    outputs = model(features, model.text(model.text.tokenize(NAMES)), None, targets.foreground)
    assert (outputs.foreground_logits.sigmoid() > config.model.masking.threshold).all()
    assert outputs.foreground_logits.max() < 2, "not saturated"
    assert outputs.foreground_logits.std(1).min() > 0
    alone = config.loss.model_copy(update={"localization": 0.0, "foreground": 0.0, "consistency": 0.0})
    total_loss(outputs, targets, LossNormalizers.of(targets), alone)[0].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"text", "temporal", "adaptation", "background", "log_temperature"}
    assert model.text.context.grad.any()


@pytest.mark.parametrize("seed", range(3))
def test_a_background_from_the_mean_text_starts_with_a_lower_loss(
    transformer: TextTransformer, class_text: Tensor, seed: int
) -> None:
    losses = []
    for start in ("mean_text", "random"):
        config = load_config((), [f"model.background_init={start}"])
        losses.append(first_steps(model_of(config, transformer, seed), config, class_text, 1)[0]["classification"])
    assert losses[0] < losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [(SHIPPED[seed % len(SHIPPED)], seed) for seed in range(12)])
def test_every_shipped_configuration_trains(
    transformer: TextTransformer, class_text: Tensor, name: str, seed: int
) -> None:
    config = load_config([REPOSITORY / "configs" / f"{name}.yaml"], ["model.text.context_init=null"])
    model = model_of(config, transformer, seed)
    before, context = copied_weights(model), model.text.context.detach().clone()
    found = first_steps(model, config, class_text)
    latest = {key: sum(step[key] for step in found[-10:]) / 10 for key in found[0]}
    assert latest["classification"] < math.log(K + 1)
    assert (model.text.context - context).norm() > 0.05 * context.norm(), "the prompt moves"
    assert list(warnings(config, K, latest, relative_changes(before, copied_weights(model)))) == []


def test_the_fused_optimizer_takes_the_steps_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, transformer: TextTransformer, class_text: Tensor
) -> None:
    found, adam, config = [], torch.optim.AdamW, load_config()
    for wanted in (True, False):
        monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, wanted=wanted: adam(groups, fused=wanted))
        model = model_of(config, transformer, 0)
        first_steps(model, config, class_text, 3)
        found.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "dynamic"])
@pytest.mark.parametrize("coordinates", ["absolute", "pairwise"])
@torch.no_grad()
def test_a_moved_action_moves_the_mask_unless_coordinates_are_absolute(coordinates: str, kind: str) -> None:
    torch.manual_seed(0)
    settings = [f"model.localizer.{x}" for x in (f"kind={kind}", f"coordinates={coordinates}", "hidden=16")]
    localizer = MaskLocalizer(C, T, load_config((), settings).model.localizer).eval()
    action, still = torch.randn(6, C), torch.randn(C)

    def masks(start: int) -> Tensor:
        """M (T, T) of a video in which nothing happens but the action, from snippet ``start``."""
        features, foreground = still.repeat(1, T, 1), torch.full((1, T), -3.0)
        features[0, start : start + 6], foreground[0, start : start + 6] = action, 3.0
        return localizer(features, foreground)[0].sigmoid()

    before, after = masks(10), masks(15)
    window, moved = slice(8, 18), slice(13, 23)
    assert (before[window, window] - before[window, 5:6]).abs().max() > 0.01, "the masks of the action are its own"
    if coordinates == "absolute":
        torch.testing.assert_close(after[:, moved], before[:, window], atol=1e-5, rtol=1e-4)
        assert (after[moved, moved] - before[window, window]).abs().max() > 0.01
    else:
        torch.testing.assert_close(after[moved, moved], before[window, window], atol=1e-5, rtol=1e-4)
        assert before[10:16, 12].min() > before[:10, 12].max(), "it starts as the foreground around the snippet"


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_the_adaptation_tells_classes_and_videos_apart(
    transformer: TextTransformer, class_text: Tensor, seed: int
) -> None:
    model, (features, targets, labels) = model_of(load_config(), transformer, seed).eval(), videos(class_text, seed)
    foreground = targets.foreground.float()
    change = model.adaptation(class_text, model.normalize_features(features), foreground) - class_text  # B × K × C
    for shared in (change.mean(1, keepdim=True), change.mean(0)):
        assert (change - shared).square().sum(2).mean().sqrt() > 0.05, "of text features of length 1"
    mean = F.normalize((model.normalize_features(features) * foreground.unsqueeze(2)).sum(1), dim=-1)  # B × C
    moved = (F.normalize(class_text + change, dim=-1) - class_text) @ mean.unsqueeze(2)  # B × K × 1
    shown = torch.zeros(B, K, dtype=torch.bool).scatter(1, labels, True)
    assert moved[shown].mean() > 0 > moved[~shown].mean()


@torch.no_grad()
def test_dropout_of_values_is_for_one_query_that_of_weights() -> None:
    """Mean, deviation and covariance over many videos; without dropout both forms of attention are equal."""
    torch.manual_seed(0)
    plain, videos = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True), 40_000
    query, memory = torch.randn(1, 1, 8).expand(videos, -1, -1), torch.randn(1, 6, 8).expand(videos, -1, -1)
    found, expected = attend(plain, query, memory).squeeze(1), plain(query, memory, memory)[0].squeeze(1)
    torch.testing.assert_close(found.mean(0), expected.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(found.T.cov(), expected.T.cov(), atol=0.02, rtol=0.05)
    assert found.std(0).min() > 0.02
    query, valid = torch.randn(2, 5, 8), torch.arange(6) < torch.tensor([[4], [6]])
    expected = plain.eval()(query, memory[:2], memory[:2], key_padding_mask=~valid)[0]
    torch.testing.assert_close(attend(plain, query, memory[:2], valid), expected, atol=1e-6, rtol=1e-5)
