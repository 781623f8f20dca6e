"""Vision-language cross-adaptation: the foreground of each video adapts the text features to it.

B videos, T snippets, K + 1 classes with the background, C joint width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stale.config import AdaptationConfig


class CrossAdaptation(nn.Module):
    """F_lan' = F_lan + α · T_c(F_lan, F_fg, F_fg) [P]; α starts small, so that the text features survive [U].

    Without ``config.residual``, F_lan' = T_c(F_lan, F_fg, F_fg) [C].
    """

    def __init__(self, width: int, config: AdaptationConfig) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(width, config.heads, 4 * width, config.dropout, batch_first=True)
        self.alpha = nn.Parameter(torch.full((width,), config.alpha)) if config.residual else None

    def forward(self, language: Tensor, foreground: Tensor) -> Tensor:
        """F_lan (K+1, C) and F_fg (B, T, C) → F_lan' (B, K+1, C)."""
        language = language.expand(len(foreground), -1, -1)
        adapted = self.decoder(language, foreground)
        return adapted if self.alpha is None else language + self.alpha * adapted
