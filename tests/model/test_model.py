"""STALE's components against slow, obvious versions of themselves, and the whole model put together."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.config import Config, ModelConfig, load_config
from stale.config import settings as all_settings
from stale.errors import StaleError
from stale.model.adaptation import CrossAdaptation
from stale.model.localizer import DynamicConv1d
from stale.model.masking import MaskFormerMask, apply_threshold
from stale.model.stale import Outputs, Stale, build_model
from stale.model.temporal import build_temporal_model
from tests.helpers import REPOSITORY, tiny_text_transformer

B, T, C, K = 3, 12, 64, 5
SMALL = ("localizer.hidden=8", "localizer.bank=2", "masking.queries=3", "masking.layers=1")


def settings(*assignments: str) -> ModelConfig:
    """The model's settings, ``assignments`` without their prefix ``model.``."""
    return load_config((), [f"model.{assignment}" for assignment in assignments]).model


def configured(*assignments: str, width: int = C) -> Stale:
    """A small model with the assigned settings."""
    torch.manual_seed(0)
    return build_model(settings(*SMALL, *assignments), T, width, tiny_text_transformer(num_tokens=8, layers=1))


def masked_model(*assignments: str) -> Stale:
    """A small model in evaluation mode that masks every third snippet, with an adaptation whose effect shows."""
    model = configured("adaptation.alpha=1", *assignments).eval()
    model.masking.forward = lambda visual, valid: torch.where(torch.arange(T) % 3 == 0, -2.0, 2.0).expand(B, T)
    return model


def random_input(seed: int = 1, width: int = C) -> tuple[Tensor, Tensor]:
    """Features (B, T, D) and text features (K, C)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, width, generator=generator), torch.randn(K, C, generator=generator)


def temporal_model(kind: str, layers: int = 1) -> nn.Module:
    return build_temporal_model(C, settings(f"temporal.kind={kind}", f"temporal.layers={layers}").temporal)


@torch.no_grad()
def test_dilated_convolutions_start_as_the_identity_and_double_their_reach() -> None:
    model, x = temporal_model("ms_tcn", layers=3).eval(), torch.randn(1, 21, C)
    torch.testing.assert_close(model(x), x)
    for layer in model:
        nn.init.normal_(layer.out.weight)  # as after training
    changed = x.clone()
    changed[:, 10] += 1
    moved = (model(changed) != model(x)).any(2)[0].nonzero().flatten().tolist()
    assert moved == list(range(10 - 7, 10 + 7 + 1)), "1 + 2 + 4 snippets on either side"


@torch.no_grad()
def test_the_transformer_starts_as_a_mean_of_its_input_and_has_context_without_position() -> None:
    model, x, order = temporal_model("transformer").eval(), torch.randn(B, T, C), torch.randperm(T)
    attention, mean = model[0].attention, torch.empty(B, T, C)
    query, key = attention.in_proj_weight[: 2 * C].split(C)
    for head in torch.arange(C).split(C // attention.num_heads):
        products = (x @ query[head].T) @ (x @ key[head].T).transpose(1, 2)  # B × T × T
        mean[:, :, head] = (products / math.sqrt(len(head))).softmax(2) @ x[:, :, head]
    torch.testing.assert_close(model(x), F.layer_norm(x + mean, (C,)), atol=1e-5, rtol=1e-5)
    nn.init.normal_(attention.out_proj.weight)  # as after training
    torch.testing.assert_close(model(x[:, order]), model(x)[:, order], atol=1e-5, rtol=1e-5)
    changed = x.clone()
    changed[:, -1] += 1
    assert (model(changed) - model(x))[:, :-1].abs().amax((0, 2)).min() > 1e-4, "each snippet attends to all others"


# Representation masking


def in_context(masking: MaskFormerMask, visual: Tensor) -> Tensor:
    """A video's snippets (T, C) after the convolutions, snippet by snippet, → (T, hidden)."""
    linear = masking.snippets.reduce[1]
    x = torch.stack([linear.weight @ snippet + linear.bias for snippet in visual])
    for convolution, norm, *_ in masking.snippets.blocks:
        mixed = torch.stack([convolution.bias] * T)
        for t in range(T):
            for offset in (-1, 0, 1):
                if 0 <= t + offset < T:
                    mixed[t] += convolution.weight[..., offset + 1] @ x[t + offset]
        mixed = (mixed - mixed.mean()) / (mixed.var(correction=0) + norm.eps).sqrt()  # of all snippets and channels
        x = x + (mixed * norm.weight + norm.bias).clamp(min=0)
    return x


