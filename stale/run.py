"""The run folder: what lies where, and who wrote it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path

from stale.config import Config, load_config
from stale.errors import StaleError


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def split(self) -> Path:
        """Seen and unseen classes, the held-out videos, the git revision."""
        return self.path / "split.json"

    @property
    def log(self) -> Path:
        """What the commands reported, in words."""
        return self.path / "log.txt"

    @property
    def history(self) -> Path:
        """A JSON line a logging interval and a line an epoch."""
        return self.path / "history.jsonl"

    def checkpoint(self, name: str) -> Path:
        """``best`` or ``last`` of this run, or any other file."""
        return self.path / "checkpoints" / f"{name}.pt" if name in ("best", "last") else Path(name)

    def detections(self, vocabulary: str) -> Path:
        """Detections of the trained model; the plain name stands for the unseen classes."""
        return self.path / f"detections{_suffix(vocabulary)}.json"

    def untrained(self, row: str, vocabulary: str) -> Path:
        """Detections of one untrained row."""
        return self.path / "untrained" / f"{row}{_suffix(vocabulary)}.json"

    def metrics(self, vocabulary: str) -> Path:
        """Figures of :meth:`detections`."""
        return self.path / f"metrics{_suffix(vocabulary)}.json"

    def load_config(self) -> Config:
        """The run's configuration.

        Raises:
            StaleError: there is no run here.
        """
        if not self.config.is_file():
            raise StaleError(f"no run in {self.path}: config.yaml is missing; train one with train.py --output")
        return load_config([self.config])


def _suffix(vocabulary: str) -> str:
    return "" if vocabulary == "unseen" else f"_{vocabulary}"


def start_logging() -> MemoryHandler:
    """Log to stderr, and keep what is said until :func:`log_into` knows a file for it."""
    logger = logging.getLogger("stale")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    kept = MemoryHandler(capacity=1, flushOnClose=False)
    for handler in (console, kept):
        logger.addHandler(handler)
    return kept


def log_into(path: Path, kept: MemoryHandler) -> None:
    """Write what was ``kept`` so far, and from now on every line, to the end of the file ``path``."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    kept.setTarget(file)
    kept.flush()
