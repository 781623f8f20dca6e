"""The project's commands in processes of their own that start at once, to be killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# A server imports torch once and forks for every command: a process costs a tenth of a second, not three.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["stale.training.trainer", "stale.detection.inference", "torch._dynamo", "torch.utils.tensorboard"]
)


@dataclass(frozen=True)
class Running:
    """A command at work; ``errors`` takes what it says on stderr."""

    process: BaseProcess
    errors: Path

    def wait(self, until: Callable[[], bool], seconds: float = 60.0, look: Callable[[], None] = lambda: None) -> bool:
        """Call ``look`` again and again until ``until`` or the process's end; whether ``until`` came true."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < end:
            look()
            if until():
                return True
            time.sleep(0.01)
        return until()

    def finish(self, seconds: float = 60.0) -> int:
        """Wait for the end; the exit code, negative for a signal that killed."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still at work after {seconds} s: {self.said()}"
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal, to a process that may have come to its end."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def said(self) -> str:
        """All of its stderr so far."""
        return self.errors.read_text(encoding="utf-8")


def start(
    errors: Path,
    script: str,
    *arguments: str,
    largest_file: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Running:
    """Start ``python script arguments``.

    Args:
        largest_file: bytes; a file that would grow beyond fails to be written, as on a full disk.
        environment: variables besides those there are.
    """
    settings = (str(errors), script, arguments, largest_file, dict(environment or {}))
    process = _CONTEXT.Process(target=_run, args=settings, daemon=True)
    process.start()
    return Running(process, errors)


def start_together(errors: Path, count: int, script: str, *arguments: str) -> list[Running]:
    """Start ``count`` processes of a command as ``torchrun`` does, each with a file of its own in ``errors``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    errors.mkdir(parents=True, exist_ok=True)

    def start_one(rank: int) -> Running:
        environment = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return start(errors / f"{rank}.txt", script, *arguments, environment=environment)

    return [start_one(rank) for rank in range(count)]


def _run(
    errors: str, script: str, arguments: tuple[str, ...], largest_file: int | None, environment: dict[str, str]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [script, *arguments]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")
