"""What is known of the two public data sets: where they lie, how large they are, what a sound copy looks like.

None of these addresses publishes a checksum. A download's SHA-256 is therefore recorded when it is first seen and
compared ever after; what can be compared the first time are the counts, and the content against the copies that this
project was tested with (``reference``).
"""

from __future__ import annotations

from dataclasses import dataclass

from stale.data.annotations import Video
from stale.errors import name_some


@dataclass(frozen=True)
class Source:
    """A file to fetch: its name, addresses of the same file, and the most bytes it may have."""

    name: str
    urls: tuple[str, ...]
    limit: int


@dataclass(frozen=True)
class Subset:
    """Expected numbers: videos (one of these), and segments where they are public."""

    videos: tuple[int, ...]
    segments: int


@dataclass(frozen=True)
class DataSet:
    """A public data set.

    Attributes:
        name: as in the configuration; also the folder below the root.
        title: as its authors write it; names the folder of its split lists.
        annotations: name of the normalised file in that folder.
        local_names: names under which copies of the annotations are looked for, most trusted first.
        sources: what to download when there is no copy.
        reference: SHA-256 of the normalised file made from the copy this project was tested with.
        splits_reference: the same of the split lists (:func:`stale.preparation.splits.fingerprint`).
        features: how to get features that must be fetched by hand.
    """

    name: str
    title: str
    annotations: str
    local_names: tuple[str, ...]
    sources: tuple[Source, ...]
    subsets: dict[str, Subset]
    num_classes: int
    reference: str
    splits_reference: str
    features: str


SPLITS = Source(
    "Efficient-Prompt.zip",
    (
        "https://codeload.github.com/ju-chen/Efficient-Prompt/zip/HEAD",
        "https://github.com/ju-chen/Efficient-Prompt/archive/HEAD.zip",
    ),
    limit=512 << 20,
)

_BY_HAND = """\
Features must be fetched by hand; cloud folders forbid anything else. Their links are on these pages:
  https://github.com/sauradip/STALE            (the authors; they took the features from EffPrompt's authors)
  https://github.com/ju-chen/Efficient-Prompt  (EffPrompt's)
Put them, or features of your own, into
  {folder}/features/<video>.npy     one array a video, snippets x width, float16 or float32, or
  {folder}/features.h5              the same in one HDF5 file
An id may have or lack the prefix v_. All must have one width, that of the text tower in model.text.weights
(512 for CLIP's ViT-B/16). Then run this command again with --check."""

ACTIVITYNET = DataSet(
    name="activitynet",
    title="ActivityNet",
    annotations="activity_net.v1-3.json",
    local_names=("activity_net.v1-3.min.json", "activity_net.v1-3.json"),
    sources=(
        Source(
            "activity_net.v1-3.min.json",
            (
                "https://raw.githubusercontent.com/activitynet/ActivityNet/master/Evaluation/data/"
                "activity_net.v1-3.min.json",
                "https://github.com/activitynet/ActivityNet/raw/master/Evaluation/data/activity_net.v1-3.min.json",
            ),
            limit=128 << 20,
        ),
    ),
    subsets={
        "training": Subset((10_024,), 15_410),
        "validation": Subset((4_926,), 7_654),
        "testing": Subset((5_044,), 0),
    },
    num_classes=200,
    reference="90d59a4179a6bb67af46db7a9faf14e3aa06f705c9149e928dc7e7cd439792e5",
    splits_reference="0e0ba623ac5fd1489c3c981f8d6818aa827499098bef7d45be1da9f406b03235",
    features=_BY_HAND,
)

THUMOS14 = DataSet(
    name="thumos14",
    title="THUMOS14",
    annotations="thumos14.json",
    local_names=("thumos14.json",),
    sources=(
        Source(
            "TH14_Temporal_annotations_validation.zip",
            (
                "https://www.crcv.ucf.edu/THUMOS14/Validation_set/TH14_Temporal_annotations_validation.zip",
                "https://crcv.ucf.edu/THUMOS14/Validation_set/TH14_Temporal_annotations_validation.zip",
            ),
            limit=64 << 20,
        ),
        Source(
            "TH14_Temporal_annotations_test.zip",
            (
                "https://www.crcv.ucf.edu/THUMOS14/test_set/TH14_Temporal_annotations_test.zip",
                "https://crcv.ucf.edu/THUMOS14/test_set/TH14_Temporal_annotations_test.zip",
            ),
            limit=64 << 20,
        ),
    ),
    subsets={
        "validation": Subset((200,), 3_007),
        # The 213th, video_test_0001292, has ambiguous segments only; the challenge takes those out.
        "test": Subset((212, 213), 3_358),
    },
    num_classes=20,
    reference="7b59478a842430c6781ecf1fae557e8e0f608f6a778102e87bb41dc12b839754",
    splits_reference="f609ea23227e61efe1c76887d9b657699e56b3f1148830d11f1483e18124669a",
    features=_BY_HAND,
)

DATA_SETS = {data_set.name: data_set for data_set in (ACTIVITYNET, THUMOS14)}


def count_faults(data_set: DataSet, videos: dict[str, Video]) -> list[str]:
    """Where the numbers of videos, segments and classes are not the public ones; empty for a sound copy."""
    faults = []
    labels = {item.label for video in videos.values() for item in video.instances}
    if len(labels) != data_set.num_classes:
        faults.append(f"{len(labels)} classes, not {data_set.num_classes}")
    strange = sorted({video.subset for video in videos.values()} - data_set.subsets.keys())
    if strange:
        faults.append(f"unknown subset {name_some(strange)}")
    for name, expected in data_set.subsets.items():
        chosen = [video for video in videos.values() if video.subset == name]
        segments = sum(len(video.instances) for video in chosen)
        if len(chosen) not in expected.videos:
            faults.append(f"{len(chosen):,} {name} videos, not {' or '.join(f'{n:,}' for n in expected.videos)}")
        if segments != expected.segments:
            faults.append(f"{segments:,} {name} segments, not {expected.segments:,}")
    return faults
