"""Geometry of segments: temporal IoU (tIoU), seconds, and snippets, of which t covers [t, t + 1) · duration / T."""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # evaluation works without torch
    from torch import Tensor

Array = TypeVar("Array", float, np.ndarray, "Tensor")


def seconds_to_snippets(seconds: Array, duration: Array | float, num_snippets: Array | int) -> Array:
    """Convert seconds to snippet units. ``duration`` (seconds) broadcasts."""
    return seconds * num_snippets / duration


def snippets_to_seconds(snippets: Array, duration: Array | float, num_snippets: Array | int) -> Array:
    """Convert snippet units to seconds. ``duration`` (seconds) broadcasts."""
    return snippets * duration / num_snippets


def clip_segment(start: float, end: float, duration: float) -> tuple[float, float] | None:
    """The part of ``[start, end]`` inside ``[0, duration]`` (seconds), or None where nothing is left."""
    start, end = max(start, 0.0), min(end, duration)
    return (start, end) if end > start else None


def paired_tiou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """tIoU of each row of ``first`` (P, 2) with the same row of ``second`` (P, 2); 0 where both are empty."""
    shared = np.minimum(first[:, 1], second[:, 1]) - np.maximum(first[:, 0], second[:, 0])
    intersection = np.clip(shared, 0.0, None)
    # The official evaluator's order of operations: a tIoU on a threshold must fall on the same side of it.
    union = (second[:, 1] - second[:, 0]) + (first[:, 1] - first[:, 0]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
