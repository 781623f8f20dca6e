"""Which classes are seen: the official lists, random splits, and lists that cannot be right."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared

from stale.data.annotations import Video, all_labels
from stale.data.splits import ClassSplit, cut_seen, load_split, read_class_list
from stale.errors import StaleError

LABELS = [f"class {number:02d}" for number in range(20)]


def write_lists(folder: Path, seen: list[str], unseen: list[str], dataset: str = "Tiny") -> Path:
    for part, labels in (("train", seen), ("test", unseen)):
        path = folder / "train_75_test_25" / dataset / part / "split_0.list"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(labels))
    return folder


# The official lists


@needs_shared
@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize(
    ("dataset", "setting", "num_seen", "num_unseen"),
    [
        ("activitynet", "75_25", 150, 50),
        ("activitynet", "50_50", 100, 100),
        ("thumos14", "75_25", 15, 5),
        ("thumos14", "50_50", 10, 10),
    ],
)
def test_every_official_list_fits_the_annotations(
    dataset: str, setting: str, num_seen: int, num_unseen: int, index: int, request: pytest.FixtureRequest
) -> None:
    labels = all_labels(request.getfixturevalue(dataset).values())
    split = load_split(labels, setting, index, SHARED / "data" / "splits", dataset)
    assert (len(split.seen), len(split.unseen)) == (num_seen, num_unseen)
    assert sorted(split.seen + split.unseen) == labels
    assert split.seen == tuple(sorted(split.seen))
    share = setting.split("_")
    assert split.source.lower() == f"official lists, train_{share[0]}_test_{share[1]}/{dataset}"


@needs_shared
def test_the_ten_official_splits_differ(thumos14: dict[str, Video]) -> None:
    labels = all_labels(thumos14.values())
    splits = [load_split(labels, "75_25", index, SHARED / "data" / "splits", "THUMOS14") for index in range(10)]
    assert len({split.unseen for split in splits}) == 10


# Random splits


@pytest.mark.parametrize(("setting", "num_seen"), [("75_25", 15), ("50_50", 10)])
def test_random_splits_are_ten_different_disjoint_covers(setting: str, num_seen: int) -> None:
    splits = [load_split(LABELS, setting, index) for index in range(10)]
    for split in splits:
        assert len(split.seen) == num_seen
        assert sorted(split.seen + split.unseen) == LABELS
        assert split.source == "seeded random split"
    assert all(first.seen != second.seen for first, second in combinations(splits, 2))


def test_random_splits_depend_on_the_index_and_the_classes_alone() -> None:
    first = load_split(LABELS, "75_25", 3)
    assert load_split(LABELS[::-1], "75_25", 3) == first
    # Written down, so that an index means the same split in every version of this project.
    assert first.unseen == ("class 04", "class 05", "class 07", "class 09", "class 19")


@pytest.mark.parametrize("setting", ["75_25", "50_50"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_classes_still_give_both_sides(setting: str, count: int) -> None:
    split = load_split(LABELS[:count], setting, 0)
    assert split.seen
    assert split.unseen
    assert sorted(split.seen + split.unseen) == LABELS[:count]


@pytest.mark.parametrize("count", [0, 1])
def test_one_class_cannot_be_split(count: int) -> None:
    with pytest.raises(StaleError, match=f"{count} classes are too few to split; at least 2 are needed"):
        load_split(LABELS[:count], "75_25", 0)


def test_closed_sees_everything() -> None:
    everything = tuple(LABELS)
    assert load_split(LABELS[::-1], "closed", 99) == ClassSplit(everything, everything, "closed set: all classes seen")


@pytest.mark.parametrize("index", [-1, 10])
def test_splits_are_numbered_0_to_9(index: int) -> None:
    with pytest.raises(StaleError, match=f"data.split is {index}; splits are numbered 0 to 9"):
        load_split(LABELS, "50_50", index)


def test_unknown_settings_name_the_known_ones() -> None:
    with pytest.raises(StaleError, match="data.setting '60_40' is unknown; use one of 75_25, 50_50, closed"):
        load_split(LABELS, "60_40", 0)


# Lists that cannot be right


@pytest.mark.parametrize(
    ("seen", "unseen", "message"),
    [
        (["a", "b", "c"], ["c", "d"], "classes c in both train and test$"),
        (["a", "b"], ["d"], "classes c in neither train nor test$"),
        (["a", "b", "c"], ["d", "e"], "classes e not in the annotations$"),
        (["a", "b", "d"], ["d", "C"], "d in both.*; C not in the annotations; c in neither"),
    ],
)
def test_offending_classes_are_named(tmp_path: Path, seen: list, unseen: list, message: str) -> None:
    write_lists(tmp_path, seen, unseen)
    with pytest.raises(StaleError, match=f"{tmp_path}/train_75_test_25/Tiny, split_0.list: .*{message}"):
        load_split(["a", "b", "c", "d"], "75_25", 0, tmp_path, "tiny")


@pytest.mark.parametrize(
    "content",
    ["Tai chi\nBMX\n", "Tai chi\nBMX", "Tai chi\r\nBMX\r\n", "\n\n  Tai chi \n\t\nBMX\n\n", "\ufeffTai chi\nBMX"],
)
def test_line_ends_and_blank_lines_do_not_matter(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.list").write_bytes(content.encode())
    assert read_class_list(tmp_path / "a.list") == ["Tai chi", "BMX"]


@pytest.mark.parametrize(("content", "message"), [("a\nb\na\n", "names a class twice: a"), ("\n \n", "names no class")])
def test_doubled_and_empty_lists_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.list").write_text(content)
    with pytest.raises(StaleError, match=f"^split file {tmp_path}/a.list {message}$"):
        read_class_list(tmp_path / "a.list")


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    write_lists(tmp_path, ["a"], ["b"])
    with pytest.raises(StaleError, match=f"^split file not found: {tmp_path}/.*/train/split_7.list$"):
        load_split(["a", "b"], "75_25", 7, tmp_path, "tiny")


def test_a_missing_folder_or_data_set_is_named(tmp_path: Path) -> None:
    write_lists(tmp_path, ["a"], ["b"])
    with pytest.raises(StaleError, match=f"^split folder not found: {tmp_path}/train_50_test_50"):
        load_split(["a", "b"], "50_50", 0, tmp_path, "tiny")
    with pytest.raises(StaleError, match="no splits for data set 'huge' in .*; found: Tiny"):
        load_split(["a", "b"], "75_25", 0, tmp_path, "huge")


# A second-level split of the seen classes


def test_the_folds_of_the_seen_classes_share_them_out_and_leave_the_unseen_ones_alone():
    split = load_split(LABELS, "50_50", 3)
    folds = [cut_seen(split, 3, fold, 3) for fold in range(3)]
    assert sorted(label for fold in folds for label in fold.unseen) == list(split.seen)
    for fold in folds:
        assert sorted(fold.seen + fold.unseen) == list(split.seen)
        assert not set(fold.unseen) & set(fold.seen)
    assert cut_seen(split, 3, 1, 3) == folds[1]
    assert cut_seen(split, 4, 1, 3).unseen != folds[1].unseen  # another split cuts another order


def test_folds_that_are_not_there_are_refused():
    split = load_split(LABELS, "50_50", 0)
    with pytest.raises(StaleError, match="3 folds .* numbered 0 to 2"):
        cut_seen(split, 0, 3, 3)
    with pytest.raises(StaleError, match="10 seen classes cannot be cut into 11 folds"):
        cut_seen(split, 0, 0, 11)
