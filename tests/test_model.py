"""STALE's components against slow, obvious versions of themselves, and the whole model put together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from tiny import text_tower_weights, tiny_tower
from torch import Tensor, nn
from torch.nn import functional as F

from stale.build import build_model
from stale.config import load_config
from stale.errors import StaleError
from stale.model.adaptation import CrossAdaptation
from stale.model.localizer import DynamicConv1d, MaskLocalizer, PlainConv1d, offsets_to_places
from stale.model.masking import ConvMask, MaskFormerMask, apply_threshold, build_masking
from stale.model.stale import Outputs, Stale
from stale.model.temporal import TemporalConv, build_temporal_model
from stale.model.text import TextEncoder, TextTower

B, T, C, K = 3, 12, 64, 5


class FixedMask(nn.Module):
    """Stands in for the masking: the same foreground logits whatever the video shows."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, visual: Tensor) -> Tensor:
        return self.logits.expand(visual.shape[:2])


def make_model(masking: nn.Module | None = None, temporal: str = "none", alpha: float = 1.0, **options) -> Stale:
    """A small model in evaluation mode, with an adaptation strong enough to be seen."""
    torch.manual_seed(0)
    return Stale(
        TextEncoder(tiny_tower(num_tokens=8, layers=1)),
        build_temporal_model(temporal, C, 1, 4, 0.0),
        masking,
        CrossAdaptation(C, heads=4, dropout=0.0, initial_alpha=alpha),
        MaskLocalizer(C, T, hidden=8, bank=2),
        feature_width=options.pop("feature_width", C),
        **options,
    ).eval()


def random_input(seed: int = 1, width: int = C) -> tuple[Tensor, Tensor]:
    """Features (B, T, D) and text features (K, C)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, width, generator=generator), torch.randn(K, C, generator=generator)


def language_of(model: Stale, features: Tensor, text: Tensor) -> Tensor:
    """F_lan' (B, K+1, C) as the classifier receives it."""
    received = []
    with pytest.MonkeyPatch.context() as patch:
        classify = model.classify
        patch.setattr(model, "classify", lambda *inputs: (received.append(inputs[2]), classify(*inputs))[1])
        model(features, text)
    return received[0]


# Temporal model


@pytest.mark.parametrize("kind", ["transformer", "conv", "none"])
def test_temporal_models_keep_the_shape_and_pass_gradient(kind: str) -> None:
    model = build_temporal_model(kind, C, 2, 4, 0.2)
    x = torch.randn(B, T, C, requires_grad=True)
    model(x).square().sum().backward()
    assert model(x).shape == (B, T, C)
    assert (x.grad.abs().sum(2) > 0).all()


@torch.no_grad()
def test_the_transformer_has_context_but_no_position() -> None:
    model = build_temporal_model("transformer", C, 1, 4, 0.2).eval()
    nn.init.normal_(model[0].attention.out_proj.weight)  # as training would; it starts at zero
    x, order = torch.randn(B, T, C), torch.randperm(T)
    torch.testing.assert_close(model(x[:, order]), model(x)[:, order], atol=1e-5, rtol=1e-5)
    changed = x.clone()
    changed[:, -1] += 1
    assert (model(changed) - model(x))[:, :-1].abs().amax((0, 2)).min() > 1e-4, "every snippet sees every other"


@torch.no_grad()
def test_the_transformer_starts_from_the_features_themselves() -> None:
    x = torch.randn(B, T, C)
    model = build_temporal_model("transformer", C, 1, 4, 0.2).eval()
    torch.testing.assert_close(model(x), nn.functional.layer_norm(x, (C,)))


