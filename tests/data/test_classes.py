"""Class labels become the words a text encoder knows."""

from pathlib import Path

import pytest

from stale.data.annotations import Video, all_labels
from stale.data.classes import NamedClass, fill_template, parse_classes, phrase, read_classes
from stale.errors import StaleError
from tests.helpers import needs_shared, write_classes


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("HammerThrow", "hammer throw"),
        ("Tai chi", "Tai chi"),
        ("BMX", "BMX"),
        ("BMXRace", "bmx race"),
        ("Rock-paper-scissors", "Rock-paper-scissors"),
        ("Clean_And_Jerk", "clean and jerk"),
        ("  Diving ", "Diving"),
    ],
)
def test_phrases(label: str, words: str) -> None:
    assert phrase(label) == words


@needs_shared
def test_the_phrases_of_the_data_sets(activitynet: dict[str, Video], thumos14: dict[str, Video]) -> None:
    labels = all_labels(activitynet.values())
    assert [phrase(label) for label in labels] == labels
    for label in all_labels(thumos14.values()):
        words = phrase(label)
        assert words.replace(" ", "").lower() == label.lower()
        assert len(words.split()) == 1 + sum(letter.isupper() for letter in label[1:])


def test_a_template_takes_the_phrase() -> None:
    assert fill_template(["a", "b"], ["x {}", "{} y"]) == ["x a", "a y", "x b", "b y"]
    with pytest.raises(StaleError, match="'x' has no"):
        fill_template(["a"], ["x"])


def test_classes_are_loaded_from_text_or_lines(tmp_path: Path) -> None:
    assert parse_classes("high jump") == [NamedClass("high jump", ("high jump",))]
    assert parse_classes({"x": ["y", "z"], "w": "v"}) == [NamedClass("x", ("y", "z")), NamedClass("w", ("v",))]
    lines = ("# sports", "HighJump", "", "  serve | a tennis serve ", "\tgolf: putt, 9")
    assert read_classes(write_classes(tmp_path / "c.txt", *lines)) == [
        NamedClass("HighJump", ("high jump",)),
        NamedClass("serve", ("serve", "a tennis serve")),
        NamedClass("golf: putt, 9", ("golf: putt, 9",)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [("# nothing", "no classes"), ("a\na", "class named twice: a"), ("a | ", "class 'a': .*empty")],
)
def test_bad_classes_files_are_errors(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(StaleError, match=f"c.txt: {message}"):
        read_classes(write_classes(tmp_path / "c.txt", content))
