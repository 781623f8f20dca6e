"""Running jobs: each command a process of its own, as many jobs at once as there are devices."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from tqdm import tqdm

from stale.errors import StaleError
from stale.files import read_json
from stale.reproduce.plan import Job

LOG = "reproduce.log"


class Runner:
    """Works off jobs; what is killed half-way, at any point, goes on when it is run again."""

    def __init__(self, root: Path, devices: Sequence[str] = ("",)) -> None:
        """Args:
        root: the project's folder, with its commands.
        devices: one job at a time on each: a GPU's number, ``cpu``, or empty for whatever there is.
        """
        self.root, self.devices = root, list(devices)
        self._free: SimpleQueue[str] = SimpleQueue()
        for device in self.devices:
            self._free.put(device)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Do what is left of ``jobs``, with a bar over all of them.

        Returns:
            Job name → what went wrong, for those that failed; the others are finished.
        """
        left = [job for job in jobs if job.unfinished()]
        failures: dict[str, str] = {}
        with tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="runs", unit="run", dynamic_ncols=True) as bar:
            for job, fault in self._work_off(left):
                bar.update()
                if fault:
                    failures[job.name] = fault
                bar.write(f"{job.name}: {fault or _figure(job)}", file=sys.stderr)
        return failures

    def _work_off(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        pool = ThreadPoolExecutor(len(self.devices))
        try:
            waiting: dict[Future[str], Job] = {pool.submit(self._run_job, job): job for job in jobs}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        finally:
            self._stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def _run_job(self, job: Job) -> str:
        """Run a job's commands one after another; what went wrong, or nothing."""
        device = self._free.get()
        try:
            with _locked(job.folder) as lock:
                return self._run_commands(job, device, lock)
        except StaleError as error:
            return str(error)
        finally:
            self._free.put(device)

    def _run_commands(self, job: Job, device: str, lock: IO[str]) -> str:
        path = job.folder / LOG
        for command in job.commands(self.root):
            with path.open("ab") as log:
                code = self._run_command([sys.executable, *command], device, log, lock)
            if self._stopped:
                return "stopped"
            if code:
                last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                return f"{Path(command[0]).name} failed ({code}): {''.join(last)[:300]}; see {path}"
        return ""

    def _run_command(self, command: Sequence[str], device: str, log: IO[bytes], lock: IO[str]) -> int:
        if self._stopped:
            return 1
        environment = dict(os.environ)
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=[lock.fileno()]
        )
        self._processes.add(process)
        try:
            return process.wait()
        finally:
            self._processes.discard(process)

    def _stop(self) -> None:
        self._stopped = True
        for process in list(self._processes):
            process.terminate()


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """Hold a run's folder. The commands inherit the lock: one that outlives a killed parent still holds it.

    Raises:
        StaleError: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StaleError("another process is at work in its folder; run the same command again later") from None
        yield file


def _figure(job: Job) -> str:
    """The average mAP of each of a finished job's tests."""
    figures = (read_json(job.folder / test.metrics, "metrics file")["average_mAP"] for test in job.tests)
    return "average mAP " + ", ".join(f"{100 * figure:.2f}" for figure in figures if figure is not None)
