"""The official lists of seen and unseen classes: found in a folder or in EffPrompt's repository archive, and written
where :func:`stale.data.splits.load_split` reads them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from stale.data.splits import NUM_SPLITS, load_split, read_class_list
from stale.errors import StaleError, name_some
from stale.files import write_text
from stale.preparation.archives import read_members

SETTINGS = {"75_25": "train_75_test_25", "50_50": "train_50_test_50"}

Lists = dict[str, list[str]]  # "train_75_test_25/train/split_0.list" → labels

_PLACES = ("", "splits", "data/splits")  # below a folder that is given as a source


def list_names() -> list[str]:
    """Names of the forty lists of a data set, without the data set's own folder."""
    return [
        f"{folder}/{part}/split_{index}.list"
        for folder in SETTINGS.values()
        for part in ("train", "test")
        for index in range(NUM_SPLITS)
    ]


def find_lists(folder: str | Path, title: str) -> Path | None:
    """The folder at or below ``folder`` that holds lists of the data set ``title`` (any case), or None."""
    for place in _PLACES:
        base = Path(folder) / place
        if any(_data_set_folder(base / setting, title) for setting in SETTINGS.values()):
            return base
    return None


def is_complete(folder: str | Path, title: str) -> bool:
    """Whether ``folder`` itself has all forty lists."""
    folders = {setting: _data_set_folder(Path(folder) / setting, title) for setting in SETTINGS.values()}
    return all(
        (base := folders[name.split("/")[0]]) is not None and (base / name.split("/", 1)[1]).is_file()
        for name in list_names()
    )


def read_lists(folder: str | Path, title: str) -> Lists:
    """The forty lists below ``folder``.

    Raises:
        StaleError: one is missing, empty, or names a class twice.
    """
    lists = {}
    for name in list_names():
        setting, rest = name.split("/", 1)
        base = _data_set_folder(Path(folder) / setting, title) or Path(folder) / setting / title
        lists[name] = read_class_list(base / rest)
    return lists


def read_zipped_lists(path: str | Path, title: str) -> Lists:
    """The forty lists in an archive of EffPrompt's repository, wherever in it they lie.

    Raises:
        StaleError: the archive is unusable, a list is missing, or two places have different ones.
    """
    settings = "|".join(SETTINGS.values())
    pattern = re.compile(rf"(?:.*/)?({settings})/{title}/(train|test)/(split_[0-9]\.list)", re.IGNORECASE)
    lists: Lists = {}
    for member, content in read_members(path, pattern).items():
        match = pattern.fullmatch(member)
        name = "/".join(match.groups()).lower() if match else ""
        labels = [line.strip() for line in content.decode("utf-8").splitlines() if line.strip()]
        if lists.setdefault(name, labels) != labels:
            raise StaleError(f"archive {path} has two different lists {title}, {name}")
    missing = [name for name in list_names() if not lists.get(name)]
    if missing:
        raise StaleError(f"archive {path}: {len(missing)} lists of {title} are missing: {name_some(missing)}")
    return lists


def write_lists(lists: Lists, folder: str | Path, title: str) -> list[Path]:
    """Write ``lists`` below ``folder``; the paths."""
    paths = []
    for name, labels in lists.items():
        setting, rest = name.split("/", 1)
        path = Path(folder) / setting / title / rest
        write_text(path, "".join(f"{label}\n" for label in labels))
        paths.append(path)
    return paths


def fingerprint(lists: Lists) -> str:
    """SHA-256 of what the lists say; the order of classes, line ends and blank lines do not matter."""
    text = "".join(f"{name}\n" + "".join(f"{label}\n" for label in sorted(lists[name])) for name in sorted(lists))
    return hashlib.sha256(text.encode()).hexdigest()


def judge_splits(folder: str | Path, title: str, labels: list[str], complete: bool = True) -> dict[str, str]:
    """The splits below ``folder`` against ``labels``: "75_25, split 3" → what is wrong, empty where nothing is.

    Args:
        complete: both settings with ten splits each must be there; else splits without any list are passed over.
    """
    verdicts = {}
    for setting, place in SETTINGS.items():
        base = _data_set_folder(Path(folder) / place, title)
        for index in range(NUM_SPLITS):
            lists = [base / part / f"split_{index}.list" for part in ("train", "test")] if base else []
            if not complete and not any(path.exists() for path in lists):
                continue
            try:
                load_split(labels, setting, index, folder, title)
                verdicts[f"{setting}, split {index}"] = ""
            except StaleError as error:
                verdicts[f"{setting}, split {index}"] = str(error)
    return verdicts


def _data_set_folder(base: Path, title: str) -> Path | None:
    if not base.is_dir():
        return None
    return next((entry for entry in sorted(base.iterdir()) if entry.name.lower() == title.lower()), None)