@pytest.mark.parametrize(("blocks", "width"), [(0, C), (2, 32)])
@torch.no_grad()
def test_maskformer_equals_its_definition_query_by_query(blocks: int, width: int) -> None:
    torch.manual_seed(0)
    config = settings("masking.queries=6", f"masking.blocks={blocks}", "masking.hidden=32").masking
    masking, visual = MaskFormerMask(C, config).eval(), torch.randn(B, T, C)
    expected = torch.zeros(B, T)
    for b in range(B):
        snippets = in_context(masking, visual[b]) if blocks else visual[b]
        assert snippets.shape == (T, width)
        embedding = masking.embed(masking.decoder(masking.queries[None], snippets[None]))[0]
        for t in range(T):
            total = masking.weigh.bias[0]
            for q in range(6):
                L_q = 1 / (1 + math.exp(-float(embedding[q] @ snippets[t]) / math.sqrt(width)))
                total = total + masking.weigh.weight[0, q] * L_q
            expected[b, t] = total
    torch.testing.assert_close(masking(visual), expected, atol=1e-5, rtol=1e-5)
    assert expected.std(1).min() > 0, "snippets differ"


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
    mask = apply_threshold(foreground, settings("masking.threshold=0.55", f"masking.gradient={gradient}").masking)
    torch.testing.assert_close(mask, torch.tensor([values]))
    assert mask.requires_grad == (slope is not None)
    if slope is not None:
        mask.sum().backward()
        torch.testing.assert_close(foreground.grad, torch.tensor([slope]))


@torch.no_grad()
def test_the_mask_is_applied_to_classifier_and_text() -> None:
    model, (features, text) = masked_model("temporal.kind=none"), random_input()
    masked = torch.arange(T) % 3 == 0
    before = model(features, text)
    assert (before.class_logits[..., masked] == 0).all(), "a masked snippet is all zeros, so that its cosine is 0"
    assert (before.class_logits[..., ~masked] != 0).all()

    elsewhere = features.clone()
    elsewhere[:, masked] = torch.randn_like(elsewhere[:, masked])
    torch.testing.assert_close(model(elsewhere, text).class_logits, before.class_logits)
    torch.testing.assert_close(model(elsewhere, text).language, before.language)

    inside = features.clone()
    inside[:, 1] = torch.randn_like(inside[:, 1])
    after = model(inside, text).class_logits
    assert (after - before.class_logits)[..., 4].abs().min() > 1e-4, "foreground reaches other snippets through F_lan'"


# Cross-adaptation


def cross_adaptation(alpha: float, *assignments: str) -> CrossAdaptation:
    torch.manual_seed(0)
    return CrossAdaptation(C, settings(f"adaptation.alpha={alpha}", *assignments).adaptation).eval()


