"""CLIP's tokenizer and weights.

openai-clip's files are loaded by their location, because importing the package ``clip`` would import torchvision.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stale.errors import StaleError, name_some
from stale.io import refuse_zip_bomb


def encode(text: str) -> list[int]:
    """Token ids of ``text`` by CLIP's byte-pair encoding, without start and end tokens."""
    return _tokenizer().encode(text)


def tokenize(text: str) -> list[int]:
    """Token ids of ``text`` between the start-of-text and the end-of-text token."""
    special = _tokenizer().encoder
    return [special["<|startoftext|>"], *encode(text), special["<|endoftext|>"]]


@cache
def _tokenizer() -> Any:
    return load_clip_module("simple_tokenizer").SimpleTokenizer()


def load_clip_module(name: str) -> ModuleType:
    """Load a file of openai-clip (``simple_tokenizer`` or ``model``); a StaleError if it is not installed."""
    package = importlib.util.find_spec("clip")
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise StaleError("openai-clip is not installed: pip install openai-clip")
    spec = importlib.util.spec_from_file_location(f"_openai_clip_{name}", Path(folders[0]) / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_text_weights(source: str | Path) -> dict[str, Tensor]:
    """Load the text half of CLIP weights: as :func:`load_clip_weights`, but float32 except the token embedding."""
    state = load_clip_weights(source, "text weights")
    keep = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    weights = {name: tensor for name, tensor in state.items() if name.startswith(keep)}
    for required in ("token_embedding.weight", "positional_embedding", "text_projection"):
        if required not in weights:
            raise StaleError(f"text weights {source}: no '{required}'; OpenAI's CLIP state-dict names are expected")
    faulty = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if faulty:
        raise StaleError(f"text weights {source}: NaN or infinite values in {name_some(faulty)}; download them again")
    tokens, known = len(weights["token_embedding.weight"]), len(_tokenizer().encoder)
    if tokens < known:
        raise StaleError(f"text weights {source} know {tokens} tokens, CLIP's tokenizer has {known}: use CLIP's own")
    return {name: t if name == "token_embedding.weight" else t.float() for name, t in weights.items()}


def load_clip_weights(source: str | Path, what: str) -> Mapping[str, Tensor]:
    """Load the state dict of CLIP weights, on the CPU, as stored; ``what`` names them in errors.

    ``source`` is a file (OpenAI's TorchScript archive or a state dict), or a name such as ``ViT-B/16``, which
    openai-clip downloads with its checksum; that needs torchvision.
    """
    path = Path(source)
    if not path.is_file():
        return _download(str(source), what)
    refuse_zip_bomb(path, what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about TorchScript archives, which it will stop to support
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch has no exception of its own for "this is TorchScript"
            try:
                state = torch.jit.load(path, map_location="cpu").state_dict()
            except Exception as error:
                raise StaleError(f"{what} {path} are neither a state dict nor OpenAI's archive") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StaleError(f"{what} {path}: a state dict of tensors is expected")
    return state


def _download(name: str, what: str) -> Mapping[str, Tensor]:
    try:
        clip = importlib.import_module("clip")  # only here, because it imports torchvision
    except Exception as error:
        reason = f"are not a file, and openai-clip cannot be imported to download them: {error}"
        raise StaleError(f"{what} '{name}' {reason}") from None
    if name not in clip.available_models():
        raise StaleError(f"{what} '{name}': no such file or CLIP model ({', '.join(clip.available_models())})")
    try:
        return clip.load(name, device="cpu", jit=False)[0].state_dict()
    except (OSError, RuntimeError) as error:  # no network; a checksum that does not match
        raise StaleError(f"{what} '{name}' could not be downloaded: {error}") from None
