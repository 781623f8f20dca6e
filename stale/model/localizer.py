"""Parallel heads, the action mask localizer: for every snippet, a mask over the whole video.

B videos, T snippets, C joint width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.config import LocalizerConfig


class DynamicConv1d(nn.Module):
    """Convolution with a mixture of a bank of kernels, mixed by attention on the input (Chen et al., CVPR 2020)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, bank: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        kernels = [nn.Conv1d(inputs, outputs, kernel_size) for _ in range(bank)]  # for their initialization only
        self.weight = nn.Parameter(torch.stack([kernel.weight.detach().flatten(1) for kernel in kernels]))
        self.bias = nn.Parameter(torch.stack([kernel.bias.detach() for kernel in kernels]))  # type: ignore[union-attr]
        hidden = max(inputs // 4, bank)
        self.attention = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, bank))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, T) → (B, outputs, T)."""
        mixture = self.attention(x.mean(2)).softmax(1)  # B × bank
        weight = torch.einsum("bk,koi->boi", mixture, self.weight)  # B × outputs × inputs·kernel
        bias = mixture @ self.bias  # B × outputs
        windows = F.unfold(x.unsqueeze(2), (1, self.kernel_size), padding=(0, self.kernel_size // 2))
        return torch.baddbmm(bias.unsqueeze(2), weight, windows)


class MaskLocalizer(nn.Module):
    """M = sigmoid(H_m(F_vis)): a stack of 1-D convolutions whose output channels are positions in the video.

    With ``absolute`` coordinates [P] channel s of column t tells whether snippet s belongs to the instance at t. A
    convolution computes the same at every t, so that it must infer t from the features. With ``relative`` coordinates
    [ours] channel o tells it of snippet t + o, and the column is then shifted into position.
    """

    def __init__(self, width: int, num_snippets: int, config: LocalizerConfig) -> None:
        super().__init__()
        self.num_snippets, self.coordinates = num_snippets, config.coordinates

        def conv(inputs: int, outputs: int) -> nn.Module:
            if config.kind == "dynamic":
                return DynamicConv1d(inputs, outputs, config.kernel_size, config.bank)
            return nn.Conv1d(inputs, outputs, config.kernel_size, padding=config.kernel_size // 2)  # [C]

        outputs = num_snippets if config.coordinates == "absolute" else 2 * num_snippets - 1
        widths = [width, *[config.hidden] * (config.layers - 1), outputs]
        self.layers = nn.ModuleList(map(conv, widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:-1])  # else 15 epochs are too few

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → mask logits (B, T, T); [:, :, t] is the mask that snippet t predicts."""
        x = visual.transpose(1, 2)  # B × C × T
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = norm(layer(x)).relu()  # B × hidden × T
        logits = self.layers[-1](x)  # B × T × T, or B × 2T-1 × T
        return logits if self.coordinates == "absolute" else offsets_to_positions(logits)


def offsets_to_positions(offsets: Tensor) -> Tensor:
    """(B, 2T-1, T) with [:, T-1+o, t] about snippet t + o → (B, T, T) with [:, s, t] about snippet s."""
    T = offsets.shape[2]
    positions = torch.arange(T, device=offsets.device)
    channel = positions[:, None] - positions[None, :] + T - 1  # s - t, from 0
    return offsets.gather(1, channel.expand(len(offsets), T, T))
