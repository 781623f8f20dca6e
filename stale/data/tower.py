"""Which image tower made features: kept with them, and in the checkpoints trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stale.errors import StaleError


@dataclass(frozen=True)
class Tower:
    """CLIP's image tower by name and by the SHA-256 of its tensors; both empty where unknown."""

    backbone: str = ""
    weights_sha256: str = ""

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Tower:
        """The tower that a feature file's or a checkpoint's attributes name."""
        return cls(str(attributes.get("backbone", "")), str(attributes.get("weights_sha256", "")))

    def as_dict(self) -> dict[str, str]:
        """The attributes again, as :meth:`of` reads them; none of an unknown tower."""
        return {name: value for name, value in vars(self).items() if value}

    def __str__(self) -> str:
        if not self.weights_sha256:
            return self.backbone or "an unknown image tower"
        return f"{self.backbone or 'an image tower'} (weights {self.weights_sha256[:8]})"


def require_same_width(trained: int, given: int, where: str, mend: str = "use the same image tower") -> None:
    """Stop where features are not as wide as those a run was trained on.

    Args:
        where: what the ``given`` features are, for the message; ``mend`` ends it.

    Raises:
        StaleError: the widths differ.
    """
    if given != trained:
        raise StaleError(f"{where} are {given} wide, but the run was trained on features {trained} wide: {mend}")


def require_same_tower(trained: Tower, given: Tower, where: str) -> None:
    """Stop where features come from another tower than a run was trained on; what is unknown cannot differ.

    Args:
        where: what the ``given`` features are, for the message.

    Raises:
        StaleError: names of backbones, or weights, differ.
    """
    for mine, theirs in zip(vars(trained).values(), vars(given).values(), strict=True):
        if mine and theirs and mine != theirs:
            raise StaleError(
                f"{where} come from {given}, but the run was trained on features of {trained}: use the same image tower"
            )
