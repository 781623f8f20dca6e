"""How long the arithmetic of a step must take, and how much memory it does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.rows import best_of, clock_of

# Dense bfloat16 operations a second, of the makers' data sheets; the first name that the device's contains counts.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}

EDGES = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is measured

GB = 1e9


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in ``step``, forward and backward.

    Attention is counted as the dense products it is made of, for not every kernel of it is known to the counter.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def rate(device: torch.device, precision: torch.dtype) -> tuple[float, str]:
    """Operations a second that ``device`` can do at most, and where that is from: a data sheet, or a large product."""
    if device.type == "cuda" and precision is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak, f"{known}'s data sheet, bfloat16"
    return measured_rate(device, precision), f"the best large product measured here, {_name(precision)}"


def measured_rate(device: torch.device, precision: torch.dtype) -> float:
    """Operations a second of the product of two large square matrices."""
    edge = EDGES[device.type]
    a, b = (torch.randn(edge, edge, device=device).to(precision) for _ in range(2))
    return 2 * edge**3 / best_of(lambda: a @ b, 5, clock_of(device))


def describe(flops: int, seconds: float, device: torch.device, precision: torch.dtype) -> tuple[float, str]:
    """The floor in seconds, and a line that puts a step of ``seconds`` beside it."""
    peak, source = rate(device, precision)
    floor = flops / peak
    line = (
        f"Arithmetic floor of the step: {flops / 1e12:.3g} TFLOP, forward and backward, at {peak / 1e12:.3g} TFLOP/s "
        f"({source}): {floor:.4g} s. The step takes {seconds:.4g} s, {seconds / floor:.2f} times as long."
    )
    return floor, line


def peak_memory(step: Callable[[], object]) -> int:
    """Bytes that tensors take on the GPU at most during ``step``, those that lie there before included."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def largest_batch(memory_of: Callable[[int], int], limit: float, most: int = 4096) -> int:
    """The largest batch up to ``most`` whose step takes at most ``limit`` bytes; 0 where not even one video fits."""

    def fits(batch: int) -> bool:
        try:
            return memory_of(batch) <= limit
        except torch.cuda.OutOfMemoryError:
            return False

    fitting, beyond = 0, 1
    while beyond <= most and fits(beyond):
        fitting, beyond = beyond, 2 * beyond
    beyond = min(beyond, most + 1)
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    return fitting


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
