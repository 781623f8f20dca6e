"""The text side: prompts cut to what they need against 77 tokens each, and a fixed vocabulary encoded once.

K classes, L tokens, W width of the tower, C joint width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.benchmarks.models import Size, random_encoder, random_phrases
from scripts.benchmarks.rows import Row, best_of, clock_of, require_equal
from stale.model.text import Prompts, ResidualBlock, TextEncoder
from stale.training.objective import Objective


@torch.no_grad()
def bench(scale: float, device: torch.device) -> Iterator[Row]:
    """The 50 unseen classes of ActivityNet 75/25, in CLIP's 77 tokens and in as many as they need."""
    size = Size.scaled(scale, classes=50)
    yield _trimmed("learned", "16 learned context tokens", size, device)
    yield _trimmed("template", "a fixed template", size, device)
    yield _kept(size, device)


def _trimmed(prompt: str, what: str, size: Size, device: torch.device) -> Row:
    encoder, clock = random_encoder(size, prompt).to(device), clock_of(device)
    prompts = encoder.tokenize(random_phrases(size.classes)).to(device)
    padded = pad_prompts(encoder, prompts)
    require_equal(f"text: features of {what}", encoder(prompts).cpu(), plain_text(encoder, padded).cpu(), 1e-4)
    plain = best_of(lambda: plain_text(encoder, padded), 2, clock)
    ours = best_of(lambda: encoder(prompts), 5, clock)
    return Row(f"text: {what}, 77 tokens against trimmed", plain, ours, f"{size}, {_length(encoder, prompts)} tokens")


def _kept(size: Size, device: torch.device, steps: int = 10) -> Row:
    """A frozen encoder's template, encoded at every training step and once."""
    encoder, clock = random_encoder(size, "template").requires_grad_(False).to(device), clock_of(device)
    prompts = encoder.tokenize(random_phrases(size.classes)).to(device)
    anything = torch.empty(0, device=device)

    def train_text() -> Tensor:
        objective = Objective(_TextAlone(encoder), lambda text, *_: (text, {}), prompts, torch.float32)
        return [objective(anything, None, None)[0] for _ in range(steps)][-1]

    require_equal("text: features kept", train_text().cpu(), encoder(prompts).cpu(), 1e-6)
    plain, ours = best_of(lambda: encoder(prompts), 3, clock), best_of(train_text, 3, clock)
    of_steps = f"{size}, {steps} steps (plain: one, scaled up)"
    return Row("text: fixed prompts encoded at each step against once", plain * steps, ours, of_steps)


class _TextAlone(nn.Module):
    """Stands in for STALE where its text side alone is measured."""

    mask_given = False

    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, features: Tensor, text: Tensor, given_mask: Tensor | None) -> Tensor:
        """The text features as they are given."""
        return text


def pad_prompts(encoder: TextEncoder, prompts: Prompts) -> Prompts:
    """The prompts filled up with zeros to the context length of the tower, as CLIP's tokenizer does."""
    missing = encoder.tower.context_length - _length(encoder, prompts)
    return Prompts(F.pad(prompts.tokens, (0, missing)), prompts.end)


def plain_text(encoder: TextEncoder, prompts: Prompts) -> Tensor:
    """Text features (K, C) as CLIP and CoOp have them: the whole context, the sequence first, a mask of its own.

    Args:
        prompts: of :func:`pad_prompts`.
    """
    tower = encoder.tower
    x, end = tower.embed(prompts.tokens), prompts.end
    if encoder.context is not None:
        context = encoder.context.expand(len(x), -1, -1)
        x, end = torch.cat([x[:, :1], context, x[:, 1:]], dim=1), end + len(encoder.context)
    x = (x + tower.positional_embedding).transpose(0, 1)  # L × K × W
    mask = torch.full((len(x), len(x)), -torch.inf, device=x.device).triu(1)
    for block in tower.transformer["resblocks"]:
        x = x + _plain_attention(block, block.ln_1(x), mask)
        x = x + block.mlp(block.ln_2(x))
    x = tower.ln_final(x.transpose(0, 1))  # K × L × W
    return x[torch.arange(len(x), device=x.device), end] @ tower.text_projection


def _plain_attention(block: ResidualBlock, x: Tensor, mask: Tensor) -> Tensor:
    """nn.MultiheadAttention's way through the block's weights."""
    its, projection = block.attn, block.attn.out_proj
    return F.multi_head_attention_forward(
        *(x, x, x, x.shape[2], its.heads, its.in_proj_weight, its.in_proj_bias, None, None, False, 0.0),
        *(projection.weight, projection.bias),
        need_weights=False,
        attn_mask=mask,
    )[0]


def _length(encoder: TextEncoder, prompts: Prompts) -> int:
    return prompts.tokens.shape[1] + (0 if encoder.context is None else len(encoder.context))
