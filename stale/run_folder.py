"""The run folder: where each file of a run lies, which files are the run's own, and its log."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from stale.config import Config, load_config
from stale.errors import StaleError, launched_together
from stale.io import read_json, read_text
from stale.records import SplitFile, check_record

VOCABULARIES = ("unseen", "seen", "all")
ORACLES = ("masks", "localizer", "labels", "proposals")  # values of detection.oracle
# Rows of the training-free baselines
BASELINES = ("whole_video", "whole_video_all_classes", "snippets", "snippets_all_classes")


class RunFolder:
    """Paths inside the folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # resolved
        self.split = path / "split.json"  # seen and unseen classes, the held-out videos, the git revision
        self.log = path / "log.txt"  # of all commands
        self.history = path / "history.jsonl"  # a JSON line for each logging interval and each epoch
        self.curves = path / "curves.png"  # of history.jsonl
        self.card = path / "model_card.md"
        self.diagnosis = path / "diagnosis.json"  # of scripts/diagnose.py
        self.report = path / "report" / "index.html"  # of scripts/report.py
        self.replaced = path / "replaced_run"  # the former run, until the one that replaces it has a checkpoint

    def checkpoint(self, name: str) -> Path:
        """``best`` or ``last`` of this run, or any other file."""
        return self.path / "checkpoints" / f"{name}.pt" if name in ("best", "last") else Path(name)

    def detections(self, vocabulary: str, oracle: Sequence[str] = ()) -> Path:
        """Detections of the trained model. The plain name is that of the unseen classes without an oracle."""
        return self.path / f"detections{_suffix(vocabulary)}{oracle_suffix(oracle)}.json"

    def baselines(self, row: str, vocabulary: str) -> Path:
        """Detections of the training-free baseline ``row``."""
        return self.path / "baselines" / f"{row}{_suffix(vocabulary)}.json"

    def metrics(self, vocabulary: str) -> Path:
        """Metrics of :meth:`detections`."""
        return self.path / f"metrics{_suffix(vocabulary)}.json"

    def snippet_scores(self, vocabulary: str) -> Path:
        """Foreground and class scores of the snippets, where ``inference.py --curves`` saved them."""
        return self.path / f"snippet_scores{_suffix(vocabulary)}.json"

    def own_files(self) -> list[Path]:
        """The existing files that the commands write by default; the last checkpoint first, the configuration last."""
        possible = [self.checkpoint(name) for name in ("last", "best")]
        for vocabulary in VOCABULARIES:
            sets = (names for size in range(len(ORACLES) + 1) for names in combinations(ORACLES, size))
            possible += [self.detections(vocabulary, oracle) for oracle in sets]
            possible += [self.baselines(row, vocabulary) for row in BASELINES]
            possible += [self.metrics(vocabulary), self.snippet_scores(vocabulary)]
        possible += (self.path / "tensorboard").glob("events.out.tfevents.*")
        possible += [self.split, self.history, self.log, self.curves, self.card, self.diagnosis, self.report]
        return [path for path in (*possible, self.config) if path.is_file()]

    def clear(self) -> None:
        """Remove :meth:`own_files` and folders that are then empty. Other files stay."""
        for file in self.own_files():  # the configuration last: an interrupted removal still leaves a run
            file.unlink()
        self._remove_empty_folders()

    def set_aside(self) -> None:
        """Move :meth:`own_files` into ``replaced_run``, from which :meth:`settle` takes them back or removes them."""
        self._move(self.own_files(), RunFolder(self.replaced))

    def settle(self) -> bool:
        """Remove the run that was set aside if the new one has a checkpoint, else put it back; return whether it was.

        Each step may have been interrupted: the order of :meth:`own_files` tells how far it got.
        """
        former = RunFolder(self.replaced)
        if not former.own_files():
            return False
        is_new = former.config.is_file()  # else it was interrupted while files were moved, and all are the former run's
        replaced = is_new and self.config.is_file() and self.checkpoint("last").is_file()
        if replaced:
            former.clear()
        else:
            if is_new and self.config.is_file():
                self.clear()
            former._move(former.own_files()[::-1], self)
        self._remove_empty_folders()
        return not replaced

    def _move(self, files: Sequence[Path], to: "RunFolder") -> None:
        for file in files:
            target = to.path / file.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        self._remove_empty_folders()

    def _remove_empty_folders(self) -> None:
        folders = [self.path / name for name in ("checkpoints", "baselines", "tensorboard", "report")]
        for folder in (*folders, self.replaced):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def load_config(self) -> Config:
        """The run's configuration; a StaleError if there is no run here."""
        if not self.config.is_file():
            raise StaleError(f"no run in {self.path}: config.yaml is missing; train one with train.py --output")
        return load_config([self.config])

    def read_split(self) -> dict[str, Any]:
        """``split.json``, see :class:`stale.records.SplitFile`; empty if there is none."""
        if not self.split.exists():
            return {}
        split = read_json(self.split, "split of the run")
        return check_record(SplitFile, split, f"split of the run {self.split}", "train again into another --output")

    def changed(self, now: Mapping[str, Any]) -> list[str]:
        """The keys whose values are recorded in ``split.json`` and not those of ``now``."""
        earlier = self.read_split()
        return [key for key, value in now.items() if earlier.get(key, value) != value]

    def read_history(self) -> list[dict[str, Any]]:
        """The records of ``history.jsonl``, without a line that was not written completely."""
        records = []
        for line in read_text(self.history, "history").splitlines() if self.history.exists() else ():
            with suppress(ValueError, RecursionError, LookupError, TypeError):
                record = json.loads(line)
                records += [record] if record["epoch"] + 0 >= 0 else []
        return records


def _suffix(vocabulary: str) -> str:
    return "" if vocabulary == "unseen" else f"_{vocabulary}"


def oracle_suffix(oracle: Sequence[str]) -> str:
    """The part of a file name that tells which ground truth was used, in any order; empty without any."""
    return "".join(["_oracle", *(f"_{name}" for name in ORACLES if name in oracle)]) if oracle else ""


def command_line() -> str:
    """The command that is at work, as a shell line."""
    return shlex.join(["python", *sys.argv])


def start_logging() -> MemoryHandler:
    """Log to stderr, in all processes but the first errors only. :func:`log_into` takes the returned handler."""
    logger = logging.getLogger("stale")
    quiet = launched_together() and os.environ["RANK"] != "0"
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    kept = MemoryHandler(capacity=1, flushOnClose=False)
    for new in (console, kept):
        logger.addHandler(new)
    return kept


def log_into(path: Path, kept: MemoryHandler) -> None:
    """Append the records ``kept`` so far, and all further ones, to the file ``path``."""
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    kept.setTarget(file)
    kept.flush()


class _LogFile(logging.FileHandler):
    """A log that cannot be written is one error, not a traceback for every record."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        """Called where writing ``record`` failed."""
        raise StaleError(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}") from None
