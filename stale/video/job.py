"""Many videos' features into a folder of ``.npy`` or one HDF5 file: resumable, broken videos set aside."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from stale.data.features import ATTRIBUTES, read_sidecar
from stale.data.hdf5 import new_hdf5
from stale.errors import StaleError
from stale.files import atomic_path, write_json
from stale.video.encoder import ImageEncoder
from stale.video.extract import Sampling, VideoFeatures, encode_videos

_SETTINGS = ("backbone", "weights_sha256", "sampling")


@dataclass
class Report:
    """What became of each video: ids done now, ids finished earlier, and path → reason of the broken."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


def extract(
    videos: Sequence[Path],
    output: str | Path,
    encoder: ImageEncoder,
    sampling: Sampling,
    batch_size: int = 64,
    workers: int = 2,
) -> Report:
    """Write the features of ``videos`` (ids are the files' names without ending) into ``output``.

    Args:
        output: a folder for ``video.npy`` with its record ``video.json``; or an ``.h5`` file of a dataset a video,
            with the record in its attributes. Finished videos are skipped; the HDF5 file is written at the end, until
            then (and after an interruption) its videos wait in a folder beside it.

    Raises:
        StaleError: ``output`` holds features of another tower or sampling.
    """
    settings = {**encoder.tower.as_dict(), "sampling": str(sampling)}
    store = open_output(output)
    report = Report()
    todo = []
    for path in videos:
        recorded = store.recorded(path.stem)
        if recorded is None:
            todo.append(path)
            continue
        _check_settings(recorded, settings, output, path.stem)
        report.skipped.append(path.stem)
    with tqdm(total=len(videos), initial=len(report.skipped), desc="extract", unit="video", dynamic_ncols=True) as bar:
        for path, result in encode_videos(todo, encoder, sampling, batch_size, workers):
            if isinstance(result, StaleError):
                report.broken[str(path)] = str(result)
            else:
                store.write(path.stem, result, settings)
                report.done.append(path.stem)
            bar.set_postfix_str(path.stem, refresh=False)
            bar.update()
    store.finish()
    return report


class Output(ABC):
    """Where features go."""

    @abstractmethod
    def recorded(self, video_id: str) -> dict[str, Any] | None:
        """The record of a finished video, None of one that is not."""

    @abstractmethod
    def write(self, video_id: str, result: VideoFeatures, settings: dict[str, str]) -> None:
        """Keep one video's features, whole or not at all."""

    @abstractmethod
    def finish(self) -> None:
        """Bring the output into its final form."""


def open_output(path: str | Path) -> Output:
    """The output at ``path``: an HDF5 file by its ending, else a folder."""
    path = Path(path)
    return _Hdf5File(path) if path.suffix in (".h5", ".hdf5") else _NpyFolder(path)


class _NpyFolder(Output):
    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise StaleError(f"{path} is not a folder; give a folder for .npy files, or a name that ends in .h5")

    def recorded(self, video_id: str) -> dict[str, Any] | None:
        file = self.path / f"{video_id}.npy"
        return read_sidecar(file) if file.is_file() else None

    def write(self, video_id: str, result: VideoFeatures, settings: dict[str, str]) -> None:
        record = {"fps": result.fps, "duration": result.duration, **settings}
        write_json(self.path / f"{video_id}.json", record)  # first: the .npy, once there, counts as finished
        with atomic_path(self.path / f"{video_id}.npy") as temporary:
            np.save(temporary, result.features)

    def finish(self) -> None:
        pass


class _Hdf5File(Output):
    """An HDF5 file can be spoilt by a process that dies while it writes, so it is made in one go at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = _NpyFolder(path.with_name(f".{path.name}.parts"))
        self.finished = dict(_records(path)) if path.exists() else {}

    def recorded(self, video_id: str) -> dict[str, Any] | None:
        return self.finished.get(video_id) or self.waiting.recorded(video_id)

    def write(self, video_id: str, result: VideoFeatures, settings: dict[str, str]) -> None:
        self.waiting.write(video_id, result, settings)

    def finish(self) -> None:
        parts = sorted(self.waiting.path.glob("*.npy"))
        if not parts:
            return
        with new_hdf5(self.path) as file:
            if self.path.exists():
                _copy(self.path, file, {part.stem for part in parts})
            for part in parts:
                dataset = file.create_dataset(part.stem, data=np.load(part))
                dataset.attrs.update(read_sidecar(part))
        shutil.rmtree(self.waiting.path)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with h5py.File(path, "r") as file:
            for name, dataset in file.items():
                yield name, {key: dataset.attrs[key] for key in ATTRIBUTES if key in dataset.attrs}
    except OSError as error:
        raise StaleError(f"{path} is not an HDF5 file or damaged ({error}): choose another --output") from None


def _copy(path: Path, file: h5py.File, replaced: Collection[str]) -> None:
    """All of the HDF5 file at ``path`` into ``file``, save what is ``replaced``: parts that a kill left behind."""
    with h5py.File(path, "r") as earlier:
        file.attrs.update(earlier.attrs)
        for name in sorted(earlier.keys() - replaced):
            earlier.copy(name, file)


def _check_settings(recorded: dict[str, Any], settings: dict[str, str], output: str | Path, video_id: str) -> None:
    for name in _SETTINGS:
        if recorded.get(name) != settings.get(name):
            raise StaleError(
                f"{output} holds features of '{video_id}' with another {name} ({recorded.get(name)}, now "
                f"{settings.get(name)}): choose another --output, or delete what lies there"
            )
