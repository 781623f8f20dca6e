"""CLIP's image preprocessing without torchvision: bicubic to the short side, centre crop, normalisation.

The pixels are bit for bit those of openai-clip's ``_transform``, which resizes and crops by Pillow too; the
normalised values differ by rounding only, at most ``TOLERANCE``.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOLERANCE = 1e-6


def crop(image: np.ndarray, size: int) -> np.ndarray:
    """An RGB image (H, W, 3) uint8 → its middle (size, size, 3) uint8, the short side resized to ``size``."""
    height, width = image.shape[:2]
    short = min(height, width)
    # The long side is cut to a whole number, and the margin rounded half to even, as torchvision does.
    resized_width, resized_height = size * width // short, size * height // short
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(
        (resized_width, resized_height), Image.Resampling.BICUBIC
    )
    left, top = round((resized_width - size) / 2), round((resized_height - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def normalise(images: Tensor) -> Tensor:
    """Images (B, R, R, 3) uint8 → (B, 3, R, R) float32 as CLIP's image tower takes them, on their device."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
