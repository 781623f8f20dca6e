"""Facts of each data set: the one table that every part of the package looks them up in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set."""

    title: str  # the name its authors use; also names the folder of its split lists and, in lower case, of its data
    tious: tuple[float, ...]  # thresholds of its evaluation protocol
    subsets: tuple[str, str]  # training and test, in lower case
    # Upper edges of all error-analysis buckets but the last (DETAD): coverage (share of the video), length (seconds)
    # and instances (number in the video).
    buckets: Mapping[str, tuple[float, ...]]
    # Published sizes by subset: numbers of videos (any one of them is right), and of segments.
    counts: Mapping[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    num_classes: int = 0  # published
    annotations: str = "annotations.json"  # name of the normalized file
    reference: str = ""  # SHA-256 of the normalized file made from the copy that this project was tested with
    source: str = ""  # URL of its annotations, or where a person gets them
    ignored_labels: tuple[str, ...] = ()  # which the data set's own evaluation leaves out


DATASETS: dict[str, DatasetFacts] = {
    "activitynet": DatasetFacts(
        title="ActivityNet",
        tious=(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
        subsets=("training", "validation"),
        buckets={"coverage": (0.2, 0.4, 0.6, 0.8), "length": (30, 60, 120, 180), "instances": (1, 4, 8)},
        counts={"training": ((10_024,), 15_410), "validation": ((4_926,), 7_654), "testing": ((5_044,), 0)},
        num_classes=200,
        annotations="activity_net.v1-3.json",
        reference="653f75a4d582bcd431d26060fb79eecd7c8ae30700fa78279d9ee0a9cbe78923",
        source="https://raw.githubusercontent.com/activitynet/ActivityNet/master/Evaluation/data/"
        "activity_net.v1-3.min.json",
    ),
    "thumos14": DatasetFacts(
        title="THUMOS14",
        tious=(0.3, 0.4, 0.5, 0.6, 0.7),
        subsets=("validation", "test"),
        buckets={"coverage": (0.02, 0.04, 0.06, 0.08), "length": (3, 6, 12, 18), "instances": (1, 40, 80)},
        counts={
            "validation": ((200,), 3_007),
            # The 213th, video_test_0001292, has ambiguous segments only; the challenge takes those out.
            "test": ((212, 213), 3_358),
        },
        num_classes=20,
        annotations="thumos14.json",
        reference="323a631950678e0935b5ee8d17a0a6fc7a0158e2d71cbcaaa0b8c72155dadf6d",
        source="thumos14.json of https://github.com/happyharrycn/actionformer_release or thumos_14_anno.json of "
        "https://github.com/sming256/OpenTAD",
        ignored_labels=("Ambiguous",),
    ),
}


def facts(dataset: str, tious: Sequence[float] | None = None) -> DatasetFacts:
    """Facts by a name that begins with the data set's (``THUMOS14``, ``thumos-14``, ``thumos14_i3d``, ``thumos``).

    Other data sets have ActivityNet's protocol. ``tious`` (``data.tious``) take the place of the protocol's.
    """
    if tious:
        return replace(facts(dataset), tious=tuple(tious))
    name = "".join(character for character in dataset.lower() if character.isalnum())
    for key, known in DATASETS.items():
        if name.startswith(key.rstrip("0123456789")):
            return known
    return replace(DATASETS["activitynet"], title=dataset, counts={}, num_classes=0)
