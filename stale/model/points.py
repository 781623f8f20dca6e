"""Parallel heads, the class-agnostic point head (B videos, T snippets, D feature width, P points of all levels)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.config import PointsConfig


@dataclass(frozen=True)
class PointGrid:
    """The points over T snippets. Each level has half as many as the one before."""

    positions: Tensor  # (P,) in snippets; point i of a level of stride s lies at the center of snippet s · i
    strides: Tensor  # (P,) in snippets

    @classmethod
    def of(cls, num_snippets: int, levels: int, device: torch.device | None = None) -> "PointGrid":
        """The points of ``levels`` levels over ``num_snippets`` snippets."""
        indices = [torch.arange(0, num_snippets, 2**level, device=device) for level in range(levels)]
        strides = [torch.full_like(index, 2**level) for level, index in enumerate(indices)]
        return cls(torch.cat(indices) + 0.5, torch.cat(strides))

    def at_points(self, snippets: Tensor) -> Tensor:
        """Values of the snippets (B, T) at the points (B, P)."""
        return snippets[:, self.positions.long()]


@dataclass(frozen=True)
class Points:
    """What the points predict."""

    actionness: Tensor  # (B, P) logits
    distances: Tensor  # (B, P, 2) to start and end in snippets, above 0
    tiou: Tensor  # (B, P) logits of the predicted segment's tIoU with its instance
    grid: PointGrid

    def segments(self) -> Tensor:
        """Start and end (B, P, 2) in snippets."""
        return self.grid.positions.unsqueeze(1) + self.distances * self.distances.new_tensor([-1.0, 1.0])

    def scores(self) -> Tensor:
        """The quality (B, P) of the segments: actionness times the square of the predicted tIoU, which ranks better."""
        return self.actionness.sigmoid() * self.tiou.sigmoid().square()


class ConvBlock(nn.Module):
    """Convolution over time, LayerNorm over channels, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, inputs, T) and which snippets are valid (B, 1, T) → (B, outputs, T), 0 where they are not."""
        x = self.norm(self.conv(x).transpose(1, 2)).transpose(1, 2)
        return x.relu() * valid


class PointHead(nn.Module):
    """Embedding by convolutions, a pyramid by max pooling, and heads that all levels share."""

    mean: Tensor

    def __init__(self, width: int, config: PointsConfig) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden
        widths = [width, *[hidden] * config.layers]
        # Of the training features: CLIP's have most of their length in common, whose dropout would drown what differs.
        self.register_buffer("mean", torch.zeros(width))
        self.dropout = nn.Dropout(config.dropout)
        self.embed = nn.ModuleList(map(ConvBlock, widths[:-1], widths[1:]))
        self.pool = nn.MaxPool1d(3, stride=2, padding=1)
        self.classify = nn.ModuleList(ConvBlock(hidden, hidden) for _ in range(config.layers))
        self.regress = nn.ModuleList(ConvBlock(hidden, hidden) for _ in range(config.layers))
        self.actionness = nn.Conv1d(hidden, 1, 3, padding=1)
        self.boundaries = nn.Conv1d(hidden, 3, 3, padding=1)  # distances to start and end, tIoU
        self.scale = nn.Parameter(torch.ones(config.levels))
        nn.init.constant_(self.actionness.bias, -math.log(99))  # type: ignore[arg-type]  # few points are positive

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Points:
        """Features (B, T, D) → :class:`Points`; ``valid`` (B, T) is False for snippets that are padding."""
        grid = PointGrid.of(features.shape[1], self.config.levels, features.device)
        mask = features.new_ones(features.shape[:2]) if valid is None else valid.to(features.dtype)
        mask = mask.unsqueeze(1)  # B × 1 × T
        x = self.dropout(features - self.mean).transpose(1, 2) * mask  # B × D × T
        for block in self.embed:
            x = block(x, mask)
        actionness, boundaries = [], []
        for level in range(self.config.levels):
            if level:
                mask = mask[..., ::2]
                x = self.pool(x) * mask  # padding is 0, the lowest value after ReLU
            a = b = x
            for classify, regress in zip(self.classify, self.regress, strict=True):
                a, b = classify(a, mask), regress(b, mask)
            actionness.append(self.actionness(a).float().squeeze(1))
            b = self.boundaries(b).float()
            boundaries.append(torch.cat([F.softplus(b[:, :2] * self.scale[level]) * 2**level, b[:, 2:]], 1))
        distances, tiou = torch.cat(boundaries, 2).transpose(1, 2).split([2, 1], dim=2)
        return Points(torch.cat(actionness, 1), distances, tiou.squeeze(2), grid)
