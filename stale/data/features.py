"""Snippet features from disk: a folder of ``.npy``, one HDF5 file, or one packed HDF5 block.

Every form gives the same thing: for a video id, an array (snippets × width), float16 or float32.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stale.data.annotations import match_video_id
from stale.data.hdf5 import MAX_BYTES, damage_named, locate_rows, read_array, read_ids
from stale.data.tower import Tower
from stale.errors import StaleError, name_some
from stale.files import read_json

# What extraction records beside features: snippets a second, seconds, and where the snippets come from.
ATTRIBUTES = ("fps", "duration", "backbone", "weights_sha256", "sampling")

_EXPONENT = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000)}  # bytes of a number → its bits that are all 1 in NaN


class FeatureStore(ABC):
    """Read access to the features of many videos.

    Attributes:
        path: where they lie, for messages.
        ids: the video ids as the store writes them.
        width: D, the feature width shared by all videos.
    """

    path: Path
    ids: Collection[str]
    width: int

    @abstractmethod
    def _load(self, stored_id: str) -> np.ndarray: ...

    @abstractmethod
    def _count(self, stored_id: str) -> int: ...

    @abstractmethod
    def _recorded(self, stored_id: str) -> Mapping[str, Any]: ...

    @property
    def sources(self) -> Sequence[FeatureStore]:
        """The stores that this one consists of, itself where it is one."""
        return (self,)

    def find(self, video_id: str) -> str | None:
        """The store's id for a video (an optional ``v_`` is understood), or None where it is missing."""
        return match_video_id(video_id, self.ids)

    def read(self, video_id: str) -> np.ndarray:
        """Features of one video: (snippets, D), float16 or float32, finite.

        Raises:
            StaleError: the video is missing or its array is unusable; the message says why.
        """
        stored_id = self.find(video_id)
        if stored_id is None:
            raise StaleError(f"features of video '{video_id}' are missing in {self.path}")
        return check_features(self._load(stored_id), f"features of video '{video_id}' in {self.path}", self.width)

    def read_parts(self, video_id: str) -> list[np.ndarray]:
        """What :meth:`read` gives, one array a source: those of several sources may differ in their rate."""
        return [self.read(video_id)]

    def attributes(self, video_id: str) -> dict[str, Any]:
        """Those of :data:`ATTRIBUTES` that are recorded of a video, as text and numbers; others' features have none."""
        stored_id = self.find(video_id)
        recorded = {} if stored_id is None else self._recorded(stored_id)
        return {name: _plain(recorded[name]) for name in ATTRIBUTES if recorded.get(name) is not None}

    def extents(self, video_id: str, fps: float | None = None) -> list[float]:
        """How long the features say the video is, in seconds: as recorded, and by their number and rate.

        Without a recorded rate or duration nothing is known, and [] is returned: features rescaled to some number of
        snippets have no rate, and a rate that other videos have proves nothing of this one.

        Args:
            fps: snippets a second, for features that do not record it.

        Raises:
            StaleError: a rate or duration is recorded that cannot be one.
        """
        stored_id, where = self.find(video_id), f"features of video '{video_id}' in {self.path}"
        recorded = self.attributes(video_id)
        duration = recorded_number(recorded, "duration", where)
        rate = recorded_number(recorded, "fps", where) or fps
        found = [] if duration is None else [duration]
        return found if rate is None or stored_id is None else [*found, self._count(stored_id) / rate]

    def map_rows(self, video_ids: Sequence[str], num_snippets: int) -> MappedRows | None:
        """The features of ``video_ids`` where they lie on the disk, if they lie there as ``num_snippets`` each.

        Raises:
            StaleError: one of the videos is missing, or the file is damaged.
        """
        return None

    def tower(self) -> Tower:
        """The image tower that made the features, as far as the first of them tells."""
        return Tower.of(self.attributes(min(self.ids)))


