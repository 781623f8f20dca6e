"""Geometry of segments: tIoU and the change between seconds and snippets. Pure functions.

A video of ``duration`` seconds, rescaled to T snippets, has snippet ``t`` cover
``[t, t + 1)`` in snippet units, i.e. ``[t, t + 1) * duration / T`` in seconds.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Array = TypeVar("Array")


def seconds_to_snippets(seconds: Array, duration: Array | float, num_snippets: int) -> Array:
    """Seconds → snippet units (any array type or float); ``duration`` in seconds broadcasts."""
    return seconds * num_snippets / duration  # type: ignore[operator]


def snippets_to_seconds(snippets: Array, duration: Array | float, num_snippets: int) -> Array:
    """Snippet units → seconds (any array type or float); ``duration`` in seconds broadcasts."""
    return snippets * duration / num_snippets  # type: ignore[operator]


def clip_segment(start: float, end: float, duration: float) -> tuple[float, float] | None:
    """The part of ``[start, end]`` inside ``[0, duration]`` (seconds), or None where nothing is left."""
    start, end = max(start, 0.0), min(end, duration)
    return (start, end) if end > start else None


def pairwise_tiou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """tIoU of every pair: (N, 2) and (M, 2) segments → (N, M). Two empty segments have tIoU 0."""
    start = np.maximum(first[:, None, 0], second[None, :, 0])
    end = np.minimum(first[:, None, 1], second[None, :, 1])
    intersection = np.clip(end - start, 0.0, None)
    lengths = (first[:, 1] - first[:, 0])[:, None] + (second[:, 1] - second[:, 0])[None, :]
    union = lengths - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
