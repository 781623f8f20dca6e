"""Prepare a public data set: fetch its annotations or take a copy, check them, write one normalised file."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stale.data.annotations import Video, all_labels
from stale.data.datasets import DATASETS, DatasetFacts
from stale.errors import StaleError, name_some
from stale.io import download, file_sha256
from stale.preparation.converters import Annotations, load_any_layout, normalise, write_as


@dataclass(frozen=True)
class Source:
    """The annotations of a public data set; ``name`` is also its folder below the data root."""

    name: str
    facts: DatasetFacts
    annotations: str  # name of the normalised file
    reference: str  # SHA-256 of the normalised file made from the copy that this project was tested with
    url: str | None = None  # None where a person must fetch it
    by_hand: str = ""  # where a person gets it
    ignored_labels: tuple[str, ...] = ()  # which the data set's own evaluation leaves out


ACTIVITYNET = Source(
    name="activitynet",
    facts=DATASETS["activitynet"],
    annotations="activity_net.v1-3.json",
    reference="653f75a4d582bcd431d26060fb79eecd7c8ae30700fa78279d9ee0a9cbe78923",
    url="https://raw.githubusercontent.com/activitynet/ActivityNet/master/Evaluation/data/activity_net.v1-3.min.json",
)

THUMOS14 = Source(
    name="thumos14",
    facts=DATASETS["thumos14"],
    annotations="thumos14.json",
    reference="323a631950678e0935b5ee8d17a0a6fc7a0158e2d71cbcaaa0b8c72155dadf6d",
    by_hand=(
        "thumos14.json of https://github.com/happyharrycn/actionformer_release or thumos_14_anno.json of "
        "https://github.com/sming256/OpenTAD"
    ),
    ignored_labels=("Ambiguous",),
)

SOURCES = {source.name: source for source in (ACTIVITYNET, THUMOS14)}

# Below the data set's folder.
FEATURES = ("features.h5", "features.hdf5", "features", "features_simulated")


class Step(NamedTuple):
    """What became of the ``annotations`` or ``features``; ``state`` is made, kept or missing."""

    name: str
    state: str
    detail: str


def prepare(source: Source, root: str | Path, copy: Path | None = None) -> list[Step]:
    """Prepare ``source`` below ``root``; what is there already stays as it is.

    ``copy`` is an annotation file of any layout; default: download it. Annotations that cannot be had, or are not those
    of the data set, are a StaleError.
    """
    folder = Path(root) / source.name
    path = folder / source.annotations
    state, compared = "kept", ""
    if path.exists():
        content = _checked(source, load_any_layout(path), path)
    else:
        content = _obtain(source, Path(root) / "downloads", copy)
        write_as("activitynet", content, path)
        same = file_sha256(path) == source.reference
        equal = "content equal to" if same else "the counts are right, but the content differs from"
        state, compared = "made", f"; {equal} the copy this project was tested with"
    segments = sum(len(video.instances) for video in content.videos.values())
    labels = all_labels(content.videos.values())
    counts = f"{len(content.videos):,} videos, {segments:,} segments, {len(labels)} classes"
    found, by_hand = find_features(folder), f"fetch them by hand to {folder}/features/VIDEO.npy or {folder}/features.h5"
    return [
        Step("annotations", state, f"{path} ({counts}){compared}"),
        Step("features", "kept", f"{found}; --check looks into them")
        if found
        else Step("features", "missing", f"{by_hand}, or extract them; links and forms are in data/README.md"),
    ]


def find_features(folder: str | Path) -> Path | None:
    """The first of :data:`FEATURES` in a data set's folder: simulated ones come last."""
    return next((path for name in FEATURES if (path := Path(folder) / name).exists()), None)


def _obtain(source: Source, downloads: Path, copy: Path | None) -> Annotations:
    if copy is None and source.url is None:
        raise StaleError(
            f"the annotations of {source.facts.title} must be fetched by hand: download {source.by_hand} and run "
            "again with --from FILE"
        )
    path = copy or download(source.url or "", downloads)
    try:
        return _checked(source, normalise(load_any_layout(path), source.ignored_labels), path)
    except StaleError:
        if copy is None:
            path.unlink()  # or the next run would take it for a finished download
        raise


def _checked(source: Source, content: Annotations, path: Path) -> Annotations:
    """Return ``content`` if it has the public counts."""
    faults = count_faults(source, content.videos)
    if faults:
        raise StaleError(f"{path}: not the annotations of {source.facts.title}: {'; '.join(faults)}")
    return content


def count_faults(source: Source, videos: dict[str, Video]) -> list[str]:
    """Name each number of videos, segments or classes that is not the public one; empty for a sound copy."""
    expected, faults = source.facts, []
    labels = all_labels(videos.values())
    if len(labels) != expected.num_classes:
        faults.append(f"{len(labels)} classes, not {expected.num_classes}")
    unknown = sorted({video.subset for video in videos.values()} - expected.counts.keys())
    if unknown:
        faults.append(f"unknown subset {name_some(unknown)}")
    for name, (num_videos, num_segments) in expected.counts.items():
        chosen = [video for video in videos.values() if video.subset == name]
        segments = sum(len(video.instances) for video in chosen)
        if len(chosen) not in num_videos:
            faults.append(f"{len(chosen):,} {name} videos, not {' or '.join(f'{n:,}' for n in num_videos)}")
        if segments != num_segments:
            faults.append(f"{segments:,} {name} segments, not {num_segments:,}")
    return faults
