"""CLIP's image encoder and its preprocessing: OpenAI's weights in openai-clip's own module, without torchvision.

The preprocessed pixels are bit for bit those of openai-clip's ``_transform``, which resizes and crops by Pillow too;
the normalized values differ by rounding only, at most ``TOLERANCE``.

B images, R the encoder's resolution, C the width of its embedding.
"""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stale.config import MODELS, ModelConfig
from stale.data.features import Backbone, require_same_backbone
from stale.errors import StaleError
from stale.model.clip import ClipWeights, load_clip_module, load_clip_weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOLERANCE = 1e-6

_HEADS = {1280: 16, 1408: 16, 1664: 16}  # of open_clip's wider encoders; up to 1024, a head is 64 wide


class ImageEncoder:
    """Encode images (``resolution`` R) as CLIP features (``width`` C), in half precision on a GPU, else in float32."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        device: torch.device,
        where: object = "weights",
        *,
        name: str = "",
        activation: str = "quick_gelu",
        heads: int | None = None,
    ) -> None:
        """Build the encoder from the ``visual.*`` tensors of a CLIP state dict.

        ``where`` names them in errors, ``name`` is that of the model, where it is known; ``heads`` are derived from the
        width by default.
        """
        state = image_half(weights)
        if not state:
            raise StaleError(f"{where} hold no image encoder ('visual.' tensors): give CLIP's own, by file or name")
        if "class_embedding" not in state or "proj" not in state:
            raise StaleError(f"the image encoder of {where} is no vision transformer; use a ViT, such as ViT-B/16")
        self.device = device
        self._half = device.type == "cuda"
        model, self.resolution = _build(state, where, activation, heads)
        self.width: int = state["proj"].shape[1]
        name = name or "ViT width {}, patch {}, {} px".format(*_shape(state))
        self.backbone = Backbone(name, digest(state), activation)
        self._model: Any = model.to(device).eval()
        if self._half:
            load_clip_module("model").convert_weights(self._model)  # layer norms stay in float32, as OpenAI's

    @classmethod
    def load(
        cls, source: str | Path, device: torch.device, activation: str = "auto", heads: int | None = None
    ) -> "ImageEncoder":
        """Load the image encoder of CLIP weights, a file or a name such as ``ViT-B/16``; it must be a ViT."""
        loaded = load_clip_weights(source, "image weights")
        activation = loaded.activation(activation)
        return cls(loaded.state, device, loaded.where, name=loaded.name, activation=activation, heads=heads)

    def crop(self, image: np.ndarray) -> np.ndarray:
        """The part of an RGB image (H, W, 3) uint8 that is encoded: (R, R, 3) uint8."""
        return crop(image, self.resolution)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images (B, R, R, 3) uint8, already cropped, as features (B, C) float32, not normalized."""
        pixels = normalize_pixels(torch.from_numpy(images).to(self.device, non_blocking=True))
        return self._model(pixels.half() if self._half else pixels).float().cpu().numpy()


def image_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the image encoder in a CLIP state dict, without their prefix."""
    return {name.removeprefix("visual."): t.detach() for name, t in weights.items() if name.startswith("visual.")}


def backbone_of(loaded: ClipWeights, activation: str) -> Backbone:
    """The record of features by the image encoder in CLIP weights; a file of the text encoder alone has no hash."""
    images = image_half(loaded.state)
    return Backbone(loaded.name, digest(images) if images else "", loaded.activation(activation))


def require_text_of(features: Backbone, config: ModelConfig) -> None:
    """Raise a StaleError if the CLIP weights of the text are known to be of another model than the features."""
    is_known = features.weights_sha256 or features.backbone in MODELS  # others' names have other spellings
    if is_known and not config.text.embeddings and not config.visual_projection:
        loaded = load_clip_weights(config.text.weights, "text weights")
        given = backbone_of(loaded, config.text.activation)
        require_same_backbone(features, given, loaded.where, "the features are of")


def load_open_clip(model: str, pretrained: str) -> tuple[Any, Any, Backbone]:
    """A model of open_clip on the CPU in float32, its preprocessing and record; a StaleError if it cannot be had."""
    try:
        open_clip = importlib.import_module("open_clip")
    except Exception as error:  # it imports torchvision, which fails in several ways beside another build of torch
        raise StaleError(f"open_clip cannot be imported ({error}): pip install open_clip_torch torchvision") from None
    if not pretrained and not model.startswith(("hf-hub:", "local-dir:")):
        raise StaleError(f"{model} without weights is a random model: name them, as open_clip lists them")
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained or None)
    except Exception as error:  # unknown names, no network, damaged files: open_clip has no error of its own
        reason = " ".join(str(error).split())[:300]
        raise StaleError(f"open_clip cannot load {model} with the weights '{pretrained}': {reason}") from None
    name = " ".join(["open_clip", model, Path(pretrained).name]).strip()
    return network, preprocess, Backbone(name, digest(network.visual.state_dict()))


def crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the short side of an RGB image (H, W, 3) uint8 to ``size`` and crop the center: (size, size, 3) uint8."""
    height, width = image.shape[:2]
    short = min(height, width)
    # The long side is rounded down, and the margin half to even, as torchvision does.
    resized_width, resized_height = size * width // short, size * height // short
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(
        (resized_width, resized_height), Image.Resampling.BICUBIC
    )
    left, top = round((resized_width - size) / 2), round((resized_height - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def normalize_pixels(images: Tensor) -> Tensor:
    """Normalise images (B, R, R, 3) uint8 to the image encoder's input (B, 3, R, R) float32, on their device."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def _shape(state: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Width, patch and resolution R of a vision transformer."""
    width, patch = state["conv1.weight"].shape[0], state["conv1.weight"].shape[-1]
    return width, patch, patch * round((len(state["positional_embedding"]) - 1) ** 0.5)


def _build(state: Mapping[str, Tensor], where: object, activation: str, heads: int | None) -> tuple[nn.Module, int]:
    """Build openai-clip's vision transformer from the shapes of its weights; also return its resolution R."""
    try:
        width, patch, resolution = _shape(state)
        heads = heads or _HEADS.get(width, width // 64 if width % 64 == 0 and width <= 1024 else 0)
        if not heads:
            raise ValueError(f"the number of heads of width {width} is not known: give extract_features.py --heads")
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
        transformer = load_clip_module("model").VisionTransformer
        model = transformer(resolution, patch, width, layers, heads, state["proj"].shape[1])
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        for block in model.transformer.resblocks if activation == "gelu" else ():
            block.mlp.gelu = nn.GELU()
    except (RuntimeError, KeyError, IndexError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StaleError(f"{where} do not form CLIP's vision transformer: {reason}") from None
    return model, resolution


def digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the tensors in half precision, equal for OpenAI's archive and for a state dict made from it."""
    found = hashlib.sha256()
    for key in sorted(state):
        found.update(f"{key} {tuple(state[key].shape)}".encode())
        found.update(state[key].half().contiguous().cpu().numpy().tobytes())
    return found.hexdigest()
