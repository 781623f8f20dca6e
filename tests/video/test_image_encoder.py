"""CLIP's preprocessing against Pillow's steps written out, and the image encoder against openai-clip's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stale.config import load_config
from stale.data.features import Backbone, open_features, require_same_backbone
from stale.errors import StaleError
from stale.model.clip import load_clip_module
from stale.training.trainer import train
from stale.video.image_encoder import MEAN, STD, TOLERANCE, ImageEncoder, crop, normalize_pixels, require_text_of
from tests.helpers import (
    RESOLUTION,
    SHARED,
    WIDTH,
    make_clip_data_set,
    needs_shared,
    on_a_gpu,
    random_image_encoder_weights,
)

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
SIZES = [(180, 320), (320, 180), (181, 323), (224, 224), (17, 400), (1080, 1920), (225, 224), (31, 30), (1, 1)]


def picture(height: int, width: int) -> np.ndarray:
    """Noise over a gradient: edges in every place."""
    rng = np.random.default_rng(height * 10_000 + width)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return (0.5 * ramp + 0.5 * rng.integers(0, 256, (height, width, 3))).astype(np.uint8)


def reference(image: np.ndarray, size: int) -> np.ndarray:
    """The definition: short side to ``size`` by bicubic interpolation, center crop, 0 to 1, mean and deviation."""
    height, width = image.shape[:2]
    scaled = (size, int(size * height / width)) if width < height else (int(size * width / height), size)
    resized = np.asarray(Image.fromarray(image).resize(scaled, Image.BICUBIC))
    top, left = int(round((scaled[1] - size) / 2.0)), int(round((scaled[0] - size) / 2.0))
    middle = resized[top : top + size, left : left + size] / 255.0
    return ((middle - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


def ours(image: np.ndarray, size: int) -> np.ndarray:
    """What the encoder is given."""
    return normalize_pixels(torch.from_numpy(crop(image, size)[None].copy()))[0].numpy()


@pytest.mark.parametrize("size", [32, 224, 336])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_preprocessing_is_the_definition(shape: tuple[int, int], size: int) -> None:
    image = picture(*shape)
    prepared = ours(image, size)
    assert (prepared.shape, prepared.dtype) == ((3, size, size), np.float32)
    np.testing.assert_array_equal(crop(np.rot90(image), size), crop(np.rot90(image).copy(), size))
    np.testing.assert_allclose(prepared, reference(image, size), atol=TOLERANCE, rtol=0)


@needs_shared
def test_preprocessing_equals_openai_clips_own() -> None:
    folder = SHARED / "golden" / "clip_preprocess"
    expected = np.load(folder / "expected.npz")
    assert len(expected.files) == 7
    for name in expected.files:
        image = np.asarray(Image.open(folder / f"{name}.jpg").convert("RGB"))
        np.testing.assert_array_equal(ours(image, 224), expected[name])


def test_the_encoder_is_openai_clips(encoder: ImageEncoder) -> None:
    clip = load_clip_module("model").CLIP(WIDTH, RESOLUTION, 2, 64, 8, 77, 16, 64, 1, 1).eval()
    clip.load_state_dict(random_image_encoder_weights(), strict=False)
    with torch.no_grad():
        expected = clip.encode_image(normalize_pixels(torch.from_numpy(IMAGES)))
    np.testing.assert_allclose(encoder.encode(IMAGES), expected.numpy(), atol=1e-5)


@on_a_gpu
def test_half_precision_on_a_gpu_is_near(encoder: ImageEncoder) -> None:
    half = ImageEncoder(random_image_encoder_weights(), torch.device("cuda")).encode(IMAGES)
    np.testing.assert_allclose(half, encoder.encode(IMAGES), atol=2e-2)


def test_the_fingerprint_is_of_the_tensors_not_of_the_file() -> None:
    one, other = random_image_encoder_weights(0), random_image_encoder_weights(1)
    half = {name: tensor.half() for name, tensor in reversed(one.items())} | {"text_projection": torch.zeros(2, 2)}
    backbones = [ImageEncoder(weights, CPU).backbone for weights in (one, half, other)]
    assert backbones[0] == backbones[1]
    assert backbones[0].weights_sha256 != backbones[2].weights_sha256
    assert len(backbones[0].weights_sha256) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"token_embedding.weight": torch.zeros(2)}, "no image encoder"),
        (lambda state: {"visual.layer1.0.conv1.weight": torch.zeros(2)}, "no vision transformer"),
        (lambda state: {k: v for k, v in state.items() if "resblocks.1.ln_1" not in k}, "do not form"),
        (lambda state: state | {"visual.proj": torch.zeros(3, 4)}, "do not form"),
    ],
)
def test_weights_that_form_no_image_encoder_are_an_error(change, message: str) -> None:
    with pytest.raises(StaleError, match=message) as error:
        ImageEncoder(change(random_image_encoder_weights()), CPU, "weights w.pt")
    assert "w.pt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "given", "heads"), [(192, None, 3), (192, 6, 6), (1280, None, 16)])
def test_heads_are_derived_from_the_width_or_given(width: int, given: int | None, heads: int) -> None:
    weights = random_image_encoder_weights(width=width)  # its own module was built with width / 64 heads
    encoder = ImageEncoder(weights, CPU, activation="gelu", heads=given)
    blocks = encoder._model.transformer.resblocks
    assert {block.attn.num_heads for block in blocks} == {heads}
    assert {type(block.mlp.gelu) for block in blocks} == {torch.nn.GELU}
    shapes = {"class_embedding": (1152,), "proj": (1152, 8), "conv1.weight": (1152, 3, 8, 8)}
    shapes["positional_embedding"] = (17, 1152)
    with pytest.raises(StaleError, match="number of heads of width 1152 is not known"):
        ImageEncoder({f"visual.{key}": torch.zeros(shape) for key, shape in shapes.items()}, CPU)


def test_training_refuses_text_of_another_model_than_the_features(tmp_path: Path) -> None:
    config = load_config([make_clip_data_set(tmp_path)], [f"model.text.weights={tmp_path / 'text_encoder.pt'}"])
    features = open_features(2 * [config.data.features]).backbone()  # side by side
    assert features == open_features(config.data.features).backbone() != Backbone()
    require_text_of(features, config.model)
    weights = torch.load(tmp_path / "text_encoder.pt") | random_image_encoder_weights(1)
    torch.save(weights, tmp_path / "text_encoder.pt")
    with pytest.raises(StaleError, match="text_encoder.pt come from .*, but the features are of"):
        train(config, tmp_path / "run")
    require_text_of(Backbone(), config.model)  # of which nothing is recorded


def test_backbones_that_are_known_must_be_the_same() -> None:
    mine = Backbone("ViT-B/16", "a" * 64, "quick_gelu")
    for same in (mine, Backbone(), Backbone("ViT-B/16")):
        require_same_backbone(mine, same, "features f")
        require_same_backbone(same, mine, "features f")
    for other in (Backbone("ViT-B/32"), Backbone("ViT-B/16", "b" * 64), Backbone("", "a" * 64, "gelu")):
        with pytest.raises(StaleError, match="f come from .*ViT-B/16 .weights aaaaaaaa, quick_gelu.: use the same"):
            require_same_backbone(mine, other, "features f")