@torch.no_grad()
def test_the_temporal_convolution_sees_its_neighbours_alone() -> None:
    model = build_temporal_model("conv", C, 1, 4, 0.0).eval()
    x = torch.randn(1, T, C)
    changed = x.clone()
    changed[:, 5] += 1
    reached = ((model(changed) - model(x)).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()
    assert reached == [4, 5, 6]


def test_without_a_temporal_model_nothing_happens() -> None:
    x = torch.randn(B, T, C)
    assert build_temporal_model("none", C, 1, 4, 0.2)(x) is x


# Representation masking


@torch.no_grad()
def test_maskformer_equals_its_definition_query_by_query() -> None:
    torch.manual_seed(0)
    masking = MaskFormerMask(C, queries=6, layers=2, heads=4, dropout=0.1).eval()
    visual = torch.randn(B, T, C)
    expected = torch.zeros(B, T)
    for b in range(B):
        embedding = masking.embed(masking.decoder(masking.queries[None], visual[b : b + 1]))[0]
        for t in range(T):
            total = masking.weigh.bias[0]
            for q in range(6):
                L_q = 1 / (1 + math.exp(-float(embedding[q] @ visual[b, t]) / math.sqrt(C)))
                total = total + masking.weigh.weight[0, q] * L_q
            expected[b, t] = total
    torch.testing.assert_close(masking(visual), expected, atol=1e-5, rtol=1e-5)
    assert expected.std(1).min() > 0, "locations differ"


def test_every_query_and_its_weight_is_used() -> None:
    torch.manual_seed(0)
    masking = MaskFormerMask(C, queries=20, layers=2, heads=4, dropout=0.0)
    masking(torch.randn(B, T, C)).square().sum().backward()
    assert masking.weigh.weight.shape == (1, 20)
    assert (masking.weigh.weight.grad != 0).all()
    assert (masking.queries.grad.abs().sum(1) > 0).all()


def test_kinds_of_masking() -> None:
    visual = torch.randn(B, T, C)
    assert isinstance(build_masking("maskformer", C, 4, 1, 4, 8, 0.0), MaskFormerMask)
    assert isinstance(build_masking("conv1d", C, 4, 1, 4, 8, 0.0), ConvMask)
    assert build_masking("none", C, 4, 1, 4, 8, 0.0) is None
    assert build_masking("conv1d", C, 4, 1, 4, 8, 0.0)(visual).shape == (B, T)


@pytest.mark.parametrize(
    ("gradient", "values", "slope"),
    [
        ("hard", [0.0, 0.0, 1.0, 1.0], None),
        ("straight_through", [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]),
        ("soft", [0.1, 0.55, 0.6, 0.9], [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_threshold_in_its_three_gradient_modes(gradient: str, values: list, slope: list | None) -> None:
    foreground = torch.tensor([[0.1, 0.55, 0.6, 0.9]], requires_grad=True)
    mask = apply_threshold(foreground, 0.55, gradient)
    torch.testing.assert_close(mask, torch.tensor([values]))
    if slope is None:
        assert not mask.requires_grad
    else:
        mask.sum().backward()
        torch.testing.assert_close(foreground.grad, torch.tensor([slope]))


def half_open() -> FixedMask:
    """Every third snippet is background."""
    return FixedMask(torch.where(torch.arange(T) % 3 == 0, -2.0, 2.0))


@torch.no_grad()
def test_the_mask_is_really_applied() -> None:
    model = make_model(half_open())
    features, text = random_input()
    masked = torch.arange(T) % 3 == 0
    before = model(features, text).class_logits
    assert (before[..., masked] == 0).all(), "a masked snippet is all zeros, so its cosine is 0"
    assert (before[..., ~masked] != 0).all()

    elsewhere = features.clone()
    elsewhere[:, masked] = torch.randn_like(elsewhere[:, masked])
    torch.testing.assert_close(model(elsewhere, text).class_logits, before)
    torch.testing.assert_close(language_of(model, elsewhere, text), language_of(model, features, text))

    inside = features.clone()
    inside[:, 1] = torch.randn_like(inside[:, 1])
    after = model(inside, text).class_logits
    assert (after - before)[..., 4].abs().min() > 1e-4, "what is not masked reaches others through the text"


@torch.no_grad()
def test_without_masking_every_snippet_counts() -> None:
    model = make_model(None)
    features, text = random_input()
    outputs = model(features, text)
    assert outputs.foreground_logits is None
    assert (outputs.class_logits != 0).all()


@torch.no_grad()
def test_the_threshold_is_the_models() -> None:
    features, text = random_input()
    opened = make_model(FixedMask(torch.full((T,), 0.5)), mask_threshold=0.5)(features, text)  # sigmoid 0.62
    closed = make_model(FixedMask(torch.full((T,), 0.5)), mask_threshold=0.7)(features, text)
    assert opened.class_logits.abs().max() > 0
    assert closed.class_logits.abs().max() == 0
    assert (closed.foreground_logits == 0.5).all()


@pytest.mark.parametrize("gradient", ["hard", "straight_through", "soft"])
def test_the_classifier_sends_gradient_into_the_mask_as_documented(gradient: str) -> None:
    logits = {}
    for mode in ("hard", gradient):
        model = make_model(half_open(), mask_gradient=mode)
        features, text = random_input()
        logits[mode] = model(features, text).class_logits
        model.zero_grad()
        logits[mode].softmax(1)[:, 0].sum().backward()
    reached = model.masking.logits.grad is not None and bool((model.masking.logits.grad != 0).all())
    assert reached == (gradient != "hard")
    same = torch.allclose(logits["hard"], logits[gradient], atol=1e-4)
    assert same == (gradient != "soft"), "straight-through changes the gradient alone"


@torch.no_grad()
def test_a_soft_mask_scales_the_cosine() -> None:
    features, text = random_input()
    model = make_model(FixedMask(torch.linspace(-2, 2, T)), mask_gradient="soft", alpha=0.0)
    unmasked = make_model(None, alpha=0.0)
    expected = unmasked(features, text).class_logits * torch.linspace(-2, 2, T).sigmoid()
    torch.testing.assert_close(model(features, text).class_logits, expected, atol=1e-4, rtol=1e-4)


# Cross-adaptation


@torch.no_grad()
def test_alpha_zero_leaves_the_text_alone() -> None:
    adaptation = CrossAdaptation(C, 4, 0.1, initial_alpha=0.0).eval()
    language, foreground = torch.randn(K + 1, C), torch.randn(B, T, C)
    torch.testing.assert_close(adaptation(language, foreground), language.expand(B, -1, -1))


@torch.no_grad()
def test_the_text_differs_for_every_video() -> None:
    adaptation = CrossAdaptation(C, 4, 0.1, initial_alpha=0.1).eval()
    language, foreground = torch.randn(K + 1, C), torch.randn(B, T, C)
    adapted = adaptation(language, foreground)
    assert adapted.shape == (B, K + 1, C)
    assert (adapted[0] - adapted[1]).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(adaptation(language, foreground[1:2])[0], adapted[1], atol=1e-5, rtol=1e-5)


def test_alpha_is_learned_for_each_channel() -> None:
    adaptation = CrossAdaptation(C, 4, 0.0, initial_alpha=1e-3)
    assert adaptation.alpha.shape == (C,)
    adaptation(torch.randn(K, C), torch.randn(B, T, C)).square().sum().backward()
    assert (adaptation.alpha.grad != 0).all()


@torch.no_grad()
def test_the_model_hands_every_video_its_own_text() -> None:
    features, text = random_input()
    own = language_of(make_model(half_open()), features, text)
    assert (own[0] - own[1]).abs().max() > 1e-3
    shared = language_of(make_model(half_open(), alpha=0.0), features, text)
    torch.testing.assert_close(shared[0], shared[1])


# Localizer


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@torch.no_grad()
def test_dynamic_convolution_equals_one_convolution_a_video(kernel_size: int) -> None:
    torch.manual_seed(0)
    inputs, outputs, bank = 6, 7, 4
    layer = DynamicConv1d(inputs, outputs, kernel_size, bank)
    layer.attention[-1].bias.copy_(torch.randn(bank))
    x = torch.randn(B, inputs, T)
    for video, result in zip(x, layer(x), strict=True):
        mixture = layer.attention(video.mean(1)).softmax(0)
        kernel, bias = torch.zeros(outputs, inputs, kernel_size), torch.zeros(outputs)
        for share, weight, offset in zip(mixture, layer.weight, layer.bias, strict=True):
            kernel += share * weight.view(outputs, inputs, kernel_size)
            bias += share * offset
        expected = F.conv1d(video[None], kernel, bias, padding=kernel_size // 2)[0]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mixture_depends_on_the_video() -> None:
    torch.manual_seed(0)
    layer = DynamicConv1d(6, 7, 1, 4)
    x = torch.randn(1, 6, T)
    together = layer(torch.cat([x, x + 3], 2))[..., :T]  # the same places in a longer video with another mean
    assert (together - layer(x)).abs().max() > 1e-3


def test_every_kernel_of_the_bank_learns() -> None:
    layer = DynamicConv1d(6, 7, 3, 4)
    layer(torch.randn(B, 6, T)).square().sum().backward()
    assert (layer.weight.grad.abs().amax((1, 2)) > 0).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.attention.parameters())


def test_offsets_to_places_equals_loops() -> None:
    offsets = torch.randn(B, 2 * T - 1, T)
    places = offsets_to_places(offsets)
    for s in range(T):
        for t in range(T):
            assert torch.equal(places[:, s, t], offsets[:, T - 1 + (s - t), t])


@pytest.mark.parametrize("kind", ["dynamic", "plain"])
@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
@pytest.mark.parametrize("layers", [1, 3])
def test_localizers_give_a_mask_for_every_snippet(kind: str, coordinates: str, layers: int) -> None:
    localizer = MaskLocalizer(C, T, kind, coordinates, hidden=8, layers=layers, bank=2)
    assert len(localizer.layers) == layers
    assert all(isinstance(layer, DynamicConv1d) == (kind == "dynamic") for layer in localizer.layers)
    logits = localizer(torch.randn(B, T, C))
    assert logits.shape == (B, T, T)
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in localizer.parameters())


@torch.no_grad()
def test_a_column_belongs_to_its_snippet() -> None:
    """With plain convolutions of size 1, what snippet 5 shows can change column 5 alone."""
    torch.manual_seed(0)
    localizer = MaskLocalizer(C, T, "plain", "absolute", hidden=8, kernel_size=1)
    localizer.norms = nn.ModuleList([nn.Identity(), nn.Identity()])  # they look at the whole video
    visual = torch.randn(1, T, C)
    changed = visual.clone()
    changed[:, 5] += 1
    difference = (localizer(changed) - localizer(visual)).abs().amax((0, 1))
    assert (difference > 1e-6).nonzero().flatten().tolist() == [5]


@torch.no_grad()
def test_relative_masks_move_with_the_video() -> None:
    torch.manual_seed(0)
    localizer = MaskLocalizer(C, T, "plain", "relative", hidden=8)
    visual = torch.zeros(1, T, C)
    visual[:, 4:6] = torch.randn(2, C)
    first, second = localizer(visual), localizer(visual.roll(1, dims=1))
    torch.testing.assert_close(first[0, 3:7, 4], second[0, 4:8, 5])


# The whole model


@torch.no_grad()
def test_the_forward_pass_equals_its_definition() -> None:
    model = make_model(half_open(), temporal="transformer", temperature=0.07)
    features, text = random_input()
    outputs = model(features, text)
    mask = (torch.arange(T) % 3 != 0).float()
    for b in range(B):
        x = torch.stack([row / row.norm() * math.sqrt(C) for row in features[b]])
        visual = model.temporal(x[None])[0]
        language = torch.stack([row / row.norm() for row in [*text, model.background]])
        foreground = visual * mask[:, None]
        language = language + model.adaptation.alpha * model.adaptation.decoder(language[None], foreground[None])[0]
        torch.testing.assert_close(outputs.visual[b], visual, atol=1e-5, rtol=1e-5)
        for k in range(K + 1):
            for t in range(T):
                norm = max(float(foreground[t].norm()), 1e-8)
                expected = float(foreground[t] @ language[k]) / norm / float(language[k].norm()) / 0.07
                assert float(outputs.class_logits[b, k, t]) == pytest.approx(expected, abs=1e-4)
        torch.testing.assert_close(outputs.mask_logits[b], model.localizer(visual[None])[0], atol=1e-5, rtol=1e-5)


def configured(*assignments: str, width: int = C) -> Stale:
    """A model as the configuration builds it."""
    torch.manual_seed(0)
    small = ["model.localizer.hidden=8", "model.masking.queries=3", "model.masking.layers=1"]
    return build_model(load_config((), [*small, *assignments]).model, T, width, tiny_tower(num_tokens=8, layers=1))


def check_finite(outputs: Outputs) -> None:
    assert outputs.visual.isfinite().all()
    assert outputs.class_logits.isfinite().all()
    assert outputs.mask_logits.isfinite().all()


@pytest.mark.parametrize(
    ("assignment", "took_effect"),
    [
        ("model.temporal.kind=conv", lambda model: isinstance(model.temporal[0], TemporalConv)),
        ("model.temporal.kind=none", lambda model: isinstance(model.temporal, nn.Identity)),
        ("model.masking.kind=conv1d", lambda model: isinstance(model.masking, ConvMask)),
        ("model.masking.kind=none", lambda model: model.masking is None),
        ("model.masking.queries=7", lambda model: len(model.masking.queries) == 7),
        ("model.masking.threshold=0.3", lambda model: model.mask_threshold == 0.3),
        ("model.masking.gradient=soft", lambda model: model.mask_gradient == "soft"),
        ("model.adaptation.enabled=false", lambda model: model.adaptation is None),
        ("model.adaptation.alpha=0.2", lambda model: (model.adaptation.alpha == 0.2).all()),
        ("model.localizer.kind=plain", lambda model: isinstance(model.localizer.layers[0], PlainConv1d)),
        ("model.localizer.coordinates=relative", lambda model: model.localizer.coordinates == "relative"),
        ("model.text.prompt=template", lambda model: model.text.context is None),
        ("model.text.context_tokens=3", lambda model: len(model.text.context) == 3),
        ("model.text.encoder=frozen", lambda model: not model.text.tower.text_projection.requires_grad),
        ("model.visual_projection=true", lambda model: isinstance(model.projection, nn.Linear)),
        ("model.temperature=0.5", lambda model: model.temperature == 0.5),
    ],
)
def test_every_switch_builds_a_model_that_runs(assignment: str, took_effect: Callable[[Stale], bool]) -> None:
    model = configured(assignment)
    assert took_effect(model)
    assert not took_effect(configured())
    outputs = model(*random_input())
    check_finite(outputs)
    assert outputs.class_logits.shape == (B, K + 1, T)
    assert outputs.mask_logits.shape == (B, T, T)
    (outputs.class_logits.sum() + outputs.mask_logits.sum()).backward()


def test_features_of_another_width_are_an_error_or_projected() -> None:
    with pytest.raises(StaleError, match="100 wide.*embedding is 64.*visual_projection"):
        configured(width=100)
    model = configured("model.visual_projection=true", width=100)
    outputs = model(*random_input(width=100))
    assert outputs.visual.shape == (B, T, C)
    outputs.class_logits.sum().backward()
    assert model.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("section", ["temporal", "masking", "adaptation"])
def test_heads_that_do_not_divide_the_width_are_an_error(section: str) -> None:
    with pytest.raises(StaleError, match=f"model.{section}.heads"):
        configured(f"model.{section}.heads=7")


def test_the_embedding_width_may_differ_from_the_towers() -> None:
    weights = text_tower_weights(output_width=32, num_tokens=8, layers=1)
    del weights["logit_scale"]
    model = build_model(load_config((), ["model.localizer.hidden=8"]).model, T, 32, TextTower.from_weights(weights))
    assert model(torch.randn(B, T, 32), torch.randn(K, 32)).class_logits.shape == (B, K + 1, T)


@torch.no_grad()
def test_videos_of_a_batch_do_not_touch_each_other() -> None:
    model = configured().eval()
    features, text = random_input()
    together = model(features, text)
    for b in range(B):
        alone = model(features[b : b + 1], text)
        torch.testing.assert_close(alone.class_logits[0], together.class_logits[b], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[b], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_scale_of_the_features_does_not_matter() -> None:
    model = configured().eval()
    features, text = random_input()
    torch.testing.assert_close(
        model(features * 10, text * 3).class_logits, model(features, text).class_logits, atol=1e-2, rtol=1e-3
    )


@torch.no_grad()
def test_a_snippet_of_zeros_is_finite() -> None:
    features, text = random_input()
    features[0, 3:5] = 0
    check_finite(configured().eval()(features, text))


def test_bfloat16_autocast_is_finite_and_close() -> None:
    model = configured().eval()
    features, text = random_input()
    model.masking.weigh.bias.data.fill_(3.0)  # nothing masked
    exact = model(features, text)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(features, text)
    check_finite(rough)
    (rough.class_logits.float().logsumexp(1).sum() + rough.mask_logits.float().sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert exact.class_logits.abs().max() > 20
    assert rough.class_logits.dtype == torch.float32, "divided by τ, bfloat16 is too coarse"
    assert (rough.class_logits - exact.class_logits).abs().max() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cpu_and_gpu_agree() -> None:
    model = configured("model.localizer.coordinates=relative").eval()
    features, text = random_input()
    on_gpu = copy.deepcopy(model).cuda()
    slow, fast = model(features, text), on_gpu(features.cuda(), text.cuda())
    for name in ("visual", "class_logits", "mask_logits", "foreground_logits"):
        torch.testing.assert_close(getattr(fast, name).cpu(), getattr(slow, name), atol=5e-3, rtol=1e-3, msg=name)
