"""Class-agnostic representation masking (section 3): which snippets are foreground.

B videos, T snippets, C joint width, Q mask queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskFormerMask(nn.Module):
    """Foreground logits by a MaskFormer-style decoder: Q queries, each with its own mask, weighed at each location."""

    def __init__(self, width: int, queries: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.weigh = nn.Linear(queries, 1)
        self.scale = width**-0.5

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → foreground logits (B, T); their sigmoid is L."""
        queries = self.queries.expand(len(visual), -1, -1)
        embedding = self.embed(self.decoder(queries, visual))  # B_q: B × Q × C
        masks = torch.sigmoid(visual @ embedding.transpose(1, 2) * self.scale)  # L_q: B × T × Q
        return self.weigh(masks).squeeze(-1)  # W L_q + b: B × T


class ConvMask(nn.Module):
    """Foreground logits by a plain 1-D CNN (a row of the published ablation)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, 1, 3, padding=1))

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → foreground logits (B, T)."""
        return self.layers(visual.transpose(1, 2)).squeeze(1)


class ConvStackMask(nn.Module):
    """Foreground logits by residual convolutions on features of reduced width (ours).

    It knows neither the length of the video nor a place in it, so that it reads a video at any number of snippets;
    the dropout on the features themselves keeps it from recognising the seen classes.
    """

    def __init__(self, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden))
        self.blocks = nn.ModuleList(_conv_block(hidden, dropout) for _ in range(layers))
        self.score = nn.Conv1d(hidden, 1, 3, padding=1)

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → foreground logits (B, T)."""
        x = self.reduce(visual).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.score(x).squeeze(1)


def _conv_block(width: int, dropout: float) -> nn.Module:
    return nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.GroupNorm(1, width), nn.ReLU(), nn.Dropout(dropout))


def build_masking(
    kind: str, width: int, queries: int, layers: int, heads: int, hidden: int, dropout: float
) -> nn.Module | None:
    """``maskformer`` (paper), ``conv1d`` or ``conv_stack``; None for ``none``, and for ``gt``, whose mask is given."""
    if kind == "conv_stack":
        return ConvStackMask(width, hidden, layers, dropout)
    if kind == "maskformer":
        return MaskFormerMask(width, queries, layers, heads, dropout)
    return ConvMask(width) if kind == "conv1d" else None


def apply_threshold(foreground: Tensor, threshold: float, gradient: str) -> Tensor:
    """L (B, T) → the factor on the features, L_bin = L > threshold (paper).

    Args:
        gradient: ``hard`` stops it, ``straight_through`` passes it as if nothing were thresholded,
            ``soft`` uses L itself in place of L_bin.
    """
    if gradient == "soft":
        return foreground
    binary = (foreground > threshold).to(foreground.dtype)
    return binary + foreground - foreground.detach() if gradient == "straight_through" else binary