def slow_adaptation(adaptation: CrossAdaptation, language: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
    """F_lan' (K+1, C) of one video: the decoder sees its foreground and nothing else."""
    foreground = visual[mask > 0]
    change = adaptation.decoder(math.sqrt(C) * language[None], foreground[None])[0] / math.sqrt(C)
    if adaptation.gate:
        gate = torch.stack([F.cosine_similarity(row, foreground.mean(0), dim=0) for row in language])
        change = change * (gate - gate.mean())[:, None]
    return language + adaptation.alpha * change


@pytest.mark.parametrize("gate", ["true", "false"])
def test_the_text_differs_for_every_video_unless_alpha_is_zero(gate: str) -> None:
    language, visual = F.normalize(torch.randn(K + 1, C), dim=-1), torch.randn(B, T, C)
    mask = (torch.arange(T) % 3 != torch.arange(B)[:, None]).float()
    with torch.no_grad():
        torch.testing.assert_close(cross_adaptation(0)(language, visual, mask), language.expand(B, -1, -1))
        assert cross_adaptation(1)(language, visual, 0 * mask).isfinite().all(), "nothing passes the mask"
    adaptation = cross_adaptation(1, f"adaptation.gate={gate}")
    adapted = adaptation(language, visual, mask)
    assert adapted.shape == (B, K + 1, C)
    for b in range(B):
        torch.testing.assert_close(
            adapted[b], slow_adaptation(adaptation, language, visual[b], mask[b]), atol=1e-5, rtol=1e-5
        )
    assert (adapted[0] - adapted[1]).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(adaptation(language, visual[1:2], mask[1:2])[0], adapted[1], atol=1e-5, rtol=1e-5)
    adapted.square().sum().backward()
    assert adaptation.alpha.shape == (C,)
    assert (adaptation.alpha.grad != 0).all(), "α is learned for each channel"


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@torch.no_grad()
def test_dynamic_convolution_equals_one_convolution_per_video(kernel_size: int) -> None:
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


# The whole model


@torch.no_grad()
def test_the_forward_pass_equals_its_definition() -> None:
    model, (features, text) = masked_model("temperature=0.07"), random_input()
    outputs, mask = model(features, text), (torch.arange(T) % 3 != 0).float()
    for b in range(B):
        x = torch.stack([row / row.norm() * math.sqrt(C) for row in features[b]])
        visual = model.temporal(x[None])[0]
        language = torch.stack([row / row.norm() for row in [*text, model.background]])
        foreground = visual * mask[:, None]
        language = slow_adaptation(model.adaptation, language, visual, mask)
        torch.testing.assert_close(outputs.visual[b], visual, atol=1e-5, rtol=1e-5)
        for k in range(K + 1):
            for t in range(T):
                norm = max(float(foreground[t].norm()), 1e-8)
                expected = float(foreground[t] @ language[k]) / norm / float(language[k].norm()) / 0.07
                assert float(outputs.class_logits[b, k, t]) == pytest.approx(expected, abs=1e-4)
        torch.testing.assert_close(outputs.mask_logits[b], model.localizer(visual[None])[0], atol=1e-5, rtol=1e-5)


def check_finite(outputs: Outputs) -> None:
    assert all(values.isfinite().all() for values in (outputs.visual, outputs.class_logits, outputs.mask_logits))


def test_features_of_another_width_are_an_error_or_projected_and_heads_divide_it() -> None:
    with pytest.raises(StaleError, match="100 wide.*embedding is 64.*visual_projection"):
        configured(width=100)
    for section in ("temporal", "masking", "adaptation"):
        with pytest.raises(StaleError, match=f"model.{section}.heads"):
            configured(f"{section}.heads=7")
    with pytest.raises(StaleError, match="model.masking.heads is 8.*width 100"):
        configured("masking.hidden=100")
    configured("masking.heads=7", "masking.kind=none", "adaptation.heads=7", "adaptation.enabled=false")
    model = configured("visual_projection=true", width=100)
    outputs = model(*random_input(width=100))
    assert outputs.visual.shape == (B, T, C)
    outputs.mask_logits.sum().backward()
    assert model.projection.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_neither_other_videos_nor_the_scale_of_features_matter() -> None:
    model, (features, text) = configured().eval(), random_input()
    together = model(features, text)
    for b in range(B):
        alone = model(features[b : b + 1], text)
        torch.testing.assert_close(alone.class_logits[0], together.class_logits[b], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[b], atol=1e-4, rtol=1e-4)
    scaled = model(features * 10, text * 3)
    torch.testing.assert_close(scaled.class_logits, together.class_logits, atol=1e-2, rtol=1e-3)
    features[0, 3:5] = 0
    check_finite(model(features, text))


def test_a_snippet_of_zeros_does_not_explode_the_gradient() -> None:
    model, (features, text) = configured("temporal.kind=ms_tcn").eval(), random_input()
    features[:, 1] = 0
    model(features, text).class_logits.logsumexp(1).sum().backward()
    assert torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm() < 1e6


def test_bfloat16_autocast_is_finite_and_close() -> None:
    model, (features, text) = configured().eval(), random_input()
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


def test_the_method_page_lists_every_default_that_is_recalled() -> None:
    page = (REPOSITORY / "stale" / "README.md").read_text(encoding="utf-8")
    recalled = [key for key, field in all_settings(Config).items() if "[U]" in (field.description or "")]
    section = page.partition("defaults that are [U]")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`([a-z_]+\.[a-z_.]+)`", section)) == sorted(recalled)
    assert f"The {len(recalled)} defaults that are [U]" in page
