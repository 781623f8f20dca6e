"""Which classes are seen in training and which are kept unseen.

The official lists (EffPrompt's, used by the paper [P]) lie in ``data/splits``, as
``train_75_test_25/ActivityNet/{train,test}/split_0.list``; without a folder, ten seeded random splits are drawn.
A second-level split cuts the seen classes alone into pseudo-seen and pseudo-unseen ones: settings chosen on those owe
nothing to the unseen classes of that split [ours]; other splits test some of its seen ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stale.data.classes import same_text
from stale.errors import StaleError, name_some
from stale.io import clean_name, read_text

OFFICIAL = Path(__file__).resolve().parents[2] / "data" / "splits"
SPLIT_FOLDERS = {"75_25": "train_75_test_25", "50_50": "train_50_test_50"}
NUM_SPLITS = 10
_SEEN_SHARES = {"75_25": 0.75, "50_50": 0.5}


@dataclass(frozen=True)
class ClassSplit:
    """Sorted labels of the ``seen`` (training) and ``unseen`` (test) classes; equal in the closed setting."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    source: str


def load_split(
    labels: list[str], setting: str, index: int, folder: str | Path | None = None, dataset: str = ""
) -> ClassSplit:
    """Split ``labels`` (all classes of the annotations) by an official list or, without ``folder``, by seed.

    A missing list, lists that overlap or do not cover the classes, and one class in two spellings on both sides are a
    StaleError.

    Args:
        setting: ``75_25``, ``50_50`` or ``closed`` (train and test on every class).
        index: 0–9, ignored by ``closed``.
        folder: the folder of the lists; ``dataset`` names the sub-folder in it (any case).
    """
    labels = sorted(labels)
    if setting == "closed":
        return ClassSplit(tuple(labels), tuple(labels), "closed set: all classes seen")
    if folder is None:
        if len(labels) < 2:
            raise StaleError(f"{len(labels)} classes are too few to split; at least 2 are needed")
        num_seen = min(round(_SEEN_SHARES[setting] * len(labels)), len(labels) - 1)  # at least one class is unseen
        order = np.random.default_rng(index).permutation(len(labels))
        drawn, rest = (sorted(labels[i] for i in part) for part in (order[:num_seen], order[num_seen:]))
        return _zero_shot(drawn, rest, "seeded random split")
    lists = Path(folder) / SPLIT_FOLDERS[setting]
    folders = {path.name.lower(): path for path in lists.glob("*/")}
    base = folders.get(dataset.lower())
    if base is None:
        found = name_some(sorted(path.name for path in folders.values())) or "nothing"
        raise StaleError(f"no split lists of data set '{dataset}' in {lists}; found: {found}")
    seen, unseen = (sorted(read_class_list(base / part / f"split_{index}.list")) for part in ("train", "test"))
    faults = {
        "in both train and test": {*seen} & {*unseen},
        "not in the annotations": {*seen, *unseen} - {*labels},
        "in neither train nor test": {*labels} - {*seen, *unseen},
    }
    wrong = [f"{name_some(sorted(classes))} {fault}" for fault, classes in faults.items() if classes]
    if wrong:
        raise StaleError(f"{base}, split_{index}.list: classes {'; '.join(wrong)}")
    names = f"{SPLIT_FOLDERS[setting]}/{base.name}"
    official = [OFFICIAL / names / part / f"split_{index}.list" for part in ("train", "test")]
    same = all(map(Path.is_file, official)) and [sorted(read_class_list(file)) for file in official] == [seen, unseen]
    source = f"official lists, {names}" if same else f"lists of {folder}, {names}"
    return _zero_shot(seen, unseen, source)


def cut_seen(split: ClassSplit, index: int, fold: int, folds: int) -> ClassSplit:
    """Make fold ``fold`` of the seen classes pseudo-unseen and the other folds seen; the unseen classes are left out.

    ``index`` is the split's number, which seeds the shuffle, so that all folds of a split cut the same order.
    """
    if not 0 <= fold < folds:
        raise StaleError(f"data.fold is {fold}; {folds} folds (data.folds) are numbered 0 to {folds - 1}")
    if len(split.seen) < folds:
        raise StaleError(f"{len(split.seen)} seen classes cannot be cut into {folds} folds; lower data.folds")
    order = np.random.default_rng(index).permutation(len(split.seen))
    chosen = {split.seen[i] for i in order[fold::folds]}
    seen = [label for label in split.seen if label not in chosen]
    source = f"{folds} folds of the seen classes of split {index}; {split.source}"
    return _zero_shot(seen, sorted(chosen), source)


def _zero_shot(seen: Sequence[str], unseen: Sequence[str], source: str) -> ClassSplit:
    """The split; a StaleError if a class of one side is one of the other in another spelling."""
    for group in same_text((*seen, *unseen)):
        if {*group} & {*seen} and {*group} & {*unseen}:
            spelled = ", ".join(map(repr, group))
            raise StaleError(f"{source}: {spelled} are one class to the text encoder, seen and unseen; rename one")
    return ClassSplit(tuple(seen), tuple(unseen), source)


def read_class_list(path: str | Path) -> list[str]:
    """Load the labels of a list file, one a line; a StaleError if it is missing, empty, or names a class twice."""
    labels = [label for line in read_text(path, "split file").splitlines() if (label := clean_name(line))]
    if not labels:
        raise StaleError(f"split file {path} names no class")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise StaleError(f"split file {path} names a class twice: {name_some(twice)}")
    return labels
