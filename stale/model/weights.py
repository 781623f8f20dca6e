"""OpenAI's CLIP weights as plain tensors: from a file, or downloaded by openai-clip under a model's name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stale.errors import StaleError
from stale.files import refuse_zip_bomb


def read_clip_weights(source: str | Path, what: str) -> Mapping[str, Tensor]:
    """The state dict of CLIP weights, on the CPU, as stored.

    Args:
        source: a file (OpenAI's TorchScript archive or a state dict), or a name such as ``ViT-B/16``, which
            openai-clip downloads with its checksum; that needs torchvision.
        what: names the weights in errors.

    Raises:
        StaleError: no such file or model, or something else is in the file.
    """
    return _read(Path(source), what) if Path(source).is_file() else _download(str(source), what)


def _read(path: Path, what: str) -> Mapping[str, Tensor]:
    refuse_zip_bomb(path, what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces TorchScript archives, and that it will drop them one day
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch has no class of its own for "this is TorchScript"
            state = _read_torchscript(path, what)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StaleError(f"{what} {path}: a state dict of tensors is expected")
    return state


def _read_torchscript(path: Path, what: str) -> Mapping[str, Tensor]:
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except Exception as error:
        raise StaleError(f"{what} {path} are neither a state dict nor OpenAI's archive") from error


def _download(name: str, what: str) -> Mapping[str, Tensor]:
    try:
        import clip  # here alone: it imports torchvision
    except Exception as error:
        raise StaleError(
            f"{what} '{name}' are not a file, and openai-clip cannot be imported to download them: {error}"
        ) from None
    if name not in clip.available_models():
        raise StaleError(f"{what} '{name}': no such file or CLIP model ({', '.join(clip.available_models())})")
    try:
        return clip.load(name, device="cpu", jit=False)[0].state_dict()
    except (OSError, RuntimeError) as error:  # no network; a checksum that does not match
        raise StaleError(f"{what} '{name}' could not be downloaded: {error}") from None
