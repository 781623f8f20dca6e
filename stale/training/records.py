"""What a run leaves behind of its course: history.jsonl, and TensorBoard's curves where that is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stale import parallel
from stale.files import append_text, read_text, write_text
from stale.run import RunFolder


class Records:
    """The records of a run; of several processes the first alone keeps them."""

    def __init__(self, run: RunFolder) -> None:
        self._history = run.history
        self._board = _tensorboard(run.path) if parallel.is_first() else None

    def add(self, record: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """A line of the history, and ``scalars`` for the curves at its step, or epoch."""
        if not parallel.is_first():
            return
        append_text(self._history, json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, record.get("step", record["epoch"]))

    def forget_after(self, epoch: int, step: int) -> None:
        """Drop the records of what was broken off, and a line half written: it is trained again.

        Args:
            step: of the whole run.
        """

        def belongs(line: str) -> bool:
            try:
                record = json.loads(line)
                return record["step"] <= step if "step" in record else record["epoch"] <= epoch
            except (json.JSONDecodeError, KeyError, TypeError):
                return False

        if parallel.is_first() and self._history.exists():
            lines = read_text(self._history, "history").splitlines(keepends=True)
            write_text(self._history, "".join(filter(belongs, lines)))


def _tensorboard(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path / "tensorboard"))
