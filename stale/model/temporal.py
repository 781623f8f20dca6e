"""Visual embedding (section 1): context over time for the snippets' features.

B videos, T snippets, C joint width.
"""

from __future__ import annotations

from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """Self-attention over time, residual and LayerNorm: the released code's block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        # Start from the features as CLIP made them: a random projection would pull them off the text space at once.
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.norm(x + self.dropout(self.attention(x, x, x, need_weights=False)[0]))


class TemporalConv(nn.Module):
    """The ablation's stand-in for attention: a convolution over time, residual and LayerNorm."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.norm(x + self.dropout(self.conv(x.transpose(1, 2)).transpose(1, 2).relu()))


def build_temporal_model(kind: str, width: int, layers: int, heads: int, dropout: float) -> nn.Module:
    """``transformer`` (paper, no positional encoding), ``conv`` or ``none``: (B, T, C) → (B, T, C)."""
    if kind == "none":
        return nn.Identity()
    if kind == "conv":
        return nn.Sequential(*(TemporalConv(width, dropout) for _ in range(layers)))
    return nn.Sequential(*(AttentionBlock(width, heads, dropout) for _ in range(layers)))
