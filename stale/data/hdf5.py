"""HDF5 files: read with their damage named and nothing taken on trust, written so that a full disk is one error."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stale.errors import StaleError, name_some
from stale.files import HARMLESS, MAX_RATIO, atomic_path

_MANY = 1000  # chunks of a list of names

# A header can promise any size: nothing is read of a video that has more bytes than an hour of frames, 4096 wide.
MAX_BYTES = 4 << 30

_DAMAGE = (OSError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError)

_ADDRESS = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])  # stands for a text of any length


@contextmanager
def damage_named(fault: str) -> Iterator[None]:
    """Damage to an HDF5 file shows in whichever layer meets it first, as that layer's own exception."""
    try:
        yield
    except _DAMAGE as error:
        raise StaleError(f"{fault} ({error})") from None


def read_array(data: h5py.Dataset, index: Any, where: str) -> np.ndarray:
    """``data[index]``.

    Args:
        index: ``()`` for all of it, or a place on the first axis.
        where: names the data in errors.

    Raises:
        StaleError: it is damaged, or asks for more memory than its bytes justify.
    """
    with damage_named(f"{where} cannot be read"):
        _refuse_bomb(data, index, where)
        return data[index]


def read_ids(data: h5py.Dataset, where: str) -> list[str]:
    """The video ids (N) in a one-dimensional dataset of texts, of one length or each of its own.

    Raises:
        StaleError: they are no texts, damaged, or ask for more memory than the file has bytes.
    """
    if h5py.check_string_dtype(data.dtype) is None:
        raise StaleError(f"{where} must be the videos' ids as text, not {data.dtype}")
    with damage_named(f"{where} cannot be read"):
        _refuse_bomb(data, (), where)
        if h5py.check_string_dtype(data.dtype).length is None:
            return [text.decode("utf-8", "surrogateescape") for text in _read_heaped(data, where)]
        return [str(text) for text in data.asstr(errors="surrogateescape")[()]]


def as_ids(names: Sequence[str]) -> np.ndarray:
    """Video ids (N) as they are best written: of one length, so that they lie side by side and not in heaps."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    return np.array(encoded, h5py.string_dtype("utf-8", max(map(len, encoded), default=1)))


def locate_rows(data: h5py.Dataset, rows: Sequence[int]) -> np.ndarray | None:
    """Where each of the ``rows`` (N) of ``data`` begins in the file, in bytes: (N) int64.

    None where they cannot be taken from there as they are: rows packed, spread over chunks, never written, in another
    file, or numbers that are no float16 or float32 of this machine.
    """
    plain = data.dtype in (np.float16, np.float32) and not data.external and not data.is_virtual
    if not plain or data.id.get_create_plist().get_nfilters() or 0 in data.shape:
        return None
    size = math.prod(data.shape[1:]) * data.dtype.itemsize
    if data.chunks is None:
        start = data.id.get_offset()
        return None if start is None else start + size * np.asarray(rows, np.int64)
    if data.chunks != (1, *data.shape[1:]):
        return None
    rest = (0,) * (data.ndim - 1)
    places = [data.id.get_chunk_info_by_coord((int(row), *rest)) for row in rows]
    if any(place.byte_offset is None or place.size != size for place in places):
        return None
    return np.array([place.byte_offset for place in places], np.int64)


@contextmanager
def new_hdf5(path: str | Path) -> Iterator[h5py.File]:
    """A file to be filled, which takes its place at ``path`` only when it is whole.

    Raises:
        StaleError: it cannot be written: no permission, no space left.
    """
    with atomic_path(path) as temporary, _Sink(temporary) as sink:
        try:
            with h5py.File(sink, "w") as file:
                yield file
        finally:
            if sink.fault is not None:  # whatever else went wrong came of it
                raise sink.fault


class _Sink(io.FileIO):
    """A file that takes everything, and remembers the first thing it could not keep.

    libhdf5 cannot close a file that it cannot write: it prints an account of its own, again at the end of the process,
    and may crash there. So it must not learn of a full disk.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+b")
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.fault is None:
            try:
                return self._write_all(memoryview(data).cast("B"))
            except OSError as error:
                self.fault = error
        return size

    def _write_all(self, data: memoryview) -> int:
        """The system may take a part, and say why only when asked to take the rest."""
        done = 0
        while done < len(data):
            done += super().write(data[done:])
        return done

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.fault = self.fault or error
            return size or 0

    def readinto(self, buffer: Any) -> int:
        """What was not kept reads as zeros, as what was not written does."""
        view = memoryview(buffer).cast("B")
        done = super().readinto(view) or 0
        view[done:] = bytes(len(view) - done)
        return len(view)


