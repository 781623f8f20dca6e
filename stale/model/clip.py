"""CLIP's tokenizer and weights.

openai-clip's files are loaded by their location, because importing the package ``clip`` would import torchvision.
"""

import importlib.util
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stale.config import MODELS
from stale.errors import StaleError, name_some
from stale.io import download, file_sha256, refuse_zip_bomb

_log = logging.getLogger(__name__)

# Of a file in :data:`stale.config.MODELS`.
ADDRESS = "https://openaipublic.azureedge.net/clip/models/{hash}/{file}"
CACHE = Path("~/.cache/clip")  # openai-clip's own


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


@dataclass(frozen=True)
class ClipWeights:
    """CLIP's state dict under OpenAI's names, on the CPU, as stored."""

    state: Mapping[str, Tensor]
    name: str  # OpenAI's name of the model, known by the file's hash; "" for any other file
    where: str  # names the file in messages

    def activation(self, given: str) -> str:
        """``quick_gelu`` or ``gelu``: as ``given``; ``auto`` is OpenAI's, which is said of any other file."""
        if given == "auto" and not self.name:
            _say_once(f"{self.where}: no file of OpenAI's; QuickGELU is assumed, open_clip's weights mostly need gelu")
        return "gelu" if given == "gelu" else "quick_gelu"


_say_once = cache(_log.warning)


def load_text_weights(source: str | Path, activation: str = "auto") -> dict[str, Tensor]:
    """Load the text half of CLIP weights; see :func:`load_clip_weights` and :func:`text_half`."""
    return text_half(load_clip_weights(source, "text weights"), activation)


def text_half(loaded: ClipWeights, activation: str = "auto") -> dict[str, Tensor]:
    """The tensors of the text encoder, in float32 except the token embedding.

    With the activation ``gelu`` in place of QuickGELU they hold a mark, ``exact_gelu``.
    """
    keep = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    weights = {name: tensor for name, tensor in loaded.state.items() if name.startswith(keep)}
    for required in ("token_embedding.weight", "positional_embedding", "text_projection"):
        if required not in weights:
            raise StaleError(
                f"{loaded.where}: no '{required}', as CLIP's text encoder has; embed the classes of another model by "
                "scripts/embed_classes.py and give model.text.embeddings"
            )
    faulty = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if faulty:
        raise StaleError(f"{loaded.where}: NaN or infinite values in {name_some(faulty)}; download them again")
    tokens, known = len(weights["token_embedding.weight"]), len(_tokenizer().encoder)
    if tokens < known:
        raise StaleError(f"{loaded.where} know {tokens} tokens, CLIP's tokenizer has {known}: use CLIP's own")
    weights = {name: t if name == "token_embedding.weight" else t.float() for name, t in weights.items()}
    return weights | ({"exact_gelu": torch.ones(())} if loaded.activation(activation) == "gelu" else {})


def load_clip_weights(source: str | Path, what: str) -> ClipWeights:
    """Load CLIP weights; ``what`` names them in errors. Nothing that a file holds is executed.

    ``source`` is a name such as ``ViT-B/16``, which is downloaded and verified, or a file: OpenAI's TorchScript
    archive, or a state dict (torch or safetensors) under OpenAI's, open_clip's or Hugging Face's names.
    """
    path, where = Path(source), f"{what} {source}"
    if not path.is_file():
        name = str(source)
        if name not in MODELS:
            raise StaleError(f"{where}: no such file or CLIP model ({', '.join(MODELS)})")
        file = f"{re.sub('[/@]', '-', name)}.pt"
        path = download(ADDRESS.format(hash=MODELS[name], file=file), CACHE.expanduser(), MODELS[name])
    refuse_zip_bomb(path, what)
    try:
        known = {digest: name for name, digest in MODELS.items()}.get(file_sha256(path), "")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = _read_torchscript(path) or torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whichever layer meets the damage first
        raise StaleError(f"{where} are no state dict and no archive of OpenAI's, or damaged") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):  # a checkpoint of open_clip
        state = {str(name).removeprefix("module."): tensor for name, tensor in state["state_dict"].items()}
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StaleError(f"{where}: a state dict of tensors is expected")
    if any(str(name).startswith(("text_model.", "vision_model.")) for name in state):
        state = _rename_hugging_face(state)
    return ClipWeights(state, known, where)


# OpenAI's TorchScript archives, whose code is not run


class _Module:
    """A module of the archive, of any class: its attributes alone."""


class _Unpickler(pickle.Unpickler):
    """Unpickles modules and tensors of an archive; every other class and function is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        return _ALLOWED[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Tensor:
        content = bytearray(self.archive.read(f"{self.root}data/{pid[2]}"))
        return torch.frombuffer(content, dtype=pid[1]) if content else torch.empty(0, dtype=pid[1])


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    tensor = storage.as_strided(size, stride, offset)
    if tensor.nbytes > storage.nbytes:  # an expanded view claims any size for a few bytes
        raise ValueError("a tensor larger than its storage")
    return tensor


_ALLOWED: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "collections.OrderedDict": dict,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
}


def _read_torchscript(path: Path) -> dict[str, Tensor] | None:
    """The parameters and buffers of a TorchScript archive; None for another file."""

    visited: set[int] = set()  # a module inside itself, or many times inside others, would take for ever

    def tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _Module) and id(value) not in visited:
                visited.add(id(value))
                yield from tensors(value, f"{prefix}{name}.")

    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        roots = [name.removesuffix("constants.pkl") for name in archive.namelist() if name.endswith("/constants.pkl")]
        return dict(tensors(_Unpickler(archive, roots[0]).load(), "")) if roots else None


# Parts of Hugging Face's names and those of OpenAI, replaced in this order.
_HUGGING_FACE = {
    "text_model.": "",
    "vision_model.": "visual.",
    "encoder.layers": "transformer.resblocks",
    "position_embedding.weight": "positional_embedding",
    "embeddings.": "",
    "patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",  # their spelling
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}


def _rename_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a Hugging Face CLIP's tensors OpenAI's names; queries, keys and values become one matrix."""
    renamed = {}
    for name, tensor in state.items():
        if re.search(r"self_attn\.[kv]_proj|position_ids", name):
            continue
        if "self_attn.q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        elif name.endswith("_projection.weight"):
            tensor = tensor.T
        for old, new in _HUGGING_FACE.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed
