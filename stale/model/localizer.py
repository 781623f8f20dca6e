"""Action mask localizer (section 5): for every snippet, a mask over the whole video.

B videos, T snippets, C joint width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DynamicConv1d(nn.Module):
    """Convolution whose kernel is a mixture of a bank, mixed by attention on the input (Chen et al., CVPR 2020)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, bank: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        kernels = [nn.Conv1d(inputs, outputs, kernel_size) for _ in range(bank)]  # for their initialisation alone
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


class PlainConv1d(nn.Conv1d):
    """An ordinary convolution that keeps the length (the released code's localizer)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=kernel_size // 2)


class MaskLocalizer(nn.Module):
    """``M = sigmoid(H_m(F_vis))``: a stack of 1-D convolutions whose output channels are places of the video.

    With ``absolute`` coordinates (paper) channel s of column t says whether place s belongs to the instance at t:
    a convolution, the same everywhere, must know where it is to say so. With ``relative`` coordinates (ours)
    channel o says it of place t + o, and the column is shifted into place.
    """

    def __init__(
        self,
        width: int,
        num_snippets: int,
        kind: str = "dynamic",
        coordinates: str = "absolute",
        hidden: int = 256,
        layers: int = 3,
        kernel_size: int = 3,
        bank: int = 4,
    ) -> None:
        super().__init__()
        self.num_snippets, self.coordinates = num_snippets, coordinates
        outputs = num_snippets if coordinates == "absolute" else 2 * num_snippets - 1

        def conv(inputs: int, outputs: int) -> nn.Module:
            if kind == "dynamic":
                return DynamicConv1d(inputs, outputs, kernel_size, bank)
            return PlainConv1d(inputs, outputs, kernel_size)

        widths = [width, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(map(conv, widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:-1])  # or 15 epochs do not suffice

    def forward(self, visual: Tensor) -> Tensor:
        """F_vis (B, T, C) → mask logits (B, T, T); [:, :, t] is the mask that snippet t predicts."""
        x = visual.transpose(1, 2)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = norm(layer(x)).relu()
        logits = self.layers[-1](x)
        return logits if self.coordinates == "absolute" else offsets_to_places(logits)


def offsets_to_places(offsets: Tensor) -> Tensor:
    """(B, 2T-1, T) with [:, T-1+o, t] about place t + o → (B, T, T) with [:, s, t] about place s."""
    T = offsets.shape[2]
    places = torch.arange(T, device=offsets.device)
    channel = places[:, None] - places[None, :] + T - 1  # s - t, from 0 on
    return offsets.gather(1, channel.expand(len(offsets), T, T))
