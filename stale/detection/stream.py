"""Work on more videos than memory holds: batches that are read while the one before is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def in_batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """``items`` cut into parts of ``size``, the last of what is left."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def read_ahead(read: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    """Each of ``items`` with what ``read`` makes of it, in order; the next is read in a thread, and none beyond it.

    What ``read`` raises is raised at its item.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = [pool.submit(read, item) for item in items[:1]]
        for number, item in enumerate(items):
            result = coming.pop().result()
            coming = [pool.submit(read, following) for following in items[number + 1 : number + 2]]
            yield item, result
            del result  # or it would be held while the one after the next is read
