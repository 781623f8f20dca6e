"""Snippet features from disk: a folder of ``.npy``, one HDF5 file, or one packed HDF5 block.

Every form gives the same thing: for a video id, an array (snippets × width), float16 or float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stale.data.annotations import match_video_id
from stale.data.tower import Tower
from stale.errors import StaleError, name_some
from stale.files import HARMLESS, MAX_RATIO, read_json

# What extraction records beside features: snippets a second, seconds, and where the snippets come from.
ATTRIBUTES = ("fps", "duration", "backbone", "weights_sha256", "sampling")

# A header can promise any size: nothing is read of a video that has more bytes than an hour of frames, 4096 wide.
MAX_BYTES = 4 << 30


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
    def _recorded(self, stored_id: str) -> Mapping[str, Any]: ...

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
        return {name: _plain(recorded[name]) for name in ATTRIBUTES if name in recorded}

    def tower(self) -> Tower:
        """The image tower that made the features, as far as the first of them tells."""
        return Tower.of(self.attributes(min(self.ids)))


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
    with _damage_named(f"features {path}: not an HDF5 file or damaged"):
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
    if not np.isfinite(array).all():
        raise StaleError(f"{where}: NaN or infinite values; extract this video's features again")
    return array


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
        return _read_hdf5(self._file[stored_id], (), f"features {self.path}: video '{stored_id}'")

    def _recorded(self, stored_id: str) -> Mapping[str, Any]:
        with _damage_named(f"features {self.path}: attributes of video '{stored_id}' cannot be read"):
            return {**self._file.attrs, **self._file[stored_id].attrs}


class _PackedBlock(FeatureStore):
    """Datasets ``features`` (videos × T × width) and ``ids`` (videos) of one HDF5 file."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._block = path, file["features"]
        ids = file["ids"]
        if not (_is_array(self._block, 3) and _is_array(ids, 1) and len(ids) == len(self._block)):
            raise StaleError(f"features {path}: 'features' must be videos × T × width with one of 'ids' a video")
        if h5py.check_string_dtype(ids.dtype) is None:
            raise StaleError(f"features {path}: 'ids' must be the videos' ids as text, not {ids.dtype}")
        _refuse_bomb(ids, (), f"features {path}: 'ids'")
        self._row = {name: row for row, name in enumerate(ids.asstr()[()])}
        if len(self._row) != len(ids):
            raise StaleError(f"features {path}: 'ids' names a video twice")
        self.ids = self._row.keys()
        self.width = self._block.shape[2]

    def _load(self, stored_id: str) -> np.ndarray:
        return _read_hdf5(self._block, self._row[stored_id], f"features {self.path}: video '{stored_id}'")

    def _recorded(self, stored_id: str) -> Mapping[str, Any]:
        with _damage_named(f"features {self.path}: attributes cannot be read"):
            return dict(self._block.file.attrs)


class _SideBySide(FeatureStore):
    """Several sources of the same videos, their features concatenated along the width (CLIP beside I3D)."""

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        self._stores = stores
        self.path = Path(" and ".join(str(store.path) for store in stores))
        self.ids = {name for name in stores[0].ids if all(store.find(name) is not None for store in stores[1:])}
        self.width = sum(store.width for store in stores)

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

    def _recorded(self, stored_id: str) -> Mapping[str, Any]:
        return {}


def load_npy(path: Path) -> np.ndarray:
    """The array in a ``.npy`` file.

    Raises:
        StaleError: the file is missing, damaged or a pickle.
    """
    try:
        with np.errstate(over="ignore"):  # of shapes that no number holds
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # holds the header against the file's size
        if not isinstance(mapped, np.ndarray):
            raise ValueError("not an array, but an archive of arrays")
        if mapped.nbytes > MAX_BYTES:
            raise ValueError(f"{mapped.nbytes:,} bytes, more than {MAX_BYTES >> 30} GB of one video are refused")
        return np.array(mapped)
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


def _read_hdf5(data: h5py.Dataset, index: Any, where: str) -> np.ndarray:
    with _damage_named(f"{where} cannot be read"):
        _refuse_bomb(data, index, where)
        return data[index]


@contextmanager
def _damage_named(fault: str) -> Iterator[None]:
    """Damage to an HDF5 file shows in whichever layer meets it first, as that layer's own exception."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, MemoryError) as error:
        raise StaleError(f"{fault} ({error})") from None


def _refuse_bomb(data: h5py.Dataset, index: Any, where: str) -> None:
    """Stop before memory is taken for an absurd shape, or for packed data that unpack to far more than honest ones."""
    if data.external:
        raise StaleError(f"{where} lies outside the file, in {name_some(name for name, *_ in data.external)}: refused")
    shape = data.shape if index == () else data.shape[1:]
    size = math.prod(shape) * data.dtype.itemsize
    taken = max(size, math.prod(data.chunks or ()) * data.dtype.itemsize)  # a chunk is unpacked as a whole
    stored = data.id.get_storage_size()
    if taken > MAX_BYTES or (taken > HARMLESS and taken > MAX_RATIO * stored):
        raise StaleError(f"{where} has {stored:,} bytes that claim to be {taken:,}: refused")