class MappedRows:
    """Features of equally many snippets that stay on the disk and are read through a memory map.

    What was read lately is kept by the operating system, as long as nothing else needs the memory. A file that is cut
    short while it is mapped ends the process; replacing it, as :func:`stale.files.atomic_path` does, is no harm.

    Attributes:
        shape: (videos, T, D).
        dtype: float16 or float32.
    """

    def __init__(self, data: h5py.Dataset, offsets: np.ndarray, names: Sequence[str]) -> None:
        """Args:
        data: the packed block (rows × T × D), in an open file.
        offsets: where the features of each video begin in the file, in bytes.
        names: what each video is called in errors.

        Raises:
            StaleError: the file ends before them.
        """
        self.shape, self.dtype = (len(offsets), *data.shape[1:]), data.dtype
        self._size = math.prod(data.shape[1:]) * data.dtype.itemsize
        self._offsets, self._names = offsets, names
        # By the open file's handle, not its name, under which another file may lie by now.
        mapped = mmap.mmap(data.file.id.get_vfd_handle(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(mapped, np.uint8)
        beyond = np.flatnonzero((offsets < 0) | (offsets + self._size > len(self._bytes)))
        if len(beyond):
            raise StaleError(f"{names[beyond[0]]}: beyond the end of the file, which is damaged")

    @property
    def nbytes(self) -> int:
        """What all of them would take in memory."""
        return self._size * len(self._offsets)

    def read(self, places: np.ndarray, out: np.ndarray) -> None:
        """Read the videos at ``places`` (N) into ``out`` (N, T, D) of the same ``dtype``, in the order of the disk.

        Raises:
            StaleError: NaN or infinite values, named with their video.
        """
        if out.shape != (len(places), *self.shape[1:]) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(f"{out.dtype} {out.shape} cannot take {len(places)} videos of {self.dtype} {self.shape}")
        starts, raw = self._offsets[places], out.view(np.uint8).reshape(len(places), self._size)
        for row in np.argsort(starts):
            raw[row] = self._bytes[starts[row] : starts[row] + self._size]
            check_features(out[row], self._names[places[row]])


def open_features(path: str | Path | Sequence[str]) -> FeatureStore:
    """Open a folder of ``.npy`` files or an HDF5 file (a dataset a video, or a packed block), or several of them.

    Raises:
        StaleError: nothing is there, or it is neither form.
    """
    if not isinstance(path, (str, Path)):
        stores = [open_features(one) for one in path]
        return stores[0] if len(stores) == 1 else _SideBySide(stores)
    path = Path(path)
    if path.is_dir():
        return _NpyFolder(path)
    if not path.exists():
        raise StaleError(f"features not found: {path}; set data.features to a folder of .npy or an HDF5 file")
    with damage_named(f"features {path}: not an HDF5 file or damaged"):
        file = h5py.File(path, "r")
        packed = "ids" in file and "features" in file
        return _PackedBlock(path, file) if packed else _Hdf5PerVideo(path, file)


def check_features(array: np.ndarray, where: str, width: int | None = None) -> np.ndarray:
    """Return ``array`` if it can be used as features (snippets, D); float64 becomes float32.

    Raises:
        StaleError: wrong number of dimensions, no snippets, another width, not real numbers, NaN or infinity.
    """
    if np.ndim(array) != 2 or 0 in array.shape:
        raise StaleError(f"{where}: shape {np.shape(array)}; (snippets, width) with at least one snippet is expected")
    if width is not None and array.shape[1] != width:
        raise StaleError(f"{where}: width {array.shape[1]}, but the others are {width} wide")
    if array.dtype.kind != "f":
        raise StaleError(f"{where}: type {array.dtype}; float16 or float32 is expected")
    if array.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            array = array.astype(np.float32)
    if not _all_finite(array):
        raise StaleError(f"{where}: NaN or infinite values; extract this video's features again")
    return array


def recorded_number(recorded: Mapping[str, Any], name: str, where: str) -> float | None:
    """The number above 0 that is recorded as ``name``, None where none is.

    Raises:
        StaleError: something else is recorded.
    """
    value = recorded.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise StaleError(f"{where}: '{name}' is recorded as {value!r}; a number above 0 is expected")
    return float(value)


def _all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; float16 has no instruction for that, so that its bits are ten times faster.

    Args:
        array: float16 or float32.
    """
    kind, exponent = _EXPONENT[array.itemsize]
    return bool((array.view(kind) & kind(exponent)).max() != exponent)


class _NpyFolder(FeatureStore):
    """One ``<video>.npy`` a video."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Names with a dot in front are the system's (macOS leaves ._video.npy beside video.npy), not videos'.
        self.ids = {file.stem for file in path.glob("*.npy") if not file.name.startswith(".")}
        if not self.ids:
            raise StaleError(f"features folder {path} holds no .npy file")
        first = self._load(min(self.ids))
        if first.ndim != 2:
            raise StaleError(
                f"features of video '{min(self.ids)}' in {path}: shape {first.shape}, not (snippets, width)"
            )
        self.width = first.shape[1]

    def _load(self, stored_id: str) -> np.ndarray:
        return load_npy(self.path / f"{stored_id}.npy")

    def _count(self, stored_id: str) -> int:
        return (*_map_npy(self.path / f"{stored_id}.npy").shape, 0)[0]  # of a single number: none

    def _recorded(self, stored_id: str) -> Mapping[str, Any]:
        return read_sidecar(self.path / f"{stored_id}.npy")


class _Hdf5PerVideo(FeatureStore):
    """One dataset (snippets × width) a video at the top of an HDF5 file."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file
        self.ids = {name for name, item in file.items() if isinstance(item, h5py.Dataset)}
        if not self.ids:
            raise StaleError(f"features {path}: no dataset a video and no packed 'features' with 'ids'")
        shape = file[min(self.ids)].shape
        if len(shape) != 2:
            raise StaleError(f"features {path}: dataset '{min(self.ids)}' has shape {shape}, not (snippets, width)")
        self.width = shape[1]

    def _load(self, stored_id: str) -> np.ndarray:
        return read_array(self._file[stored_id], (), f"features {self.path}: video '{stored_id}'")

    def _count(self, stored_id: str) -> int:
        with damage_named(f"features {self.path}: video '{stored_id}' cannot be read"):
            return len(self._file[stored_id])

    def _recorded(self, stored_id: str) -> Mapping[str, Any]:
        with damage_named(f"features {self.path}: attributes of video '{stored_id}' cannot be read"):
            return {**self._shared, **self._file[stored_id].attrs}

    @cached_property
    def _shared(self) -> dict[str, Any]:
        """What is recorded of all videos at once."""
        return dict(self._file.attrs)


class _PackedBlock(FeatureStore):
    """Datasets ``features`` (videos × T × width) and ``ids`` (videos) of one HDF5 file."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._block = path, file["features"]
        ids = file["ids"]
        if not (_is_array(self._block, 3) and _is_array(ids, 1) and len(ids) == len(self._block)):
            raise StaleError(f"features {path}: 'features' must be videos × T × width with one of 'ids' a video")
        self._row = {name: row for row, name in enumerate(read_ids(ids, f"features {path}: 'ids'"))}
        if len(self._row) != len(ids):
            raise StaleError(f"features {path}: 'ids' names a video twice")
        self.ids = self._row.keys()
        self.width = self._block.shape[2]

    def _load(self, stored_id: str) -> np.ndarray:
        return read_array(self._block, self._row[stored_id], f"features {self.path}: video '{stored_id}'")

    def _count(self, stored_id: str) -> int:
        return self._block.shape[1]

    def _recorded(self, stored_id: str) -> Mapping[str, Any]:
        with damage_named(f"features {self.path}: attributes cannot be read"):
            return dict(self._block.file.attrs)

    def extents(self, video_id: str, fps: float | None = None) -> list[float]:
        """Nothing is known: videos of any length have the same number of snippets here."""
        return []

    def map_rows(self, video_ids: Sequence[str], num_snippets: int) -> MappedRows | None:
        """As of any store."""
        missing = [video_id for video_id in video_ids if self.find(video_id) is None]
        if missing:
            raise StaleError(f"features of {len(missing)} videos are missing in {self.path}: {name_some(missing)}")
        if self._block.shape[1] != num_snippets:
            return None
        with damage_named(f"features {self.path} cannot be read"):
            offsets = locate_rows(self._block, [self._row[self.find(video_id)] for video_id in video_ids])
            names = [f"features of video '{video_id}' in {self.path}" for video_id in video_ids]
            return None if offsets is None else MappedRows(self._block, offsets, names)


class _SideBySide(FeatureStore):
    """Several sources of the same videos, their features concatenated along the width (CLIP beside I3D)."""

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        self._stores = stores
        self.path = Path(" and ".join(str(store.path) for store in stores))
        self.ids = {name for name in stores[0].ids if all(store.find(name) is not None for store in stores[1:])}
        self.width = sum(store.width for store in stores)

    @property
    def sources(self) -> Sequence[FeatureStore]:
        """As of any store."""
        return [source for store in self._stores for source in store.sources]

    def find(self, video_id: str) -> str | None:
        return video_id if all(store.find(video_id) is not None for store in self._stores) else None

    def read_parts(self, video_id: str) -> list[np.ndarray]:
        return [part for store in self._stores for part in store.read_parts(video_id)]

    def tower(self) -> Tower:
        """No one tower made them."""
        return Tower()

    def _load(self, stored_id: str) -> np.ndarray:
        parts = self.read_parts(stored_id)
        if len({len(part) for part in parts}) > 1:
            counts = name_some([len(part) for part in parts])
            raise StaleError(f"features of video '{stored_id}' in {self.path}: {counts} snippets stand side by side")
        return np.concatenate(parts, axis=1)

    def _count(self, stored_id: str) -> int:
        return len(self._load(stored_id))

    def _recorded(self, stored_id: str) -> Mapping[str, Any]:
        return {}


def load_npy(path: Path) -> np.ndarray:
    """The array in a ``.npy`` file.

    Raises:
        StaleError: the file is missing, damaged or a pickle.
    """
    return np.array(_map_npy(path))


def _map_npy(path: Path) -> np.ndarray:
    """The array of :func:`load_npy` where it lies on the disk."""
    try:
        with np.errstate(over="ignore"):  # of shapes that no number holds
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # holds the header against the file's size
        if not isinstance(mapped, np.ndarray):
            raise ValueError("not an array, but an archive of arrays")
        if mapped.nbytes > MAX_BYTES:
            raise ValueError(f"{mapped.nbytes:,} bytes, more than {MAX_BYTES >> 30} GB of one video are refused")
        return mapped
    except Exception as error:  # a damaged file fails in whichever layer meets the damage first
        reason = str(error).partition("\n")[0]
        raise StaleError(f"features file {path} cannot be read: {reason}") from None


def read_sidecar(path: Path) -> dict[str, Any]:
    """What ``video.json`` beside ``video.npy`` records of it; {} where there is none."""
    sidecar = path.with_name(f"{path.name.removesuffix('.npy')}.json")
    content = read_json(sidecar, "record of features") if sidecar.is_file() else {}
    if not isinstance(content, dict):
        raise StaleError(f"record of features {sidecar}: an object is expected")
    return content


def _plain(value: Any) -> Any:
    """An HDF5 attribute as a number or text."""
    value = value.item() if isinstance(value, (np.ndarray, np.generic)) and np.size(value) == 1 else value
    return value if isinstance(value, (int, float)) else str(value)


def _is_array(item: Any, dimensions: int) -> bool:
    return isinstance(item, h5py.Dataset) and item.ndim == dimensions
