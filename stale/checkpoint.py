"""Checkpoints: tensors and plain values only, written atomically, loaded without running any code."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stale.errors import StaleError
from stale.io import atomic_path, refuse_zip_bomb
from stale.records import CheckpointFile, check_record
from stale.version import __version__

_KIND = "stale checkpoint"


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` (tensors and plain Python values) to ``path``; if that fails, the file that was there stays."""
    with atomic_path(path) as temporary:
        try:
            torch.save({"kind": _KIND, "version": __version__, **content}, temporary)
        except RuntimeError as error:  # in place of OSError, on a full disk above all
            reason = str(error).partition("\n")[0]
            raise StaleError(f"cannot write {path}, is the disk full? The former file is kept ({reason})") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU; a missing, damaged, hostile or foreign file is a StaleError."""
    path = Path(path)
    if not path.is_file():
        raise StaleError(f"checkpoint not found: {path}")
    refuse_zip_bomb(path, "checkpoint", ratio=2)  # torch does not compress
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whichever layer meets the damage first
        reason = str(error).partition("\n")[0]
        raise StaleError(f"checkpoint {path} cannot be read, it is damaged or no checkpoint: {reason}") from None
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise StaleError(f"{path} is not a checkpoint of this project")
    check_record(CheckpointFile, content, f"checkpoint {path}", "train again")
    for name, tensor in content["model"].items():
        sound = isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        # An expanded view claims any size for a few bytes.
        if not sound or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise StaleError(f"checkpoint {path}: '{name}' is no tensor as this project saves them: refused")
    return content


def git_revision() -> str:
    """The git revision of this code, with ``-dirty`` if it was changed; empty outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()
