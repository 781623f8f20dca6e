"""Class-agnostic representation masking: which snippets are foreground.

B videos, T snippets, C joint width, Q mask queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stale.config import MaskingConfig


class SnippetDecoder(nn.Module):
    """Residual 1-D convolutions on features of reduced width: local context for the foreground [ours].

    It depends neither on the number of snippets nor on their position. The dropout on the features themselves prevents
    it from memorizing the seen classes.
    """

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

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → (B, T, hidden)."""
        x = self.reduce(visual).transpose(1, 2)  # B × hidden × T
        for block in self.blocks:
            x = x + block(x)
        return x.transpose(1, 2)


class MaskFormerMask(nn.Module):
    """Foreground logits by MaskFormer: Q queries with a mask each, weighed at every snippet [P].

    As MaskFormer's pixel decoder does for pixels, a :class:`SnippetDecoder` gives the snippets their context
    [ours]; with ``blocks=0`` the queries meet F_vis itself.
    """

    def __init__(self, width: int, config: MaskingConfig) -> None:
        super().__init__()
        self.snippets = SnippetDecoder(width, config) if config.blocks else nn.Identity()
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

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → foreground logits (B, T); their sigmoid is L."""
        snippets = self.snippets(visual)  # B × T × hidden
        queries = self.queries.expand(len(snippets), -1, -1)  # B × Q × hidden
        embedding = self.embed(self.decoder(queries, snippets))  # B_q: B × Q × hidden
        masks = torch.sigmoid(snippets @ embedding.transpose(1, 2) * self.scale)  # L_q: B × T × Q
        return self.weigh(masks).squeeze(-1)  # W L_q + b: B × T


class ConvMask(nn.Module):
    """Foreground logits by a plain 1-D CNN: a row of the published ablation [P]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, 1, 3, padding=1))

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → foreground logits (B, T)."""
        return self.layers(visual.transpose(1, 2)).squeeze(1)


def build_masking(width: int, config: MaskingConfig) -> nn.Module | None:
    """Build the mask predictor ``config.kind``; None for ``none``, and for ``gt``, whose mask is given."""
    if config.kind == "maskformer":
        return MaskFormerMask(width, config)
    return ConvMask(width) if config.kind == "conv1d" else None


def apply_threshold(foreground: Tensor, config: MaskingConfig) -> Tensor:
    """L (B, T) → the factor on the features (B, T), L_bin = L > θ_bin [P, U].

    ``config.gradient`` decides how gradient passes: ``hard`` stops it, ``straight_through`` passes it as if nothing
    were thresholded, ``soft`` uses L itself in place of L_bin.
    """
    if config.gradient == "soft":
        return foreground
    binary = (foreground > config.threshold).to(foreground.dtype)
    return binary + foreground - foreground.detach() if config.gradient == "straight_through" else binary
