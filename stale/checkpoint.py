"""Checkpoints: tensors and plain values only, written atomically, read without running any code."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stale import __version__
from stale.errors import StaleError
from stale.files import atomic_path

_KIND = "stale checkpoint"


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` (tensors and plain Python values) to ``path`` atomically."""
    with atomic_path(path) as temporary:
        torch.save({"kind": _KIND, "version": __version__, **content}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as plain tensors and values.

    Raises:
        StaleError: the file is missing, damaged or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise StaleError(f"checkpoint not found: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whichever layer meets the damage first
        reason = str(error).partition("\n")[0]
        raise StaleError(f"checkpoint {path} cannot be read, it is damaged or no checkpoint: {reason}") from None
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise StaleError(f"{path} is not a checkpoint of this project")
    return content


def git_revision() -> str:
    """The revision this code runs at, with ``-dirty`` where it was changed; empty outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()