def _refuse_bomb(data: h5py.Dataset, index: Any, where: str) -> None:
    """Stop before memory is taken for an absurd shape, or for packed data that unpack to far more than honest ones."""
    if data.external:
        raise StaleError(f"{where} lies outside the file, in {name_some(name for name, *_ in data.external)}: refused")
    if data.is_virtual:
        raise StaleError(f"{where} lies outside the file, in others that a virtual dataset names: refused")
    shape = data.shape if index == () else data.shape[1:]
    size = math.prod(shape) * data.dtype.itemsize
    taken = max(size, math.prod(data.chunks or ()) * data.dtype.itemsize)  # a chunk is unpacked as a whole
    stored = data.id.get_storage_size()
    if taken > MAX_BYTES or (taken > HARMLESS and taken > MAX_RATIO * stored):
        raise StaleError(f"{where} has {stored:,} bytes that claim to be {taken:,}: refused")


def _read_heaped(data: h5py.Dataset, where: str) -> list[bytes]:
    """Texts each of its own length, which HDF5 keeps in heaps (format specification, III.E).

    Read here, not by libhdf5: it takes whatever memory a damaged length asks for, and a damaged heap stops it forever.
    """
    addresses = _addresses(data)
    if addresses is None:
        raise StaleError(f"{where} are stored in an unusual way: refused; write them as texts of one length")
    heaps, left = {}, data.file.id.get_filesize()
    with open(data.file.filename, "rb") as file:
        for start in np.unique(addresses["heap"][addresses["length"] > 0]).tolist():
            heaps[start], size = _read_heap(file, start, left)
            left -= size
    rows = ((row["heap"].item(), row["index"].item(), row["length"].item()) for row in addresses)
    return [heaps[heap][index][:length].partition(b"\0")[0] if length else b"" for heap, index, length in rows]


def _addresses(data: h5py.Dataset) -> np.ndarray | None:
    """Where the texts of ``data`` (N) are kept: (N) of :data:`_ADDRESS`; None where that does not simply lie there."""
    plan, file = data.id.get_create_plist(), data.file.id.get_create_plist()
    if plan.get_nfilters() or file.get_sizes()[0] != 8 or file.get_userblock():
        return None
    found = np.zeros(len(data), _ADDRESS)
    if plan.get_layout() == h5py.h5d.CHUNKED and data.id.get_num_chunks() <= _MANY:
        for number in range(data.id.get_num_chunks()):
            place = data.id.get_chunk_info(number).chunk_offset
            part = np.frombuffer(data.id.read_direct_chunk(place)[1], _ADDRESS)[: len(data) - place[0]]
            found[place[0] : place[0] + len(part)] = part
        return found
    if plan.get_layout() != h5py.h5d.CONTIGUOUS:
        return None
    if data.id.get_offset() is not None:  # else they were never written
        with open(data.file.filename, "rb") as raw:
            raw.seek(data.id.get_offset())
            found[:] = np.frombuffer(raw.read(found.nbytes), _ADDRESS)
    return found


def _read_heap(file: io.BufferedIOBase, start: int, most: int) -> tuple[dict[int, bytes], int]:
    """The texts of one heap by their numbers, and its size.

    Raises:
        ValueError: there is no heap at ``start``, or one that claims more than ``most`` bytes.
    """
    file.seek(start)
    head = file.read(16)
    size = int.from_bytes(head[8:], "little")
    if head[:5] != b"GCOL\1" or not 16 <= size <= most:
        raise ValueError(f"no heap of texts at byte {start}, or one of more bytes than the file has")
    body = file.read(size - 16)
    found, place = {}, 0
    while place + 16 <= len(body):
        index, length = (int.from_bytes(body[place + at : place + to], "little") for at, to in ((0, 2), (8, 16)))
        if index == 0:  # what follows is free
            break
        found[index] = body[place + 16 : place + 16 + length]
        place += 16 + length + -length % 8
    return found, size
