"""CLIP's preprocessing: against Pillow's steps written out, and against openai-clip's own where torchvision imports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stale.video.preprocess import MEAN, STD, TOLERANCE, crop, normalise

SIZES = [(180, 320), (320, 180), (181, 323), (224, 224), (17, 400), (1080, 1920), (225, 224), (31, 30), (1, 1)]


def picture(height: int, width: int) -> np.ndarray:
    """Noise over a gradient: edges in every place."""
    rng = np.random.default_rng(height * 10_000 + width)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return (0.5 * ramp + 0.5 * rng.integers(0, 256, (height, width, 3))).astype(np.uint8)


def reference(image: np.ndarray, size: int) -> np.ndarray:
    """The definition: short side to ``size`` by bicubic interpolation, centre crop, 0 to 1, mean and deviation."""
    height, width = image.shape[:2]
    scaled = (size, int(size * height / width)) if width < height else (int(size * width / height), size)
    resized = np.asarray(Image.fromarray(image).resize(scaled, Image.BICUBIC))
    top, left = int(round((scaled[1] - size) / 2.0)), int(round((scaled[0] - size) / 2.0))
    middle = resized[top : top + size, left : left + size] / 255.0
    return ((middle - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


def ours(image: np.ndarray, size: int) -> np.ndarray:
    """What the encoder is given."""
    return normalise(torch.from_numpy(crop(image, size)[None].copy()))[0].numpy()


@pytest.mark.parametrize("size", [32, 224, 336])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_it_is_the_definition(shape: tuple[int, int], size: int) -> None:
    image = picture(*shape)
    prepared = ours(image, size)
    assert prepared.shape == (3, size, size)
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, reference(image, size), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_it_equals_openai_clips_own(shape: tuple[int, int]) -> None:
    try:
        from clip.clip import _transform
    except Exception as error:  # absent, or built for another torch, which fails in many ways
        pytest.skip(f"torchvision cannot be imported: {error}")
    image = picture(*shape)
    theirs = _transform(224)(Image.fromarray(image)).numpy()
    np.testing.assert_allclose(ours(image, 224), theirs, atol=TOLERANCE, rtol=0)


def test_the_middle_is_kept_and_its_colours_in_order() -> None:
    image = np.zeros((40, 120, 3), dtype=np.uint8)
    image[:, 40:80, 0] = 255
    middle = crop(image, 40)
    assert (middle[:, 2:-2, 0] > 250).all()
    assert not middle[..., 1:].any()
    red, green, _ = ours(image, 40)[:, 20, 20]
    assert red == pytest.approx((1 - MEAN[0]) / STD[0], abs=1e-2)
    assert green == pytest.approx(-MEAN[1] / STD[1], abs=1e-5)


def test_an_image_in_memory_out_of_order_is_read_as_it_looks() -> None:
    image = picture(50, 70)
    np.testing.assert_array_equal(crop(np.rot90(image), 32), crop(np.rot90(image).copy(), 32))
