"""Making a public data set ready: annotations and split lists from wherever they are, checked, normalised, recorded.

Below the root: ``<data set>/<annotations>.json``, ``splits/``, ``downloads/`` (as fetched) and ``manifest.json``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stale.data.annotations import all_labels
from stale.errors import StaleError
from stale.preparation import thumos14
from stale.preparation.catalog import SPLITS, DataSet, Source, count_faults
from stale.preparation.checks import find_features
from stale.preparation.converters import Annotations, normalise, read_any, write_as
from stale.preparation.downloads import PATIENCE, Patience, fetch, is_safe_address, sha256_of
from stale.preparation.manifest import Manifest
from stale.preparation.splits import (
    Lists,
    find_lists,
    fingerprint,
    is_complete,
    judge_splits,
    read_lists,
    read_zipped_lists,
    write_lists,
)

Content = TypeVar("Content")

_PLACES = ("", "annotations", "data/annotations", "downloads")  # below a folder of local copies


@dataclass(frozen=True)
class Step:
    """What became of one thing: ``state`` is made, kept or missing."""

    name: str
    state: str
    detail: str


@dataclass
class Origin:
    """Where files come from: the catalog's addresses, a mirror, or a folder of copies.

    Attributes:
        root: the data root; downloads go to its folder ``downloads``.
        place: None, a mirror's address, or a folder.
    """

    root: Path
    place: str | None = None
    patience: Patience = PATIENCE
    used: list[dict[str, Any]] = field(default_factory=list)  # name, from, sha256 of what was read

    @property
    def folder(self) -> Path | None:
        """The folder of copies, if that is what ``place`` is.

        Raises:
            StaleError: it does not exist.
        """
        if self.place is None or "://" in self.place:
            return None
        if not Path(self.place).is_dir():
            raise StaleError(f"--from {self.place}: no such folder; give one, or a mirror's https address")
        return Path(self.place)

    def find(self, *names: str) -> Path | None:
        """The first of ``names`` (plain or gzipped) that the folder of copies has."""
        if self.folder is None:
            return None
        candidates = (
            self.folder / place / f"{name}{ending}" for name in names for place in _PLACES for ending in ("", ".gz")
        )
        found = next((path for path in candidates if path.is_file()), None)
        if found is not None:
            self.used.append({"name": found.name, "from": str(found), "sha256": sha256_of(found)})
        return found

    def get(self, source: Source, manifest: Manifest) -> Path:
        """The file of ``source``: a copy, an earlier download, or downloaded now.

        Raises:
            StaleError: it cannot be had, or is not what was recorded.
        """
        if self.folder is not None:
            found = self.find(source.name)
            if found is None:
                raise StaleError(f"--from {self.place}: no {source.name} there, nor in its {', '.join(_PLACES[1:])}")
            return found
        path = self.root / "downloads" / source.name
        address = str(path)
        if not manifest.holds(f"downloads/{source.name}") and not path.exists():
            address = fetch(self._addresses(source), path, source.limit, self.patience)
        self.used.append({"name": source.name, "from": address, "sha256": sha256_of(path)})
        return path

    def _addresses(self, source: Source) -> tuple[str, ...]:
        if self.place is None:
            return source.urls
        if not is_safe_address(self.place):
            raise StaleError(f"--from {self.place}: only HTTPS mirrors are used")
        return (f"{self.place.rstrip('/')}/{source.name}",)


def prepare(data_set: DataSet, root: str | Path, place: str | None = None, patience: Patience = PATIENCE) -> list[Step]:
    """Make ``data_set`` ready below ``root``; what is there already stays as it is.

    Args:
        place: None for the public addresses, a mirror's address, or a folder of copies.

    Raises:
        StaleError: something cannot be had, is not the data set, or is not what was recorded earlier.
    """
    manifest = Manifest(root)
    annotations = _prepare_annotations(data_set, manifest, Origin(Path(root), place, patience))
    splits = _prepare_splits(data_set, manifest, Origin(Path(root), place, patience))
    return [annotations, splits, _look_for_features(data_set, Path(root))]


def _prepare_annotations(data_set: DataSet, manifest: Manifest, origin: Origin) -> Step:
    name = f"{data_set.name}/{data_set.annotations}"
    path = manifest.root / name
    if manifest.holds(name):
        return Step("annotations", "kept", f"{path}, as recorded")
    if path.exists():  # put there by hand: never written over
        _sound(data_set, read_any(path), str(path))
        manifest.record(name, sha256_of(path), made_from="found here")
        return Step("annotations", "kept", f"{path}, found there and recorded now")
    content, remark = _obtain(lambda: _read_annotations(data_set, manifest, origin), origin)
    _record_downloads(manifest, origin)
    write_as("activitynet", normalise(content), path)
    digest = sha256_of(path)
    manifest.record(name, digest, made_from=origin.used)
    return Step("annotations", "made", f"{path} ({_numbers(content)}{remark}); {_compared(digest, data_set.reference)}")


def _obtain(read: Callable[[], Content], origin: Origin) -> Content:
    """``read``; a download that it chokes on is removed, lest the next run takes it for good."""
    try:
        return read()
    except StaleError:
        for item in origin.used:
            if "://" in item["from"]:
                (origin.root / "downloads" / item["name"]).unlink(missing_ok=True)
        raise


def _read_annotations(data_set: DataSet, manifest: Manifest, origin: Origin) -> tuple[Annotations, str]:
    """Checked annotations, and a remark on how they were read."""
    archives = data_set.name == thumos14.NAME and (
        origin.folder is None or all(_has(origin, source) for source in data_set.sources)
    )
    if archives:
        parsed = thumos14.read_archives(*(origin.get(source, manifest) for source in data_set.sources))
        content, remark = Annotations(parsed.videos, parsed.fps), f", {parsed.ambiguous} ambiguous segments left out"
    else:
        content, remark = read_any(_local_or_download(data_set, manifest, origin)), ""
    return _sound(data_set, content, " and ".join(item["from"] for item in origin.used)), remark


def _has(origin: Origin, source: Source) -> bool:
    return Origin(origin.root, origin.place).find(source.name) is not None


def _local_or_download(data_set: DataSet, manifest: Manifest, origin: Origin) -> Path:
    found = origin.find(*data_set.local_names)
    if found is not None:
        return found
    if origin.folder is None:
        return origin.get(data_set.sources[0], manifest)
    names = dict.fromkeys((*data_set.local_names, *(source.name for source in data_set.sources)))
    raise StaleError(f"--from {origin.place}: none of {', '.join(names)} there, nor in its {', '.join(_PLACES[1:])}")


def _sound(data_set: DataSet, content: Annotations, where: str) -> Annotations:
    faults = count_faults(data_set, content.videos)
    if faults:
        raise StaleError(f"{where}: not the annotations of {data_set.title}: {'; '.join(faults)}")
    return content


def _prepare_splits(data_set: DataSet, manifest: Manifest, origin: Origin) -> Step:
    name, folder, title = f"splits/{data_set.title}", manifest.root / "splits", data_set.title
    known = name in manifest.entries
    if known or is_complete(folder, title):
        notes = _notes(manifest.entries[name]) if known else {"made_from": "found here"}
        manifest.record(name, fingerprint(read_lists(folder, title)), **notes)
        return Step("splits", "kept", f"{folder}, {'as recorded' if known else 'found there and recorded now'}")
    lists = _obtain(lambda: _read_splits(data_set, manifest, origin), origin)
    _check_lists(lists, data_set, manifest)
    _record_downloads(manifest, origin)
    write_lists(lists, folder, title)
    digest = fingerprint(lists)
    manifest.record(name, digest, made_from=origin.used)
    return Step("splits", "made", f"{folder} ({len(lists)} lists); {_compared(digest, data_set.splits_reference)}")


def _check_lists(lists: Lists, data_set: DataSet, manifest: Manifest) -> None:
    videos = read_any(manifest.root / data_set.name / data_set.annotations).videos
    with tempfile.TemporaryDirectory() as folder:
        write_lists(lists, folder, data_set.title)
        verdicts = judge_splits(folder, data_set.title, all_labels(videos.values()))
        faults = [fault.replace(f"{folder}/", "") for fault in verdicts.values() if fault]
    if faults:
        raise StaleError(f"{len(faults)} splits do not fit the annotations: {faults[0]}")


def _read_splits(data_set: DataSet, manifest: Manifest, origin: Origin) -> Lists:
    if origin.folder is not None:
        base = find_lists(origin.folder, data_set.title)
        if base is not None:
            origin.used.append({"name": "split lists", "from": str(base)})
            return read_lists(base, data_set.title)
    return read_zipped_lists(origin.get(SPLITS, manifest), data_set.title)


def _notes(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sha256"}


def _record_downloads(manifest: Manifest, origin: Origin) -> None:
    """Before anything is made of them: what came today must be what came the first time."""
    for item in origin.used:
        if origin.folder is None and "://" in item["from"]:
            manifest.record(f"downloads/{item['name']}", item["sha256"], address=item["from"])


def _numbers(content: Annotations) -> str:
    segments = sum(len(video.instances) for video in content.videos.values())
    classes = len({item.label for video in content.videos.values() for item in video.instances})
    return f"{len(content.videos):,} videos, {segments:,} segments, {classes} classes"


def _compared(digest: str, reference: str) -> str:
    if digest == reference:
        return "content equal to the copy this project was tested with"
    return (
        "the counts are right, but the content differs from the copy this project was tested with "
        f"(SHA-256 {digest[:12]}…, tested with {reference[:12]}…)"
    )


def _look_for_features(data_set: DataSet, root: Path) -> Step:
    folder = root / data_set.name
    found = find_features(folder)
    if found is None:
        return Step("features", "missing", data_set.features.format(folder=folder))
    return Step("features", "kept", f"{found}; not looked into here, --check does")
