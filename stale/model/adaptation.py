"""Vision-language cross-adaptation (section 4): text features that differ for every video.

B videos, T snippets, K + 1 classes with the background, C joint width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossAdaptation(nn.Module):
    """``F_lan + α · T_c(F_lan, F_fg, F_fg)``; α starts small, so that the language prior survives."""

    def __init__(self, width: int, heads: int, dropout: float, initial_alpha: float) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout, batch_first=True)
        self.alpha = nn.Parameter(torch.full((width,), initial_alpha))

    def forward(self, language: Tensor, foreground: Tensor) -> Tensor:
        """F_lan (K+1, C) and F_fg (B, T, C) → F_lan' (B, K+1, C)."""
        language = language.expand(len(foreground), -1, -1)
        return language + self.alpha * self.decoder(language, foreground)
