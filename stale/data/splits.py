"""Which classes are seen in training and which are kept unseen.

The official lists (EffPrompt's, used by the paper) lie in a folder
``train_75_test_25/ActivityNet/{train,test}/split_0.list``; without a folder, ten seeded random splits
are drawn on the spot. A second-level split cuts the seen classes alone into pseudo-seen and pseudo-unseen ones: what is
chosen on those owes nothing to the classes that a split keeps unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stale.errors import StaleError, name_some
from stale.files import read_text

SETTINGS = {"75_25": 0.75, "50_50": 0.5, "closed": 1.0}
NUM_SPLITS = 10
_FOLDERS = {"75_25": "train_75_test_25", "50_50": "train_50_test_50"}


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

    Args:
        setting: ``75_25``, ``50_50`` or ``closed`` (train and test on every class).
        index: 0–9, ignored by ``closed``.
        folder: the official splits' folder; ``dataset`` names the sub-folder in it (any case).

    Raises:
        StaleError: unknown setting or index, a missing list, or lists that overlap or do not cover the classes.
    """
    if setting not in SETTINGS:
        raise StaleError(f"data.setting '{setting}' is unknown; use one of {', '.join(SETTINGS)}")
    if setting == "closed":
        everything = tuple(sorted(labels))
        return ClassSplit(everything, everything, "closed set: all classes seen")
    if not 0 <= index < NUM_SPLITS:
        raise StaleError(f"data.split is {index}; splits are numbered 0 to {NUM_SPLITS - 1}")
    if folder is None:
        return _random_split(labels, SETTINGS[setting], index)
    base = _dataset_folder(Path(folder) / _FOLDERS[setting], dataset)
    seen = read_class_list(base / "train" / f"split_{index}.list")
    unseen = read_class_list(base / "test" / f"split_{index}.list")
    _check(set(seen), set(unseen), set(labels), f"{base}, split_{index}.list")
    source = f"official lists, {_FOLDERS[setting]}/{base.name}"
    return ClassSplit(tuple(sorted(seen)), tuple(sorted(unseen)), source)


def cut_seen(split: ClassSplit, index: int, fold: int, folds: int) -> ClassSplit:
    """Fold ``fold`` of the seen classes as pseudo-unseen ones, the other folds as seen; the unseen classes are gone.

    Args:
        index: the split's number, which seeds the shuffle, so that all folds of a split cut the same order.

    Raises:
        StaleError: there is no such fold, or there are fewer classes than folds.
    """
    if not 0 <= fold < folds:
        raise StaleError(f"data.fold is {fold}; {folds} folds (data.folds) are numbered 0 to {folds - 1}")
    if len(split.seen) < folds:
        raise StaleError(f"{len(split.seen)} seen classes cannot be cut into {folds} folds; lower data.folds")
    order = np.random.default_rng(index).permutation(len(split.seen))
    chosen = {split.seen[i] for i in order[fold::folds]}
    seen = tuple(label for label in split.seen if label not in chosen)
    return ClassSplit(
        seen, tuple(sorted(chosen)), f"{folds} folds of the seen classes of split {index}; {split.source}"
    )


def read_class_list(path: str | Path) -> list[str]:
    """The labels of a list file, one a line; blank lines, Windows line ends and a missing last newline are fine.

    Raises:
        StaleError: the file is missing, empty, or names a class twice.
    """
    labels = [line.strip() for line in read_text(path, "split file").splitlines() if line.strip()]
    if not labels:
        raise StaleError(f"split file {path} names no class")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise StaleError(f"split file {path} names a class twice: {name_some(twice)}")
    return labels


def _random_split(labels: list[str], share: float, index: int) -> ClassSplit:
    labels = sorted(labels)
    if len(labels) < 2:
        raise StaleError(f"{len(labels)} classes are too few to split; at least 2 are needed")
    num_seen = min(round(share * len(labels)), len(labels) - 1)  # one class at least is unseen
    order = np.random.default_rng(index).permutation(len(labels))
    seen = sorted(labels[i] for i in order[:num_seen])
    unseen = sorted(labels[i] for i in order[num_seen:])
    return ClassSplit(tuple(seen), tuple(unseen), "seeded random split")


def _dataset_folder(base: Path, dataset: str) -> Path:
    if not base.is_dir():
        raise StaleError(f"split folder not found: {base}; data.splits must hold {base.name}/<data set>/train")
    folders = {entry.name.lower(): entry for entry in base.iterdir() if entry.is_dir()}
    if dataset.lower() not in folders:
        found = name_some(sorted(entry.name for entry in folders.values())) or "nothing"
        raise StaleError(f"no splits for data set '{dataset}' in {base}; found: {found}")
    return folders[dataset.lower()]


def _check(seen: set[str], unseen: set[str], labels: set[str], where: str) -> None:
    faults = {
        "in both train and test": seen & unseen,
        "not in the annotations": (seen | unseen) - labels,
        "in neither train nor test": labels - seen - unseen,
    }
    found = [f"{name_some(sorted(classes))} {fault}" for fault, classes in faults.items() if classes]
    if found:
        raise StaleError(f"{where}: classes {'; '.join(found)}")
