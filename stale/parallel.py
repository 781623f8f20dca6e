"""Several processes at one task, as ``torchrun --nproc_per_node=N train.py ...`` starts them; torch.distributed.

Each process works on its share, on a GPU of its own or on the CPU: tensors on GPUs go through NCCL, all else through
gloo. With a single process nothing is initialised and everything here gives back what it is given.
"""

from __future__ import annotations

import gc
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stale.errors import BAD_INPUT, INTERRUPTED, TERMINATED, StaleError, Terminated

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that a launcher started together are connected; without a launcher it does nothing.

    Whatever ends them, bad input or a signal, only one of them raises it and so has it reported: the others leave
    silently with the same exit code.

    Raises:
        StaleError: the processes cannot be connected, or another one has come to an unforeseen end.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    store = _connect()
    try:
        yield
    except (StaleError, OSError, KeyboardInterrupt) as error:
        is_first = _is_first_to_fail(store)
        _disconnect(error)
        if is_first:
            raise
        raise SystemExit(_exit_code(error)) from None
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        is_first = _is_first_to_fail(store)
        _disconnect(error)
        if is_first:
            lost = "another process of this run has ended: what it says itself, or the system's log, tells why"
            raise StaleError(lost) from error
        raise SystemExit(BAD_INPUT) from None
    _disconnect()


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_joined() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _is_joined() else 0


def is_first() -> bool:
    """Whether this is the process that writes files and tells the user."""
    return rank() == 0


def hush_others() -> None:
    """What is worth a word concerns all alike: the first process says it, the others report no more than errors."""
    if not is_first():
        logging.getLogger("stale").setLevel(logging.ERROR)


def own_device(device: torch.device, setting: str) -> torch.device:
    """``device`` as chosen for all → this process's: of several on a machine, each has a GPU of its own.

    Args:
        setting: where the device was chosen, for the message.

    Raises:
        StaleError: one GPU is named for all processes, or there are fewer GPUs than processes.
    """
    if size() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise StaleError(f"{setting} is {device}, one GPU for {size()} processes: use auto, cuda or cpu")
    place, count = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if place >= count:
        usable = f"{count} GPU{' is' if count == 1 else 's are'} usable here"
        raise StaleError(f"more processes than GPUs, {usable}: start them with --nproc_per_node={count}")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def total(values: Tensor) -> Tensor:
    """The sum of all processes' ``values``, on their device, without waiting for a GPU; no gradient passes."""
    if size() == 1:
        return values
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values


def concatenate(own: Tensor) -> Tensor:
    """Each process's ``own`` (n, ...), by rank one after the other: (N·n, ...), the same on all.

    The gradient of what is a process's own comes from what all of them make of it.
    """
    return own if size() == 1 else _Concatenation.apply(own)


def highest(*values: int) -> list[int]:
    """Of each of ``values`` the highest that any process has: how all decide alike."""
    if size() == 1:
        return list(values)
    every = torch.tensor(values)
    dist.all_reduce(every, op=dist.ReduceOp.MAX)
    return every.tolist()


def wait_for_all() -> None:
    """Go on once every process is here."""
    highest(0)


def after_first(make: Callable[[], T]) -> T:
    """What ``make`` gives; the others wait for the first process, which may have to download what they then find."""
    if not is_first():
        wait_for_all()
    made = make()
    if is_first():
        wait_for_all()
    return made


def gather(value: T) -> list[T]:
    """Every process's ``value`` by rank, on the first process; [] on the others. Values are pickled."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size() if is_first() else []
    dist.gather_object(value, values if is_first() else None)
    return values


def from_first(value: T) -> T:
    """The first process's ``value`` on every process. Values are pickled."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's of ``items``: every N-th of N processes, so that shares differ by one item at most."""
    return items[rank() :: size()]


def in_order(results: Iterator[T], count: int) -> Iterator[T]:
    """What the processes make of their :func:`share` of ``count`` items: all, in the items' order, on the first.

    The others run along and get nothing. No more than a result a process is held at a time.
    """
    for done in range(0, count, size()):
        yield from gather(next(results, None))[: count - done]  # type: ignore[misc]


class _Concatenation(torch.autograd.Function):
    """See :func:`concatenate`; made of what every backend can do."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return total(gradient).chunk(size())[rank()]


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _connect() -> dist.Store:
    """Connect with the others, by the addresses in the environment; the store that all can read and write."""
    try:
        store, rank, size = next(iter(dist.rendezvous("env://")))
        # Both: GPUs exchange gradients while processes on the CPU agree whether to stop.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise StaleError(f"cannot connect with the other processes, start them with torchrun: {reason}") from error
    return store


def _disconnect(error: BaseException | None = None) -> None:
    """Let go of the others, and end the connection's threads: one that outlives the interpreter has it abort.

    They end once nothing uses the connection any more, which an error's frames do.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
    if error is None or isinstance(error, KeyboardInterrupt) or dist.get_backend() == "gloo":
        dist.destroy_process_group()  # which on GPUs would wait for what those that failed will never send


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # who kept the store has left: the first process, where no launcher keeps it
        return is_first()


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether a process waited for another that is gone; gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _exit_code(error: BaseException) -> int:
    """As of :func:`stale.errors.run_command`."""
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    return BAD_INPUT
