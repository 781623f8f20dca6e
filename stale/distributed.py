"""Training and inference in several processes (``torchrun``); in a single one all functions return their argument."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from stale.errors import StaleError, launched_together, leave

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun started; an error ends all with one exit code, and is reported once."""
    if not launched_together():
        yield
        return
    try:
        store, own_rank, size = next(iter(dist.rendezvous("env://")))
        # Both: processes agree on the CPU while GPUs exchange gradients.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise StaleError(f"cannot connect with the other processes, start them with torchrun: {error}") from error
    try:
        yield
    except BaseException as error:
        # gloo raises plain RuntimeErrors where another process is gone.
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        if not lost and not isinstance(error, (StaleError, OSError, KeyboardInterrupt)):
            get_error_handler().record_exception(error)  # a defect: torchrun's report shows the traceback
            raise
        try:
            first = store.add("failed", 1) == 1
        except RuntimeError:  # the main process, which holds the store where torchrun does not, is gone
            first = is_main_process()
        if not first:
            leave(error)
        if lost:
            raise StaleError("another process of this run has ended; its message or the system log says why") from error
        raise
    dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this process, of rank 0, writes files and logs."""
    return rank() == 0


def local_device(device: torch.device, setting: str) -> torch.device:
    """``device``, or of several processes the own GPU if it is ``cuda``; ``setting`` names that choice in errors."""
    if world_size() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise StaleError(f"{setting} is {device}, one GPU for {world_size()} processes: use auto, cuda or cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if local_rank >= count:
        raise StaleError(f"more processes than GPUs ({count}): start them with --nproc_per_node={count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def all_reduce(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, without gradient."""
    if world_size() == 1:
        return values
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values


def all_gather(own: Tensor) -> Tensor:
    """Concatenate ``own`` (n, ...) of all N processes by rank: (N·n, ...). The gradient of ``own`` comes from all."""
    return own if world_size() == 1 else _AllGather.apply(own)


class _AllGather(torch.autograd.Function):
    """torch.distributed.nn.functional.all_gather has been deprecated without a public successor (torch 2.13)."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient).chunk(world_size())[rank()]


def gather(value: T) -> list[T]:
    """The pickled ``value`` of every process by rank, in every process."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def main_process_first(make: Callable[[], T]) -> T:
    """Call ``make`` in the main process, then in the others, which find what the first has downloaded."""
    made = make() if is_main_process() else None
    gather(None)  # waits for all
    return make() if made is None else made


def shard(items: Sequence[T]) -> Sequence[T]:
    """Every N-th of ``items``, from this process's rank."""
    return items[rank() :: world_size()]


def gather_in_order(results: Iterator[T], count: int) -> Iterator[T]:
    """In the main process, results of every process's :func:`shard` of ``count`` items, in the items' order."""
    for done in range(0, count, world_size()):  # one result of each process is in memory at a time
        found = gather(next(results, None))[: count - done]
        yield from found if is_main_process() else ()  # type: ignore[misc]
