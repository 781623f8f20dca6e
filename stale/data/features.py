"""Snippet features from disk, in forms that all give the same: (snippets, D) of a video, float16 or float32.

* a folder of ``<video>.npy`` (or ``.npz``, ``.pt``) at any depth, with an optional record ``<video>.json`` beside each;
* an HDF5 file with one dataset a video, and the record in its attributes;
* a packed folder: ``features.npy``, the snippets of all videos one after the other, and ``index.json``.

Several sources of the same videos can stand side by side, concatenated along D. D is the feature width.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stale.data.annotations import MAX_RATE, MAX_SECONDS, Video, match_video_id
from stale.errors import StaleError, name_some
from stale.io import HARMLESS, MAX_RATIO, clean_name, read_json, refuse_zip_bomb

_note = cache(logging.getLogger(__name__).warning)

# The record of a video's features: snippets a second, seconds, and how the snippets were made.
ATTRIBUTES = ("fps", "duration", "backbone", "weights_sha256", "activation", "sampling")
_MOST = {"fps": MAX_RATE, "duration": MAX_SECONDS}
SIMULATED = "simulated"  # a mark of the whole file

PACKED_ROWS, PACKED_INDEX = "features.npy", "index.json"

# Features may last this much longer or shorter than the annotated duration: a snippet that overlaps the end, another
# container or a rounded rate make up some seconds. 412 caption features of THUMOS14 are within 0.36 s and 1.5 %.
TOLERATED_SECONDS, TOLERATED_SHARE = 3.0, 0.1

WIDTHS = (384, 400, 500, 512, 640, 768, 1024, 1280, 1536, 2048, 4096)  # of usual features

# A header can claim any size: more bytes than an hour of frames, 4096 wide, are refused for one video.
MAX_BYTES = 4 << 30

SUFFIXES = (".npy", ".npz", ".pt")  # of a file with the features of one video

_EXPONENT = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000)}  # item size → the bits that NaN and infinity have set


@dataclass(frozen=True)
class Backbone:
    """An image encoder: name, SHA-256 of its tensors, activation function (CLIP's alone); "" where unknown."""

    backbone: str = ""
    weights_sha256: str = ""
    activation: str = ""

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> "Backbone":
        """The image encoder that is recorded with features, class embeddings or a checkpoint."""
        return cls(*(str(attributes.get(field, "")) for field in cls.__dataclass_fields__))

    def as_dict(self) -> dict[str, str]:
        """The known attributes, as :meth:`of` takes them."""
        return {name: value for name, value in vars(self).items() if value}

    def __str__(self) -> str:
        known = [self.weights_sha256 and f"weights {self.weights_sha256[:8]}", self.activation]
        details = ", ".join(filter(None, known))
        return (self.backbone or "an unknown image encoder") + (f" ({details})" if details else "")


def require_same_width(trained: int, given: int, where: str, fix: str = "use the same image encoder") -> None:
    """Raise a StaleError if features (``where``) have another width than those a run was trained on."""
    if given != trained:
        raise StaleError(f"{where} are {given} wide, but the run was trained on features {trained} wide: {fix}")


def require_same_backbone(
    trained: Backbone, given: Backbone, where: str, than: str = "the run was trained on features of"
) -> None:
    """Raise a StaleError if what is given (``where``) is known to be of another model than ``trained``."""
    one, other = trained.as_dict(), given.as_dict()
    known = [name for name in ("weights_sha256", "backbone") if name in one and name in other][:1]
    if any(one[name] != other[name] for name in [*known, "activation"] if name in one and name in other):
        raise StaleError(f"{where} come from {given}, but {than} {trained}: use the same image encoder for both")


class FeatureStore:
    """Features of many videos; a subclass for each form of files says how one video is opened.

    ``ids`` are the video ids as the source writes them, ``shape`` that of the first one; ``simulated`` is the source's
    word that the features were not extracted from videos.
    """

    def __init__(self, path: Path, ids: Collection[str], shape: Sequence[int], simulated: Any = False) -> None:
        if len(shape) != 2:
            raise StaleError(f"features of video '{min(ids)}' in {path}: shape {shape}, not (snippets, width)")
        # Ids by their clean names, and as written: an exact match comes first.
        self.names = {clean_name(name): name for name in ids} | {name: name for name in ids}
        self.annotated: Mapping[str, Video] = {}
        self.path, self.ids, self.width, self.simulated = path, ids, shape[1], bool(simulated)
        self.overlap = 0.0  # snippets by which windows reach over each end of the first and last snippet
        self.stride = 1  # frames between snippets, and frames a second, as the settings say
        self.frame_rate: float | None = None
        self.rescaled = False  # whether every video has the same number of snippets, so that they have no rate
        self.sources: Sequence[FeatureStore] = (self,)  # the stores that stand side by side in this one
        self.shared: Mapping[str, Any] = {}  # what is recorded of all videos

    def open(self, stored_id: str) -> Any:
        """One video by the source's id: an array, or a memory map or HDF5 dataset that is not loaded yet."""
        raise NotImplementedError

    def record(self, stored_id: str) -> Mapping[str, Any]:
        """What the source records of one video."""
        return self.shared

    def find(self, video_id: str) -> str | None:
        """The source's id of a video (an optional ``v_`` is understood), or None where it is missing."""
        name = match_video_id(video_id, self.names) or match_video_id(clean_name(video_id), self.names)
        return None if name is None or (name in self.annotated and name != video_id) else self.names[name]

    def annotate(self, videos: Mapping[str, Video]) -> "FeatureStore":
        """Take ``videos`` for all that are annotated: none has the features of another, and their durations count."""
        for store in (self, *self.sources):
            store.annotated = videos
        return self

    def read(self, video_id: str) -> np.ndarray:
        """Load one video: (snippets, D) float16 or float32, finite; a StaleError if it is missing or unusable."""
        stored_id = self.find(video_id)
        if stored_id is None:
            raise StaleError(f"features of video '{video_id}' are missing in {self.path}")
        where = self.where(video_id)
        with _one_line(f"{where} cannot be read"):
            array = load_array(self.open(stored_id), where)
        return spread_windows(check_features(array, where, self.width), self.overlap)

    def where(self, video_id: str) -> str:
        """What names the features of a video in messages."""
        return f"features of video '{video_id}' in {self.path}"

    def read_parts(self, video_id: str) -> list[np.ndarray]:
        """The same, one array a source: the sources may differ in their rate.

        Where the rate is recorded, snippets after the annotated duration are cut off, and missing ones take the mean.
        """
        return [source.fit(video_id, source.read(video_id)) for source in self.sources]

    def fit(self, video_id: str, features: np.ndarray) -> np.ndarray:
        """``features`` (snippets, D) as long as the annotated video, as far as they tell."""
        video = self.annotated.get(video_id)
        seconds = self.extents(video_id, len(features))[-1:] if video else []
        if video is None or not seconds or not _lasts(seconds[0], video):
            return features
        count = max(round(len(features) * video.duration / seconds[0]), 1)
        if abs(count - len(features)) <= 1:  # rounding
            return features
        return np.pad(features, ((0, max(count - len(features), 0)), (0, 0)), mode="mean")[:count]

    def extents(self, video_id: str, count: float | None = None, fps: float | None = None) -> list[float]:
        """How many seconds a video's ``count`` snippets last, as far as known: as recorded, then by their rate.

        ``fps`` is the rate where none is recorded. A rate or duration that cannot be one is a StaleError.
        """
        recorded, stored_id, where = self.attributes(video_id), self.find(video_id), self.where(video_id)
        known = [recorded_number(recorded, "duration", where)]
        rate = None if self.rescaled else recorded_rate(recorded, where, fps)
        if rate and stored_id is not None:
            if count is None:
                with _one_line(f"{where} cannot be read"):
                    count = len(self.open(stored_id)) + 2 * self.overlap
            known.append(count / rate)
        return [seconds for seconds in known if seconds]

    def attributes(self, video_id: str) -> dict[str, Any]:
        """The recorded :data:`ATTRIBUTES` of a video, as text and numbers.

        A rate that is not recorded is the frame rate, as the settings or the annotations say, over the stride.
        """
        stored_id = self.find(video_id)
        if stored_id is None:
            return {}
        with _one_line(f"attributes of video '{stored_id}' in {self.path} cannot be read"):
            recorded = self.record(stored_id)
        found = {name: recorded[name] for name in ATTRIBUTES if recorded.get(name) is not None}
        for name, value in found.items():
            value = value.item() if isinstance(value, (np.ndarray, np.generic)) and np.size(value) == 1 else value
            found[name] = value if isinstance(value, (int, float)) else str(value)
        video = self.annotated.get(video_id) if self.stride > 1 else None
        if "fps" not in found and (frame_rate := self.frame_rate or (video and video.fps)):
            found["fps"] = frame_rate / self.stride
        return found

    def backbone(self) -> Backbone:
        """The image encoder that made the features, as the record of the first video says."""
        return Backbone.of(self.attributes(min(self.ids, default="")))


class NpyFolder(FeatureStore):
    """A folder of ``<video>.npy`` (or ``.npz``, ``.pt``) with ``<video>.json``; if it holds none, in folders inside."""

    def __init__(self, path: Path, id_pattern: str = "{id}") -> None:
        # Names with a dot in front are the system's (macOS leaves ._video.npy beside video.npy), not videos'.
        found: list[Path] = []
        for pattern in ("*", "**/*"):  # copies and other files may lie in folders beside the videos'
            for suffix in SUFFIXES:  # of one kind alone: a file of weights or class embeddings may lie beside .npy
                files = sorted(path.glob(pattern + suffix))
                found = found or [file for file in files if "/." not in f"/{file.relative_to(path).as_posix()}"]
        if not found:
            raise StaleError(f"features folder {path} holds no .npy, .npz or .pt file")
        self.files = _by_id({str(file): file.stem for file in found}, id_pattern, path)
        super().__init__(path, self.files, self.open(min(self.files)).shape)

    def open(self, stored_id: str) -> Any:
        return _squeeze(_map_npy(Path(self.files[stored_id])))

    def record(self, stored_id: str) -> Mapping[str, Any]:
        return read_sidecar(Path(self.files[stored_id]))


class PackedFolder(FeatureStore):
    """``features.npy`` and ``index.json``; the rows stay on disk and are memory-mapped."""

    def __init__(self, path: Path) -> None:
        if not (path / PACKED_INDEX).exists():
            raise StaleError(f"features {path}: {PACKED_ROWS} without {PACKED_INDEX}; pack the features again")
        rows, index = _map_npy(path / PACKED_ROWS), read_json(path / PACKED_INDEX, "index of features")
        try:
            self.videos = {str(entry["id"]): {**index, **entry} for entry in index["videos"]}
            spans = [range(entry["first"], entry["first"] + entry["count"]) for entry in self.videos.values()]
            sound = all(span[0] >= 0 and span.stop <= len(rows) for span in spans)
            if not (sound and rows.ndim == 2 and 0 < len(spans) == len(index["videos"])):
                raise ValueError("no video, one twice, or rows that are not there")
        except (LookupError, TypeError, ValueError) as error:
            raise StaleError(f"features {path}: {PACKED_INDEX} does not fit {PACKED_ROWS} ({error})") from None
        super().__init__(path, self.videos, rows.shape, index.get(SIMULATED))
        self.rows, self.rescaled = rows, index.get("snippets") is not None

    def open(self, stored_id: str) -> Any:
        entry = self.videos[stored_id]
        return self.rows[entry["first"] : entry["first"] + entry["count"]]

    def record(self, stored_id: str) -> Mapping[str, Any]:
        return self.videos[stored_id]


class Hdf5File(FeatureStore):
    """An HDF5 file with one dataset a video."""

    def __init__(self, path: Path, file: h5py.File, id_pattern: str = "{id}") -> None:
        ids = {name: name for name, item in file.items() if isinstance(item, h5py.Dataset)}
        if not ids:
            raise StaleError(f"features {path}: no dataset a video")
        self.path, self.file, self.datasets = path, file, _by_id(ids, id_pattern, path)
        super().__init__(path, self.datasets, self.open(min(self.datasets)).shape, file.attrs.get(SIMULATED))
        self.shared = dict(file.attrs)

    def open(self, stored_id: str) -> Any:
        data = self.file[self.datasets[stored_id]]
        return data if data.ndim <= 2 else _squeeze(load_array(data, self.where(stored_id)))

    def record(self, stored_id: str) -> Mapping[str, Any]:
        return {**self.shared, **self.file[self.datasets[stored_id]].attrs}


class SideBySide(FeatureStore):
    """Several sources of the same videos, concatenated along the width (CLIP beside I3D). All of them have a video."""

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        ids = {name for name in stores[0].ids if all(store.find(name) is not None for store in stores)}
        path, width = Path(" and ".join(str(store.path) for store in stores)), sum(store.width for store in stores)
        super().__init__(path, ids, (0, width), any(store.simulated for store in stores))
        self.sources = [source for store in stores for source in store.sources]

    def open(self, stored_id: str) -> Any:
        return np.concatenate(self.read_parts(stored_id), axis=1)  # refused where they differ in their rate

    def backbone(self) -> Backbone:
        """That of the first source, which is compared with text."""
        return self.sources[0].backbone()


def open_features(path: str | Path | Sequence[str], id_pattern: str = "{id}") -> FeatureStore:
    """Open features of any form above, several side by side; a StaleError if there are none that fit ``id_pattern``."""
    if not isinstance(path, (str, Path)):
        stores = [open_features(one, id_pattern) for one in path]
        return stores[0] if len(stores) == 1 else SideBySide(stores)
    path = Path(path)
    if path.is_dir():
        packed = (path / PACKED_ROWS).exists()
        return _not_transposed(PackedFolder(path) if packed else NpyFolder(path, id_pattern))
    if not path.exists():
        raise StaleError(f"features not found: {path}; set data.features to a folder of .npy or an HDF5 file")
    with _one_line(f"features {path}: not an HDF5 file or damaged"):
        file = open_hdf5(path, "features")
        return _not_transposed(Hdf5File(path, file, id_pattern))


def open_hdf5(path: Path, what: str) -> h5py.File:
    """Open an HDF5 file; a StaleError, which calls it ``what``, if it is locked or refers to other files."""
    try:
        file = h5py.File(path, "r")
    except BlockingIOError:
        raise StaleError(f"{what} {path}: another program is writing there; wait until it ends") from None
    outside = [name for name in file if isinstance(file.get(name, getlink=True), h5py.ExternalLink)]
    if outside:
        raise StaleError(f"{what} {path}: {name_some(outside)} lie in other files: refused")
    return file


def _not_transposed(store: FeatureStore) -> FeatureStore:
    """``store``, if not its first videos all have a usual feature width in place of the number of snippets."""
    shapes = []
    with suppress(Exception):  # a damaged video is named where it is loaded
        shapes = [np.shape(store.open(name)) for name in sorted(store.ids)[:3]]
    usual = all(len(shape) == 2 and shape[0] in WIDTHS and shape[1] not in WIDTHS for shape in shapes)
    # Features of one shape may be rescaled to 512 snippets, and be wider than that.
    if len(shapes) > 1 and usual and (len({*shapes}) > 1 or shapes[0][1] < shapes[0][0]):
        raise StaleError(f"features {store.path}: {shapes[0]} seems to be width × snippets: transpose the features")
    return store


def spread_windows(features: np.ndarray, overlap: float) -> np.ndarray:
    """Features of overlapping windows at the centers of snippets that cover the video, the first and last repeated.

    N windows begin every stride from the start: they cover N + 2 · ``overlap`` strides, and the center of the first
    lies ``overlap`` strides later than that of a snippet of one stride.
    """
    if not overlap:
        return features
    count = max(round(len(features) + 2 * overlap), 1)
    at = (np.arange(count) + 0.5) * (len(features) + 2 * overlap) / count - 0.5 - overlap
    at = at.clip(0, len(features) - 1)
    first, share = np.floor(at).astype(int), (at % 1)[:, None]
    second = np.minimum(first + 1, len(features) - 1)
    return (features[first] * (1 - share) + features[second] * share).astype(features.dtype)


def duration_mismatch(store: FeatureStore, video: Video, fps: float | None = None) -> str:
    """Say which features do not fit the annotated duration of their video; "" if they fit or it is not known."""
    for source in store.sources:
        for seconds in source.extents(video.id, fps=fps):
            if not _lasts(seconds, video):
                return f"{source.path} ({seconds:.1f} s, annotated {video.duration:.1f} s)"
    return ""


def _lasts(seconds: float, video: Video) -> bool:
    """Whether ``seconds`` are about the annotated duration."""
    return abs(seconds - video.duration) <= max(TOLERATED_SECONDS, TOLERATED_SHARE * video.duration)


def check_features(array: np.ndarray, where: str, width: int | None = None) -> np.ndarray:
    """Return ``array`` if it can be used as features (snippets, D), else a StaleError; float64 becomes float32."""
    if np.ndim(array) != 2 or 0 in array.shape:
        raise StaleError(f"{where}: shape {np.shape(array)}; (snippets, width) with at least one snippet is expected")
    if width is not None and array.shape[1] != width:
        raise StaleError(f"{where}: width {array.shape[1]}, but the others are {width} wide")
    if array.dtype.kind != "f":
        raise StaleError(f"{where}: type {array.dtype}; float16 or float32 is expected")
    if array.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            array = array.astype(np.float32)
    kind, exponent = _EXPONENT[array.itemsize]  # on the bits: ten times faster than np.isfinite for float16
    if (array.view(kind) & kind(exponent)).max() == exponent:
        raise StaleError(f"{where}: NaN or infinite values; extract this video's features again")
    if not array.any():
        raise StaleError(f"{where}: all values are 0; extract this video's features again")
    return array


def recorded_number(recorded: Mapping[str, Any], name: str, where: str) -> float | None:
    """The number that is recorded as ``name``, None if nothing is; a StaleError if it is no rate or duration."""
    value = recorded.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-5 <= value <= _MOST[name]:
        raise StaleError(f"{where}: '{name}' is {value!r}; a number from 0.00001 to {_MOST[name]:g} is expected")
    return float(value)


def recorded_rate(recorded: Mapping[str, Any], where: str, given: float | None = None) -> float | None:
    """The recorded number of snippets a second, or the ``given`` one where none is recorded.

    It is a StaleError if both are known and differ by more than a tenth.
    """
    rate, given = (recorded_number(source, "fps", where) for source in (recorded, {"fps": given}))
    if rate and given and abs(given - rate) > TOLERATED_SHARE * rate:
        fault = f"{where} record {rate:g} snippets a second, not {given:g}"
        raise StaleError(f"{fault}: leave out --fps and --duration, or correct the record")
    return rate or given


def load_npy(path: Path) -> np.ndarray:
    """Load the array in a ``.npy`` file; a StaleError if it is missing, damaged, a pickle or too large."""
    return load_array(_squeeze(_map_npy(path)), f"features file {path}")


def read_sidecar(path: Path) -> dict[str, Any]:
    """The record in ``video.json`` beside ``video.npy``; {} where there is none."""
    sidecar = path.with_suffix(".json") if path.suffix in SUFFIXES else path.with_name(f"{path.name}.json")
    content = read_json(sidecar, "record of features") if sidecar.is_file() else {}
    if not isinstance(content, dict):
        raise StaleError(f"record of features {sidecar}: an object is expected")
    return content


def _by_id(names: Mapping[str, str], id_pattern: str, path: Path) -> dict[str, str]:
    """Id → key of ``names`` whose name fits the pattern; a StaleError if none does, or if an id is there twice."""
    before, mark, after = id_pattern.partition("{id}")
    found: dict[str, str] = {}
    for key, name in names.items():
        if mark and name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
            video_id = name[len(before) : len(name) - len(after)]
            if video_id in found:
                raise StaleError(f"features of video '{video_id}' are twice in {path}: {found[video_id]} and {key}")
            found[video_id] = key
    if not found:
        first = min(names.values())
        raise StaleError(f"features {path}: no name fits data.id_pattern={id_pattern}; the first is {first}")
    return found


def _squeeze(array: np.ndarray) -> np.ndarray:
    """Arrays (1, T, C) and (T, C, 1, 1) as (T, C)."""
    shape = array.shape
    while array.ndim > 2 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.shape != shape:
        _note("features with %d dimensions are taken as (snippets, width)", len(shape))
    return array


def _map_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file as a memory map, or the only one of a ``.npz`` or ``.pt`` file."""
    with _one_line(f"features file {path} cannot be read"), np.errstate(over="ignore"):  # shapes that no number holds
        if path.suffix in (".npz", ".pt"):
            refuse_zip_bomb(path, "features file")
        if path.suffix == ".pt":
            import torch

            return torch.load(path, map_location="cpu", weights_only=True).float().numpy()
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # compares the header with the file's size
        if not isinstance(mapped, np.ndarray):
            if path.suffix != ".npz" or len(mapped.files) != 1:
                raise ValueError("not an array, but an archive of several or none")
            return mapped[mapped.files[0]]
        return mapped


def load_array(data: Any, where: str) -> np.ndarray:
    """An array, a memory map or an HDF5 dataset, unless it lies in another file or claims far more than is stored."""
    size = math.prod(data.shape) * data.dtype.itemsize
    kept = size
    if isinstance(data, h5py.Dataset):
        if data.external or data.is_virtual:
            raise StaleError(f"{where} lies outside the file: refused")
        size = max(size, math.prod(data.chunks or ()) * data.dtype.itemsize)  # a chunk is unpacked as a whole
        kept = data.id.get_storage_size()
    if size > MAX_BYTES or (size > HARMLESS and size > MAX_RATIO * kept):
        raise StaleError(f"{where} has {kept:,} bytes that claim to be {size:,}: refused")
    return data[()] if isinstance(data, h5py.Dataset) else np.array(data)


@contextmanager
def _one_line(fault: str) -> Iterator[None]:
    """Turn what numpy and h5py raise on damage, in any of their layers, into one line."""
    try:
        yield
    except StaleError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise StaleError(f"{fault} ({reason})") from None
