"""The run folder: what lies where, and who wrote it."""

from __future__ import annotations

import logging
import sys
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

    def detections(self, vocabulary: str, oracle: str | None = None) -> Path:
        """Detections of the trained model; the plain name stands for the unseen classes, without an oracle."""
        return self.path / f"detections{_suffix(vocabulary)}{f'_oracle_{oracle}' if oracle else ''}.json"

    def untrained(self, row: str, vocabulary: str) -> Path:
        """Detections of one untrained row."""
        return self.path / "untrained" / f"{row}{_suffix(vocabulary)}.json"

    def metrics(self, vocabulary: str) -> Path:
        """Figures of :meth:`detections`."""
        return self.path / f"metrics{_suffix(vocabulary)}.json"

    def own_files(self) -> list[Path]:
        """The files that lie here of those that the commands write of themselves; the configuration last."""
        vocabularies, untrained = ("unseen", "seen", "all"), ("whole_video", "snippets")
        possible = [self.checkpoint(name) for name in ("last", "best")]
        for vocabulary in vocabularies:
            possible += [self.detections(vocabulary, oracle) for oracle in (None, "masks", "proposals")]
            possible += [self.untrained(row, vocabulary) for row in untrained]
            possible.append(self.metrics(vocabulary))
        possible += [*(self.path / "tensorboard").glob("events.out.tfevents.*"), self.split, self.history, self.log]
        return [path for path in (*possible, self.config) if path.is_file()]

    def clear(self) -> None:
        """Remove :meth:`own_files`, and the folders that are then empty; whatever else lies here stays."""
        for file in self.own_files():  # the configuration last: until then it is a run, which is never taken for new
            file.unlink()
        for name in ("checkpoints", "untrained", "tensorboard"):
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

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


class _LogFile(logging.FileHandler):
    """A log that cannot be written is an error in one line, not a traceback at every line of it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        """Called where writing ``record`` failed."""
        raise StaleError(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}") from None


def log_into(path: Path, kept: MemoryHandler) -> None:
    """Write what was ``kept`` so far, and from now on every line, to the end of the file ``path``."""
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    kept.setTarget(file)
    kept.flush()
