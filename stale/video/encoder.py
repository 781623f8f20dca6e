"""CLIP's image tower: OpenAI's weights in openai-clip's own module, loaded without torchvision.

B images, R the tower's resolution, C its embedding's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stale.data.tower import Tower
from stale.errors import StaleError
from stale.model.tokenizer import load_clip_module
from stale.model.weights import read_clip_weights
from stale.video.preprocess import normalise

_PREFIX = "visual."
_NAMES = {  # width, patch and resolution → OpenAI's name
    (768, 32, 224): "ViT-B/32",
    (768, 16, 224): "ViT-B/16",
    (1024, 14, 224): "ViT-L/14",
    (1024, 14, 336): "ViT-L/14@336px",
}


class ImageEncoder:
    """Images → CLIP features, in half precision on a GPU and in float32 elsewhere.

    Attributes:
        tower: name and hash of the weights.
        resolution: R.
        width: C.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device, where: object = "weights") -> None:
        """Args:
        weights: a CLIP state dict; only its ``visual.*`` tensors are used.
        where: names the weights in errors.

        Raises:
            StaleError: there is no vision transformer in it.
        """
        state = {name.removeprefix(_PREFIX): t.detach() for name, t in weights.items() if name.startswith(_PREFIX)}
        if not state:
            raise StaleError(f"{where} hold no image tower ('visual.' tensors): give CLIP's own, by file or name")
        if "class_embedding" not in state or "proj" not in state:
            raise StaleError(f"the image tower of {where} is no vision transformer; use a ViT, such as ViT-B/16")
        self.device = device
        self._half = device.type == "cuda"
        self._model = _build(state, where).to(device).eval()
        if self._half:
            load_clip_module("model").convert_weights(self._model)  # layer norms stay in float32, as OpenAI's
        self.resolution, self.width = self._model.input_resolution, self._model.output_dim
        self.tower = Tower(_name(state, self.resolution), _fingerprint(state))

    @classmethod
    def load(cls, source: str | Path, device: torch.device) -> ImageEncoder:
        """The image tower of CLIP weights: a file, or a name such as ``ViT-B/16``.

        Raises:
            StaleError: no such file or model, or no vision transformer in it.
        """
        return cls(read_clip_weights(source, "image weights"), device, f"image weights {source}")

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images (B, R, R, 3) uint8, cropped for the tower, → features (B, C) float32, not normalised."""
        pixels = normalise(torch.from_numpy(images).to(self.device, non_blocking=True))
        return self._model(pixels.half() if self._half else pixels).float().cpu().numpy()


def _build(state: Mapping[str, Tensor], where: object) -> nn.Module:
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
    return model


def _name(state: Mapping[str, Tensor], resolution: int) -> str:
    width, patch = state["conv1.weight"].shape[0], state["conv1.weight"].shape[-1]
    return _NAMES.get((width, patch, resolution), f"ViT width {width}, patch {patch}, {resolution} px")


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors in half precision: the same for OpenAI's archive and for a state dict made of it."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)}".encode())
        digest.update(state[name].half().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
