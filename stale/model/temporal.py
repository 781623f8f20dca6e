"""Visual embedding, the temporal model (B videos, T snippets, C joint width)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.config import TemporalConfig


class AttentionBlock(nn.Module):
    """Self-attention over time without positional encoding, residual and LayerNorm: the released code's block [C]."""

    def __init__(self, width: int, config: TemporalConfig) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, config.heads, dropout=config.dropout, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width)
        pass_values_through(self.attention)  # [ours]: a random projection would leave the space of CLIP's text

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.norm(x + self.dropout(attend(self.attention, x, x, valid)))


class TemporalConv(nn.Module):
    """Convolution over time, residual, LayerNorm; with ``dilation`` a layer of MS-TCN (Farha and Gall, CVPR 2019)."""

    def __init__(self, width: int, config: TemporalConfig, dilation: int = 0) -> None:
        super().__init__()
        padding = max(dilation, 1)
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=padding, dilation=padding)
        self.out = nn.Conv1d(width, width, kernel_size=1) if dilation else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)  # start as the identity [ours], as AttentionBlock does
        self.norm = nn.Identity() if dilation else nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        padded = x if valid is None else x * valid.unsqueeze(2)
        convolved = self.out(self.conv(padded.transpose(1, 2)).relu()).transpose(1, 2)
        return self.norm(x + self.dropout(convolved))


class TemporalModel(nn.Sequential):
    """Blocks one after the other; without any, the features stay as they are."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, C) → (B, T, C); ``valid`` (B, T) is False for snippets that are padding."""
        for block in self:
            x = block(x, valid)
        return x


def build_temporal_model(width: int, config: TemporalConfig) -> TemporalModel:
    """Build the temporal model ``config.kind``: (B, T, C) → (B, T, C)."""
    if config.kind == "none":
        return TemporalModel()
    if config.kind == "transformer":
        return TemporalModel(*(AttentionBlock(width, config) for _ in range(config.layers)))
    dilations = [2**layer if config.kind == "ms_tcn" else 0 for layer in range(config.layers)]
    return TemporalModel(*(TemporalConv(width, config, dilation) for dilation in dilations))


def attend(attention: nn.MultiheadAttention, query: Tensor, memory: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention of queries (B or 1, Q, C) to memory (B, T, C), with the weights of ``attention`` → (B, Q, C).

    ``valid`` (B, T) is False for what is not attended to; at least one in each video is True. In training, dropout
    takes values out for all queries, in place of weights of each, which needs no Q × T map of each head.
    """
    (B, _, C), heads, p = memory.shape, attention.num_heads, attention.dropout
    weight, bias = attention.in_proj_weight.split([C, 2 * C]), attention.in_proj_bias.split([C, 2 * C])
    q = F.linear(query, weight[0], bias[0]).expand(B, -1, -1).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = F.linear(memory, weight[1], bias[1]).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # B × heads × T × …
    v = F.dropout1d(v.flatten(0, 1), p, attention.training).unflatten(0, (B, heads))
    mask = None if valid is None else valid.view(B, 1, 1, -1)
    return attention.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def pass_values_through(attention: nn.MultiheadAttention) -> None:
    """Initialize value and output projections as the identity: attention starts as a weighted mean of its values."""
    width = attention.embed_dim
    with torch.no_grad():
        attention.in_proj_weight[2 * width :].copy_(torch.eye(width))
        attention.out_proj.weight.copy_(torch.eye(width))
