"""Prepare a public data set: fetch its annotations or take a copy, check them, write one normalized file."""

from collections.abc import Mapping
from pathlib import Path

from data_preparation.converters import Annotations, load_any_layout, normalize, write_as
from stale.data.annotations import Video, all_labels, by_subset
from stale.data.datasets import DatasetFacts
from stale.errors import StaleError, name_some
from stale.io import download, file_sha256

# Below the data set's folder; simulated ones come last.
FEATURES = ("features.h5", "features.hdf5", "features", "features_simulated")


def prepare(dataset: DatasetFacts, root: str | Path, copy: Path | None = None) -> list[str]:
    """Prepare ``dataset`` below ``root``; what is there already stays as it is.

    ``copy`` is an annotation file of any layout; default: download it. Annotations that cannot be had, or are not those
    of the data set, are a StaleError. Returns a line on the annotations and one on the features.
    """
    folder = Path(root) / dataset.title.lower()
    path, state = folder / dataset.annotations, "kept"
    if path.exists():
        videos = load_any_layout(path).videos
        _require_counts(dataset, videos, path)
    else:
        content = _obtain(dataset, Path(root) / "downloads", copy)
        write_as("activitynet", content, path)
        videos, same = content.videos, file_sha256(path) == dataset.reference
        compared = "content equal to" if same else "the counts are right, but the content differs from"
        state = f"made; {compared} the copy this project was tested with"
    segments, labels = sum(len(video.instances) for video in videos.values()), all_labels(videos.values())
    features = f"missing: fetch them by hand to {folder}/features/VIDEO.npy or {folder}/features.h5, or extract them"
    features += "; links and forms are in data/README.md"
    if found := find_features(folder):
        features = f"{found}; --check looks into them"
    return [
        f"annotations  {path}: {len(videos):,} videos, {segments:,} segments, {len(labels)} classes; {state}",
        f"features     {features}",
    ]


def find_features(folder: str | Path) -> Path | None:
    """The first of :data:`FEATURES` in a data set's folder."""
    return next((path for name in FEATURES if (path := Path(folder) / name).exists()), None)


def _obtain(dataset: DatasetFacts, downloads: Path, copy: Path | None) -> Annotations:
    if copy is None and not dataset.source.startswith("http"):
        fix = f"download {dataset.source} and run again with --from FILE"
        raise StaleError(f"the annotations of {dataset.title} must be fetched by hand: {fix}")
    path = copy or download(dataset.source, downloads)
    try:
        content = normalize(load_any_layout(path), dataset.ignored_labels)
        _require_counts(dataset, content.videos, path)
    except StaleError:
        if copy is None:
            path.unlink()  # or the next run would take it for a finished download
        raise
    return content


def _require_counts(dataset: DatasetFacts, videos: Mapping[str, Video], path: Path) -> None:
    if faults := count_faults(dataset, videos):
        raise StaleError(f"{path}: not the annotations of {dataset.title}: {'; '.join(faults)}")


def count_faults(dataset: DatasetFacts, videos: Mapping[str, Video]) -> list[str]:
    """Name each number of videos, segments or classes that is not the public one; empty for a sound copy."""
    subsets, labels = by_subset(videos.values()), all_labels(videos.values())
    counts: list[tuple[str, int, tuple[int, ...]]] = [("classes", len(labels), (dataset.num_classes,))]
    for name, (num_videos, num_segments) in dataset.counts.items():
        chosen = subsets.pop(name, [])
        counts.append((f"{name} videos", len(chosen), num_videos))
        counts.append((f"{name} segments", sum(len(video.instances) for video in chosen), (num_segments,)))
    faults = [
        f"{count:,} {what}, not {' or '.join(f'{number:,}' for number in public)}"
        for what, count, public in counts
        if count not in public
    ]
    return faults + ([f"unknown subset {name_some(subsets)}"] if subsets else [])
