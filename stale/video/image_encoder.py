"""CLIP's image encoder and its preprocessing: OpenAI's weights in openai-clip's own module, without torchvision.

The preprocessed pixels are bit for bit those of openai-clip's ``_transform``, which resizes and crops by Pillow too;
the normalised values differ by rounding only, at most ``TOLERANCE``.

B images, R the encoder's resolution, C the width of its embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stale.data.features import Backbone
from stale.errors import StaleError
from stale.model.clip import load_clip_module, load_clip_weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOLERANCE = 1e-6

_PREFIX = "visual."
_NAMES = {  # width, patch and resolution → OpenAI's name
    (768, 32, 224): "ViT-B/32",
    (768, 16, 224): "ViT-B/16",
    (1024, 14, 224): "ViT-L/14",
    (1024, 14, 336): "ViT-L/14@336px",
}


class ImageEncoder:
    """Encode images as CLIP features, in half precision on a GPU and in float32 elsewhere.

    ``backbone`` is the name and hash of the weights, ``resolution`` R and ``width`` C.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device, where: object = "weights") -> None:
        """Build the encoder from the ``visual.*`` tensors of a CLIP state dict; ``where`` names it in errors."""
        state = {name.removeprefix(_PREFIX): t.detach() for name, t in weights.items() if name.startswith(_PREFIX)}
        if not state:
            raise StaleError(f"{where} hold no image encoder ('visual.' tensors): give CLIP's own, by file or name")
        if "class_embedding" not in state or "proj" not in state:
            raise StaleError(f"the image encoder of {where} is no vision transformer; use a ViT, such as ViT-B/16")
        self.device = device
        self._half = device.type == "cuda"
        model, self.resolution = _build(state, where)
        self.width: int = state["proj"].shape[1]
        self.backbone = _identify(state, self.resolution)
        self._model = model.to(device).eval()
        if self._half:
            load_clip_module("model").convert_weights(self._model)  # layer norms stay in float32, as OpenAI's

    @classmethod
    def load(cls, source: str | Path, device: torch.device) -> ImageEncoder:
        """Load the image encoder of CLIP weights, a file or a name such as ``ViT-B/16``; it must be a ViT."""
        return cls(load_clip_weights(source, "image weights"), device, f"image weights {source}")

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images (B, R, R, 3) uint8, already cropped, as features (B, C) float32, not normalised."""
        pixels = normalize_pixels(torch.from_numpy(images).to(self.device, non_blocking=True))
        return self._model(pixels.half() if self._half else pixels).float().cpu().numpy()


def crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the short side of an RGB image (H, W, 3) uint8 to ``size`` and crop the centre: (size, size, 3) uint8."""
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


def _build(state: Mapping[str, Tensor], where: object) -> tuple[nn.Module, int]:
    """Build openai-clip's vision transformer from the shapes of its weights; also return its resolution R."""
    try:
        width, patch = state["conv1.weight"].shape[0], state["conv1.weight"].shape[-1]
        grid = round((len(state["positional_embedding"]) - 1) ** 0.5)
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
        model = load_clip_module("model").VisionTransformer(
            grid * patch, patch, width, layers, max(width // 64, 1), state["proj"].shape[1]
        )
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except (RuntimeError, KeyError, IndexError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StaleError(f"{where} do not form CLIP's vision transformer: {reason}") from None
    return model, grid * patch


def _identify(state: Mapping[str, Tensor], resolution: int) -> Backbone:
    """OpenAI's name for the encoder, and the SHA-256 of its tensors in half precision.

    The hash is equal for OpenAI's archive and for a state dict made from it.
    """
    width, patch = state["conv1.weight"].shape[0], state["conv1.weight"].shape[-1]
    name = _NAMES.get((width, patch, resolution), f"ViT width {width}, patch {patch}, {resolution} px")
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {tuple(state[key].shape)}".encode())
        digest.update(state[key].half().contiguous().cpu().numpy().tobytes())
    return Backbone(name, digest.hexdigest())
