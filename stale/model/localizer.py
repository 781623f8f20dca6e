"""Parallel heads, the action mask localizer (B videos, T snippets, C joint width)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stale.config import LocalizerConfig

_MOST_PAIRS = 1 << 21  # of snippets, in the T × T maps that are computed at once


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
    """M = sigmoid(H_m(F_vis)), by a stack of 1-D convolutions: whether snippet s is of the instance at snippet t.

    With ``absolute`` coordinates the output channels are positions s [P], with ``pairwise`` ones an embedding of the
    snippet, for :class:`PairScore` [ours].
    """

    def __init__(self, width: int, num_snippets: int, config: LocalizerConfig) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> nn.Module:
            if config.kind == "dynamic":
                return DynamicConv1d(inputs, outputs, config.kernel_size, config.bank)
            return nn.Conv1d(inputs, outputs, config.kernel_size, padding=config.kernel_size // 2)  # [C]

        self.reduce: nn.Module = nn.Identity()
        if config.bottleneck:  # else the convolutions memorize the seen classes
            self.reduce = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, config.bottleneck))
        outputs = num_snippets if config.coordinates == "absolute" else config.embedding
        widths = [config.bottleneck or width, *[config.hidden] * (config.layers - 1), outputs]
        self.layers = nn.ModuleList(map(conv, widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:-1])  # else 15 epochs are too few
        self.pair_score = PairScore() if config.coordinates == "pairwise" else None

    def forward(self, visual: Tensor, foreground: Tensor | None = None) -> Tensor:
        """F_vis (B, T, C) and logits of L (B, T), if known → mask logits (B, T, T); [:, :, t] is that of snippet t."""
        x = self.reduce(visual).transpose(1, 2)  # B × C × T
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = norm(layer(x)).relu()  # B × hidden × T
        x = self.layers[-1](x)  # B × T × T, or B × embedding × T
        if self.pair_score is None:
            return x
        return self.pair_score(x, visual.new_zeros(visual.shape[:2]) if foreground is None else foreground.detach())


class PairScore(nn.Module):
    """Whether two snippets are of one instance [ours]: by their embeddings, L there and between, and distance."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        # A mask starts as L around its snippet, falling with the distance: the network alone is slow to learn that.
        self.start = nn.Linear(7, 1)
        with torch.no_grad():
            self.start.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, -1.5, 0.0]]))
            self.start.bias.fill_(2.0)
        self.layers = nn.Sequential(
            nn.Linear(7, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True), nn.Linear(hidden, 1)
        )

    def forward(self, embedding: Tensor, foreground: Tensor) -> Tensor:
        """Embeddings (B, E, T) and logits of L (B, T) → mask logits (B, T, T)."""
        return in_parts(self._score, foreground, embedding)

    def _score(self, foreground: Tensor, embedding: Tensor) -> Tensor:
        T = foreground.shape[1]
        logits = foreground.float().clamp(-6, 6)
        direction = F.normalize(embedding - embedding.mean(2, keepdim=True), dim=1)
        position = torch.arange(T, device=logits.device)
        distance = (position[:, None] - position).abs()  # T × T
        first, last = torch.minimum(position[:, None], position), torch.maximum(position[:, None], position)
        sums = F.pad(logits.cumsum(1), (1, 0))
        pairs = [
            2 * direction.transpose(1, 2) @ direction,
            logits.unsqueeze(2).expand(-1, T, T),
            logits.unsqueeze(1).expand(-1, T, T),
            lowest_between(logits),
            (sums[:, last + 1] - sums[:, first]) / (distance + 1),
            (distance + 1).log().expand(len(logits), T, T),
            (13 / T * distance).expand(len(logits), T, T),
        ]
        x = features = torch.stack(pairs, 1).flatten(2)  # B × 7 × T²
        for layer in self.layers:
            x = _from_left(layer, x, layer.bias.unsqueeze(1)) if isinstance(layer, nn.Linear) else layer(x)
        return (_from_left(self.start, features, x) + self.start.bias).view(-1, T, T)


def _from_left(layer: nn.Linear, x: Tensor, addend: Tensor) -> Tensor:
    """(B, inputs, N) → (B, outputs, N), ``layer`` with ``addend`` as its bias; no axis is moved."""
    return torch.baddbmm(addend, layer.weight.expand(len(x), -1, -1), x)


def in_parts(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function`` of ``inputs`` (B, ..., T), where T × T is large of few videos at once, and again for gradients."""
    count = max(_MOST_PAIRS // inputs[0].shape[-1] ** 2, 1)
    if count >= len(inputs[0]):
        return function(*inputs)
    parts = zip(*(x.split(count) for x in inputs), strict=True)
    return torch.cat([checkpoint(function, *x, use_reentrant=False, preserve_rng_state=False) for x in parts])


def lowest_between(values: Tensor) -> Tensor:
    """(B, T) → (B, T, T), at [:, s, t] the lowest of the values from s to t."""
    T = values.shape[1]
    later = torch.ones(T, T, dtype=torch.bool, device=values.device).triu()  # s ≤ t
    lowest = values.unsqueeze(1).expand(-1, T, T).masked_fill(~later, torch.inf).cummin(2).values
    return torch.where(later, lowest, lowest.transpose(1, 2))
