"""Turn a table into independent jobs, one training each with all its tests, and run them on several devices."""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from threading import Event, local
from typing import IO, Any

from paper_tables.catalog import Row, Table
from stale.config import Config, differing_keys, flat, load_config, missing_files, save_config
from stale.errors import StaleError
from stale.evaluation.results import ALLOW_UNSEEN
from stale.io import file_sha256
from stale.progress import progress_bar
from stale.run_folder import RunFolder, oracle_suffix

_FIXES = {
    "data.features": "; give them by --features, and those of the row i3d by --i3d-features",
    "video scores": "; give the file by --video-scores, or choose rows without external scores by --rows",
}

# Settings of detection that a calibration does not depend on.
_AFTER_CALIBRATION = {"proposals", "voting", "nms", "nms_sigma", "max_detections", "batch_size", "oracle"}


@dataclass(frozen=True)
class Sources:
    """What all runs of a plan share: the project's folder, configuration files, and settings applied after them.

    ``i3d_features`` and ``video_scores`` are the inputs of those rows that need them.
    """

    root: Path
    configs: tuple[Path, ...]
    assignments: tuple[str, ...] = ()
    i3d_features: str = ""
    video_scores: str = ""


@dataclass(frozen=True)
class Evaluation:
    """How a trained run is tested; see :class:`paper_tables.catalog.Row`."""

    oracle: tuple[str, ...] = ()
    ground_truth: str = "all"
    vocabulary: str = "unseen"
    video_scores: str | None = None  # the file of external ones to apply
    tested_on: str = ""

    @property
    def metrics(self) -> str:
        """The name of the metrics file in the run's folder."""
        vocabulary = "" if self.vocabulary == "unseen" else f"_{self.vocabulary}"
        counted = "" if self.ground_truth == "all" else f"_{self.ground_truth.replace('-', '_')}"
        external = "" if self.video_scores is None else f"_external_{_content_name(Path(self.video_scores))}"
        on = f"_on_{self.tested_on}" if self.tested_on else ""
        return f"metrics{on}{vocabulary}{oracle_suffix(self.oracle)}{counted}{external}.json"


@cache
def _content_name(file: Path) -> str:
    """A name of ``file`` that tells its content: others may have the same name."""
    return f"{file.stem}_{file_sha256(file)[:8]}" if file.is_file() else file.stem


