"""Class-agnostic representation masking (B videos, T snippets, C joint width, Q mask queries)."""

import torch
from torch import Tensor, nn

from stale.config import MaskingConfig


class SnippetDecoder(nn.Module):
    """Residual 1-D convolutions; dropout on the features keeps it from memorizing the seen classes [ours]."""

    def __init__(self, width: int, config: MaskingConfig) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Dropout(config.feature_dropout), nn.Linear(width, config.hidden))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(config.hidden, config.hidden, 3, padding=1),
                nn.GroupNorm(1, config.hidden),
                nn.ReLU(),
                nn.Dropout(config.feature_dropout),
            )
            for _ in range(config.blocks)
        )

    def forward(self, visual: Tensor, valid: Tensor | None = None) -> Tensor:
        """F_vis (B, T, C) → (B, T, hidden)."""
        x = _without_padding(self.reduce(visual).transpose(1, 2), valid)  # B × hidden × T
        for block in self.blocks:
            y = x
            for layer in block.children():
                y = _normalize_valid(layer, y, valid) if isinstance(layer, nn.GroupNorm) else layer(y)
            x = _without_padding(x + y, valid)
        return x.transpose(1, 2)


class MaskFormerMask(nn.Module):
    """Foreground logits by MaskFormer [P]: Q queries with a mask each, on a :class:`SnippetDecoder` or F_vis itself."""

    def __init__(self, width: int, config: MaskingConfig) -> None:
        super().__init__()
        self.snippets = SnippetDecoder(width, config) if config.blocks else None
        width = config.hidden if config.blocks else width
        self.queries = nn.Parameter(torch.randn(config.queries, width))
        layer = nn.TransformerDecoderLayer(width, config.heads, 4 * width, config.dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, config.layers)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.weigh = nn.Linear(config.queries, 1)
        self.scale = width**-0.5
        if config.open_start:  # L starts at about 0.6 everywhere and can reach 0.18 and 0.92, whatever the seed
            nn.init.constant_(self.weigh.weight, 4 / config.queries)
            nn.init.constant_(self.weigh.bias, -1.5)

    def forward(self, visual: Tensor, valid: Tensor | None = None) -> Tensor:
        """F_vis (B, T, C) → foreground logits (B, T); their sigmoid is L. ``valid`` (B, T) is False for padding."""
        snippets = visual if self.snippets is None else self.snippets(visual, valid)  # B × T × hidden
        queries, padding = self.queries.expand(len(snippets), -1, -1), None if valid is None else ~valid
        embedding = self.embed(self.decoder(queries, snippets, memory_key_padding_mask=padding))  # B_q: B × Q × hidden
        masks = torch.sigmoid(snippets @ embedding.transpose(1, 2) * self.scale)  # L_q: B × T × Q
        return self.weigh(masks).squeeze(-1)  # W L_q + b: B × T


class ConvMask(nn.Module):
    """Foreground logits by a plain 1-D CNN: a row of the published ablation [P]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, 1, 3, padding=1))

    def forward(self, visual: Tensor, valid: Tensor | None = None) -> Tensor:
        """F_vis (B, T, C) → foreground logits (B, T)."""
        x = visual.transpose(1, 2)
        for layer in self.layers:
            x = layer(_without_padding(x, valid))
        return x.squeeze(1)


def _without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, channels, T) with 0 where ``valid`` (B, T) is False, as a convolution pads the end of a video."""
    return x if valid is None else x * valid.unsqueeze(1)


def _normalize_valid(norm: nn.GroupNorm, x: Tensor, valid: Tensor | None) -> Tensor:
    """``norm`` of a single group on (B, channels, T), with mean and variance over the valid snippets."""
    if valid is None:
        return norm(x)
    inside = valid.unsqueeze(1)  # B × 1 × T
    count = inside.sum((1, 2), keepdim=True) * x.shape[1]
    centered = x - (x * inside).sum((1, 2), keepdim=True) / count
    variance = (centered.square() * inside).sum((1, 2), keepdim=True) / count
    return centered * (variance + norm.eps).rsqrt() * norm.weight.unsqueeze(1) + norm.bias.unsqueeze(1)


def build_masking(width: int, config: MaskingConfig) -> nn.Module | None:
    """Build the mask predictor ``config.kind``; None for ``none``, and for ``gt``, whose mask is given."""
    if config.kind == "maskformer":
        return MaskFormerMask(width, config)
    return ConvMask(width) if config.kind == "conv1d" else None


def apply_threshold(foreground: Tensor, config: MaskingConfig) -> Tensor:
    """L (B, T) → the factor on the features (B, T), L_bin = L > θ_bin [P, U]; L itself with ``gradient=soft``."""
    if config.gradient == "soft":
        return foreground
    binary = (foreground > config.threshold).to(foreground.dtype)
    return binary + (foreground - foreground.detach()) if config.gradient == "straight_through" else binary
