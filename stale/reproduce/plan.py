"""From a table to independent jobs: one training, and every test of it that the table wants."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from stale.config import Config, differing_keys, load_config
from stale.errors import StaleError
from stale.reproduce.catalog import Row, Table
from stale.run import RunFolder

_MODEL_NAME = re.compile(r"(RN|ViT-)\w+(/\w+)?(@\w+)?$")


@dataclass(frozen=True)
class Sources:
    """What every run of a plan is made from: the project's folder, configuration files and settings over them."""

    root: Path
    configs: tuple[Path, ...]
    assignments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Test:
    """How a trained run is tested."""

    oracle: str | None = None
    ground_truth: str = "all"
    vocabulary: str = "unseen"

    __test__ = False  # not one of pytest's

    @property
    def metrics(self) -> str:
        """The name of the metrics file in the run's folder."""
        vocabulary = "" if self.vocabulary == "unseen" else f"_{self.vocabulary}"
        oracle = f"_oracle_{self.oracle}" if self.oracle else ""
        counted = "" if self.ground_truth == "all" else f"_{self.ground_truth.replace('-', '_')}"
        return f"metrics{vocabulary}{oracle}{counted}.json"


@dataclass
class Job:
    """One training with its tests; nothing else writes into its folder."""

    folder: Path
    config: Config
    files: tuple[Path, ...]
    settings: tuple[str, ...]
    tests: list[Test] = field(default_factory=list)

    @property
    def name(self) -> str:
        """``stale-0123abcd/75_25_0``."""
        return "/".join(self.folder.parts[-2:])

    def unfinished(self) -> list[Test]:
        """The tests without metrics; all of them where the folder holds no run of this configuration."""
        run = RunFolder(self.folder)
        try:
            same = run.config.is_file() and run.load_config() == self.config
        except StaleError:
            same = False
        return [test for test in self.tests if not same or not (self.folder / test.metrics).is_file()]

    def commands(self, root: Path) -> list[list[str]]:
        """The commands that are left to do, without the interpreter; run again they go on where they stopped."""
        tests = self.unfinished()
        if not tests:
            return []
        files = [_relative(file) for file in self.files]
        folder = _relative(self.folder)
        train = [_relative(root / "train.py"), "--config", *files, "--set", *self.settings]
        lines = [[*train, "--output", folder, "--resume"]]
        for vocabulary, oracle in dict.fromkeys((test.vocabulary, test.oracle) for test in tests):
            asked = [] if vocabulary == "unseen" else ["--vocabulary", vocabulary]
            asked += ["--oracle", oracle] if oracle else []
            lines.append([_relative(root / "inference.py"), "--run", folder, *asked])
        return lines + [self._evaluation(test, root) for test in tests]

    def _evaluation(self, test: Test, root: Path) -> list[str]:
        line = [_relative(root / "eval.py")]
        if test.oracle:
            predictions = RunFolder(self.folder).detections(test.vocabulary, test.oracle)
            line += ["--predictions", _relative(predictions), "--annotations", self.config.data.annotations]
        else:
            line += ["--run", _relative(self.folder)]
            line += [] if test.vocabulary == "unseen" else ["--vocabulary", test.vocabulary]
        if test.ground_truth != "all":
            line += ["--ground-truth", test.ground_truth]
        own_file = not test.oracle and test.ground_truth == "all"  # eval.py --run writes it by itself
        return line if own_file else [*line, "--json", _relative(self.folder / test.metrics)]


@dataclass(frozen=True)
class Cell:
    """One row of a table under one setting of classes: its jobs, a split each, and the test that counts."""

    row: Row
    setting: str
    test: Test
    jobs: tuple[Job, ...]


def make_plan(
    table: Table, rows: Sequence[Row], settings: Sequence[str], splits: Sequence[int], output: Path, sources: Sources
) -> list[Cell]:
    """The cells of a table; rows that train the same share their jobs.

    Raises:
        StaleError: a configuration is not sound.
    """
    jobs: dict[Path, Job] = {}
    cells = []
    for setting in settings:
        for row in rows:
            test = Test(row.oracle, row.ground_truth, row.vocabulary)
            made = [_job(row, setting, split, output, sources) for split in _splits_of(setting, splits, sources)]
            shared = tuple(jobs.setdefault(job.folder, job) for job in made)
            for job in shared:
                job.tests.extend([test] if test not in job.tests else [])
            cells.append(Cell(row, setting, test, shared))
    return cells


def jobs_of(cells: Sequence[Cell]) -> list[Job]:
    """Every job once, in the order of the table."""
    return list({job.folder: job for cell in cells for job in cell.jobs}.values())


def missing_inputs(jobs: Sequence[Job]) -> list[str]:
    """What the jobs need and is not there, a line each, with what to do."""
    found: dict[str, None] = {}
    for data, text in {id(job): (job.config.data, job.config.model.text) for job in jobs}.values():
        features = [data.features] if isinstance(data.features, str) else data.features
        needed = [("annotations", "data.annotations", data.annotations)]
        needed += [("features", "data.features", path) for path in features]
        needed += [("class splits", "data.splits", data.splits)] if data.splits else []
        if not _MODEL_NAME.match(text.weights):  # a model's name is downloaded with its checksum
            needed.append(("text weights", "model.text.weights", text.weights))
        for what, key, path in needed:
            if not path:
                found[f"{what}: not set; give them by --set {key}=…"] = None
            elif not Path(path).exists():
                found[f"{what}: {path} is not there"] = None
    return list(found)


def shell_line(commands: Sequence[Sequence[str]], interpreter: str = "python") -> str:
    """The commands as one line of a shell script: each only if the one before it succeeded."""
    return " && ".join(shlex.join([interpreter, *command]) for command in commands)


def _job(row: Row, setting: str, split: int, output: Path, sources: Sources) -> Job:
    overlays = (*row.overlays, *(row.overlays_50_50 if setting == "50_50" else ()))
    files = (*sources.configs, *(sources.root / "configs" / name for name in overlays))
    number = f"data.fold={split}" if setting == "seen_cv" else f"data.split={split}"
    settings = (*row.settings, *sources.assignments, f"data.setting={setting}", number)
    config = load_config(files, settings)
    folder = output / "runs" / f"{_slug(row.method)}-{_digest(config)}" / f"{setting}_{split}"
    return Job(folder, config, files, settings)


def _splits_of(setting: str, splits: Sequence[int], sources: Sources) -> Sequence[int]:
    if setting == "seen_cv":
        folds = load_config(sources.configs, sources.assignments).data.folds
        return [split for split in splits if split < folds]
    return [0] if setting == "closed" else splits  # there is nothing to split


def _slug(method: str) -> str:
    return {"released code": "stale"}.get(method, method.lower())


def _digest(config: Config) -> str:
    """What tells trainings apart, apart from the classes: another configuration gets another folder.

    Only what departs from the defaults counts, so that a setting added later leaves finished runs where they are.
    """
    values = asdict(config)
    apart: dict[str, Any] = {}
    for key in differing_keys(config, Config()):
        if key not in ("data.setting", "data.split", "data.fold"):
            apart[key] = reduce(lambda section, name: section[name], key.split("."), values)
    return hashlib.sha256(json.dumps(apart, sort_keys=True).encode()).hexdigest()[:8]


def _relative(path: Path) -> str:
    return os.path.relpath(path)