@dataclass
class Job:
    """One training and its tests, in a run folder of its own."""

    folder: Path
    config: Config
    files: tuple[Path, ...]
    settings: tuple[str, ...]
    tests: list[Evaluation] = field(default_factory=list)
    twin: "Job | None" = None  # an earlier one with the same training: only settings of detection differ

    @property
    def name(self) -> str:
        """The last two parts of the folder, such as ``stale-0123abcd/75_25_0``."""
        return "/".join(self.folder.parts[-2:])

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run of this configuration."""
        run = RunFolder(self.folder)
        try:
            return run.config.is_file() and run.load_config() == self.config
        except StaleError:
            return False

    @property
    def trained(self) -> bool:
        """Whether its training has ended: the model card is written then."""
        return self.begun and RunFolder(self.folder).card.is_file()

    def unfinished(self) -> list[Evaluation]:
        """The tests without metrics."""
        begun = self.begun
        return [test for test in self.tests if not begun or not (self.folder / test.metrics).is_file()]

    def take_over_training(self) -> None:
        """Copy the training of the twin, if that has ended and this job has not begun."""
        run = RunFolder(self.folder)
        if self.twin is None or run.config.exists() or not self.twin.trained:
            return
        other = RunFolder(self.twin.folder)
        run.checkpoint("best").parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(other.checkpoint("best"), run.checkpoint("best"))
        for file in ("split", "history", "log", "card"):
            shutil.copyfile(getattr(other, file), getattr(run, file))
        save_config(self.config, run.config)  # last: it makes the folder a run

    def commands(self, root: Path) -> list[list[str]]:
        """The commands still to run, without the interpreter; a command that was killed resumes."""
        tests, path = self.unfinished(), os.path.relpath
        if not tests:
            return []
        names = ("train.py", "inference.py", "eval.py")
        run, train, inference, evaluation = map(path, (self.folder, *(root / name for name in names)))
        lines = []
        if not self.trained:
            lines = [[train, "--config", *map(path, self.files), "--set", *self.settings, "--output", run, "--resume"]]
        for vocabulary, oracle, on in dict.fromkeys((test.vocabulary, test.oracle, test.tested_on) for test in tests):
            options = ["--oracle", *oracle] if oracle else []
            where = ["--test-config", path(root / f"configs/{on}.yaml")] if on else ["--vocabulary", vocabulary]
            lines.append([inference, "--run", run, *where, *options])
        for test in tests:
            line = [evaluation, "--run", run, "--vocabulary", test.vocabulary]
            if test.oracle or test.tested_on:
                other = load_config([root / f"configs/{test.tested_on}.yaml"]) if test.tested_on else self.config
                data, name = other.data, other.data.dataset if test.tested_on else test.vocabulary
                detections = path(RunFolder(self.folder).detections(name, test.oracle))
                line = [evaluation, "--predictions", detections, "--annotations", data.annotations]
            if test.video_scores:
                line += ["--video-scores", path(test.video_scores), ALLOW_UNSEEN]
            if test.metrics != RunFolder(self.folder).metrics(test.vocabulary).name:  # which --run writes
                line += ["--ground-truth", test.ground_truth, "--json", path(self.folder / test.metrics)]
            lines.append(line)
        return lines


@dataclass(frozen=True)
class Cell:
    """One row of a table under one setting of classes: one job a split, and the test whose metrics count."""

    row: Row
    setting: str
    test: Evaluation
    jobs: tuple[Job, ...]


def make_plan(
    table: Table, rows: Sequence[Row], settings: Sequence[str], *, splits: Sequence[int], output: Path, sources: Sources
) -> list[Cell]:
    """Plan the cells of a table; rows with the same training share their jobs."""
    jobs: dict[Path, Job] = {}
    cells = []
    own = load_config(sources.configs, sources.assignments).data
    for setting, row in product(settings, [row for row in rows if row.tested_on != own.dataset]):
        scores = sources.video_scores if row.external else None
        test = Evaluation(row.oracle, row.ground_truth, row.vocabulary, scores, tested_on=row.tested_on)
        overlays = (*row.overlays, *(row.overlays_50_50 if setting == "50_50" else ()))
        files = (*sources.configs, *(sources.root / "configs" / name for name in overlays))
        method = "stale" if row.trivial or row.method == "released code" else row.method.lower()
        kind = "fold" if setting == "seen_cv" else "split"
        numbers = {"closed": [0], "seen_cv": [split for split in splits if split < own.folds]}.get(setting, splits)
        shared = []
        for number in numbers:
            given = (*sources.assignments, *([f"data.features=[{sources.i3d_features}]"] if row.i3d else []))
            changes = (*row.settings, *given, f"data.setting={setting}", f"data.{kind}={number}")
            config = load_config(files, changes)
            folder = output / "runs" / f"{method}-{_digest(config)}" / f"{setting}_{number}"
            job = jobs.setdefault(folder, Job(folder, config, files, changes))
            job.tests.extend([test] if test not in job.tests else [])
            shared.append(job)
        cells.append(Cell(row, setting, test, tuple(shared)))
    # A checkpoint serves all of detection where there are not several to choose from. One with a calibration serves
    # those without, and those whose calibration is the same.
    trained: dict[str, Job] = {}
    for job in sorted(jobs.values(), key=lambda job: job.config.detection.classify_by != "calibrated"):
        if job.config.train.validate_every >= job.config.train.epochs:
            detection, training = job.config.detection, job.config.model_dump_json(exclude={"detection"})
            calibrated = detection.classify_by == "calibrated"
            calibration = detection.model_dump_json(exclude=_AFTER_CALIBRATION) if calibrated else ""
            first = trained.setdefault(training + calibration, job)
            trained.setdefault(training, first)
            job.twin = None if first is job else first
    return cells


def _digest(config: Config) -> str:
    """Hash the settings of a training other than its classes; they name its folder.

    Only departures from the defaults count, so that a setting added later leaves finished runs in place.
    """
    keys = set(differing_keys(config, Config())) - {"data.setting", "data.split", "data.fold"}
    changed = {key: value for key, value in flat(config).items() if key in keys}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]


def jobs_of(cells: Sequence[Cell]) -> list[Job]:
    """Return each job once, in the order of the table."""
    return list({job.folder: job for cell in cells for job in cell.jobs}.values())


def missing_inputs(jobs: Sequence[Job], root: Path) -> list[str]:
    """Name each input of the jobs that does not exist, with the fix; ``root`` has the configurations of other data."""
    found: dict[str, None] = {}
    for job in jobs:
        scores = [test.video_scores for test in job.tests if test.video_scores is not None]
        absent = [("video scores", path) for path in scores if not path or not Path(path).exists()]
        for on in {test.tested_on for test in job.tests if test.tested_on}:
            other = missing_files(load_config([root / f"configs/{on}.yaml"]))
            absent += [(f"{on}: {key}", path) for key, path in other if key in ("data.annotations", "data.features")]
        for key, path in [*missing_files(job.config), *absent]:
            found[f"{key}: {path} does not exist" if path else f"{key}: not set{_FIXES.get(key, '')}"] = None
    return list(found)


def shell_line(commands: Sequence[Sequence[str]]) -> str:
    """Join commands to one shell line, which stops at the first that fails."""
    return " && ".join(shlex.join(["python", *command]) for command in commands)


def run_jobs(jobs: Sequence[Job], root: Path, devices: Sequence[str] = ("",)) -> dict[str, str]:
    """Run the unfinished ones of ``jobs``, one at a time on each device (a GPU's number, ``cpu``, or empty for any).

    A job that was killed at any point resumes when it is run again. Returns the error of each job that failed, by name.
    """
    left = sorted((job for job in jobs if job.unfinished()), key=lambda job: job.twin is not None)
    free, thread = list(devices), local()  # each thread of the pool takes a device
    processes: set[subprocess.Popen[bytes]] = set()
    failures: dict[str, str] = {}
    bar = progress_bar(total=len(jobs), initial=len(jobs) - len(left), desc="runs", unit="run")
    stopped = Event()

    def take_device() -> None:
        thread.device = free.pop()

    def run_job(job: Job) -> str:
        """Run the job's commands one after another; return the error, empty on success."""
        log_path = job.folder / "reproduce.log"
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / ".lock").open("w") as lock:  # inherited by the commands, which may outlive a killed parent
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"another process is working in {job.folder}"
            job.take_over_training()
            for command in job.commands(root):
                if stopped.is_set():
                    return "stopped"
                with log_path.open("ab") as log:
                    code = run_process([sys.executable, *command], thread.device, (log, lock), processes)
                if code:
                    last = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                    return f"{Path(command[0]).name} failed ({code}): {''.join(last)[:300]}; see {log_path}"
        return ""

    pool = ThreadPoolExecutor(len(devices), initializer=take_device)
    try:
        futures = {pool.submit(run_job, job): job for job in left}
        for future in as_completed(futures):
            name, error = futures[future].name, future.result()
            failures |= {name: error} if error else {}
            bar.update()
            bar.write(f"{name}: {error or 'finished'}", file=sys.stderr)
    finally:  # Ctrl-C and SIGTERM arrive here as exceptions: the commands must not outlive the pool
        stopped.set()
        for process in list(processes):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    return failures


def run_process(
    command: Sequence[str], device: str, files: tuple[IO[bytes], IO[str]], processes: set[subprocess.Popen[bytes]]
) -> int:
    """Run a command on a device, with its log and lock; ``processes`` holds it meanwhile."""
    log, lock = files
    visible = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device} if device else {}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "pass_fds": [lock.fileno()]}
    with subprocess.Popen(command, env=os.environ | visible, **streams) as process:
        processes.add(process)
        try:
            return process.wait()
        finally:
            processes.discard(process)
