"""CLIP's byte-pair encoding, from openai-clip.

The tokenizer's file is loaded by its location: importing the package ``clip`` would import torchvision.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from stale.errors import StaleError

START = "<|startoftext|>"
END = "<|endoftext|>"


def encode(text: str) -> list[int]:
    """Token ids of ``text`` without start and end tokens."""
    return _tokenizer().encode(text)


def start_token() -> int:
    """The id of the start-of-text token."""
    return _tokenizer().encoder[START]


def end_token() -> int:
    """The id of the end-of-text token."""
    return _tokenizer().encoder[END]


def load_clip_module(name: str) -> ModuleType:
    """A single file of openai-clip (``simple_tokenizer`` or ``model``), without importing the package.

    Raises:
        StaleError: openai-clip is not installed.
    """
    package = importlib.util.find_spec("clip")
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise StaleError("openai-clip is not installed: pip install openai-clip")
    spec = importlib.util.spec_from_file_location(f"_openai_clip_{name}", Path(folders[0]) / f"{name}.py")
    if spec is None or spec.loader is None:
        raise StaleError(f"openai-clip has no {name}.py; install openai-clip 1.0.1")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _tokenizer() -> Any:
    return load_clip_module("simple_tokenizer").SimpleTokenizer()
