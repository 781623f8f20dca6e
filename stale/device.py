"""The device and precision to compute in, determinism, and running out of memory as an error in one line."""

import os
import platform
import re
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from stale.errors import StaleError, counted


def choose_device(name: str, setting: str = "train.device") -> torch.device:
    """The device called ``name``; ``auto`` is the GPU if there is one; a StaleError names the ``setting``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise StaleError(f"{setting} '{name}' is unknown; use auto, cpu, cuda or cuda:N")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise StaleError(f"{setting} is {name}, but {counted(count, 'GPU')} can be used here; use auto or cpu")
    return device


def versions(device: torch.device) -> str:
    """The versions and the machine that results depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}, {gpu}"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {machine}"


def peak_memory(device: torch.device) -> int:
    """The most memory so far in bytes: of PyTorch on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Multiply matrices in ``precision`` inside the block; float32 changes nothing."""
    enabled = precision is not torch.float32
    return torch.autocast(device.type, precision if enabled else torch.bfloat16, enabled=enabled)


@contextmanager
def out_of_memory_hint(setting: str, value: int, advice: str = "") -> Iterator[None]:
    """Turn running out of memory inside the block into a StaleError that says to lower ``setting``, now ``value``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            where = "GPU"
        elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # a plain RuntimeError
            where = "main"
        else:
            raise
        raise StaleError(f"out of {where} memory: lower {setting} (now {value}){advice}") from error


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Use deterministic algorithms inside the block, if ``wanted``; PyTorch raises an error where it has none."""
    previous = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)
