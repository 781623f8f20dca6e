"""Which classes are seen: the official lists, random splits, and lists that cannot be right."""

import shutil
from itertools import combinations
from pathlib import Path

import pytest

from stale.data.annotations import all_labels
from stale.data.datasets import DATASETS, facts
from stale.data.splits import OFFICIAL, SPLIT_FOLDERS, ClassSplit, cut_seen, load_split, read_class_list
from stale.errors import StaleError
from stale.io import write_text
from tests.helpers import REPOSITORY, needs_shared, write_lists

LABELS = [f"class {number:02d}" for number in range(20)]


@needs_shared
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_official_list_fits_the_annotations(dataset: str, request: pytest.FixtureRequest) -> None:
    labels = all_labels(request.getfixturevalue(dataset).values())
    for setting, share in (("75_25", 0.75), ("50_50", 0.5)):
        for index in range(10):
            split = load_split(labels, setting, index, REPOSITORY / "data" / "splits", dataset)
            assert len(split.seen) == share * DATASETS[dataset].num_classes
            assert sorted(split.seen + split.unseen) == labels
            assert split.seen == tuple(sorted(split.seen))
            assert split.source == f"official lists, {SPLIT_FOLDERS[setting]}/{facts(dataset).title}"


@pytest.mark.parametrize("spelling", ["thumos14", "THUMOS-14", "thumos", "thumos14_i3d"])
def test_a_data_set_is_found_in_any_spelling(spelling: str) -> None:
    assert facts(spelling) is DATASETS["thumos14"]
    assert (facts("mine").title, facts("mine").tious) == ("mine", facts("activitynet").tious)


def test_the_repository_holds_all_official_lists_with_their_notice() -> None:
    folder = REPOSITORY / "data" / "splits"
    lists = [tuple(read_class_list(path)) for path in folder.rglob("split_*.list")]
    assert (len(lists), len(set(lists))) == (80, 80)
    assert "MIT License" in (folder / "LICENSE").read_text()


def test_lists_are_official_by_their_content_alone(tmp_path: Path) -> None:
    shutil.copytree(OFFICIAL, tmp_path / "copy")
    base = tmp_path / "copy/train_75_test_25/THUMOS14"
    seen, unseen = (read_class_list(base / part / "split_3.list") for part in ("train", "test"))
    source = "{}, train_75_test_25/THUMOS14"
    for change, expected in (([], "official lists"), ([unseen[0]], f"lists of {tmp_path / 'copy'}")):
        write_text(base / "train/split_3.list", "\n".join([*seen[len(change) :], *change]))
        write_text(base / "test/split_3.list", "\n".join([*unseen[len(change) :], *seen[: len(change)]]))
        split = load_split([*seen, *unseen], "75_25", 3, tmp_path / "copy", "thumos14")
        assert split.source == source.format(expected)


@pytest.mark.parametrize(("setting", "num_seen"), [("75_25", 15), ("50_50", 10)])
def test_random_splits_are_ten_different_disjoint_covers(setting: str, num_seen: int) -> None:
    splits = [load_split(LABELS, setting, index) for index in range(10)]
    for split in splits:
        assert len(split.seen) == num_seen
        assert sorted(split.seen + split.unseen) == LABELS
        assert split.source == "seeded random split"
    assert all(first.seen != second.seen for first, second in combinations(splits, 2))
    # Written down, so that an index means the same split in every version of this project.
    assert load_split(LABELS[::-1], "75_25", 3).unseen == tuple(f"class {i}" for i in ("04", "05", "07", "09", "19"))
    everything = tuple(LABELS)
    assert load_split(LABELS[::-1], "closed", 0) == ClassSplit(everything, everything, "closed set: all classes seen")


@pytest.mark.parametrize("setting", ["75_25", "50_50"])
def test_few_classes_still_give_both_sides(setting: str) -> None:
    for count in (2, 3, 4, 5):
        split = load_split(LABELS[:count], setting, 0)
        assert min(len(split.seen), len(split.unseen)) > 0
        assert sorted(split.seen + split.unseen) == LABELS[:count]
    with pytest.raises(StaleError, match="1 classes are too few to split; at least 2 are needed"):
        load_split(LABELS[:1], setting, 0)


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


def test_bad_and_missing_lists_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.list"
    for content, message in (("a\nb\na\n", "names a class twice: a"), ("\n \n", "names no class")):
        path.write_text(content)
        with pytest.raises(StaleError, match=f"^split file {path} {message}$"):
            read_class_list(path)
    write_lists(tmp_path, ["a"], ["b"])
    with pytest.raises(StaleError, match=f"^split file not found: {tmp_path}/.*/train/split_7.list$"):
        load_split(["a", "b"], "75_25", 7, tmp_path, "tiny")
    with pytest.raises(StaleError, match="no split lists of data set 'tiny' in .*train_50_test_50; found: nothing"):
        load_split(["a", "b"], "50_50", 0, tmp_path, "tiny")
    with pytest.raises(StaleError, match="no split lists of data set 'huge' in .*; found: Tiny"):
        load_split(["a", "b"], "75_25", 0, tmp_path, "huge")


@pytest.mark.parametrize("labels", [["LongJump", "Long Jump", "b", "c"], ["long_jump", "long jump", "b", "c"]])
def test_one_class_in_two_spellings_is_not_seen_and_unseen(tmp_path: Path, labels: list[str]) -> None:
    write_lists(tmp_path, [labels[0], "b"], [labels[1], "c"])
    message = f"'{labels[0]}', '{labels[1]}' are one class to the text encoder"
    with pytest.raises(StaleError, match=message):
        load_split(labels, "75_25", 0, tmp_path, "tiny")
    split = load_split(labels, "closed", 0)
    assert split.seen == split.unseen
    with pytest.raises(StaleError, match=message):
        [cut_seen(split, 0, fold, 4) for fold in range(4)]


def test_the_folds_divide_the_seen_classes_and_leave_the_unseen_ones_out() -> None:
    split = load_split(LABELS, "50_50", 3)
    folds = [cut_seen(split, 3, fold, 3) for fold in range(3)]
    assert sorted(label for fold in folds for label in fold.unseen) == list(split.seen)
    for fold in folds:
        assert sorted(fold.seen + fold.unseen) == list(split.seen)
        assert not set(fold.unseen) & set(fold.seen)
    assert cut_seen(split, 3, 1, 3) == folds[1]
    assert cut_seen(split, 4, 1, 3).unseen != folds[1].unseen  # another split cuts another order
    with pytest.raises(StaleError, match="3 folds .* numbered 0 to 2"):
        cut_seen(split, 0, 3, 3)
    with pytest.raises(StaleError, match="10 seen classes cannot be cut into 11 folds"):
        cut_seen(split, 0, 0, 11)
