"""Class labels become the words a text encoder knows."""

from pathlib import Path

import pytest

from stale.data.annotations import Video, all_labels
from stale.data.classes import NamedClass, fill_template, parse_classes, phrase, read_classes
from stale.errors import StaleError
from stale.io import write_json
from tests.helpers import needs_shared


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("HammerThrow", "hammer throw"),
        ("CleanAndJerk", "clean and jerk"),
        ("Tai chi", "Tai chi"),
        ("BMX", "BMX"),
        ("BMXRace", "bmx race"),
        ("Shotput", "Shotput"),
        ("Rock-paper-scissors", "Rock-paper-scissors"),
        ("Clean_And_Jerk", "clean and jerk"),
        ("_long__jump_", "long jump"),
        ("diving", "diving"),
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


def test_classes_are_loaded_from_text_lines_or_json(tmp_path: Path) -> None:
    assert parse_classes("high jump") == [NamedClass("high jump", ("high jump",))]
    lines = tmp_path / "c.txt"
    lines.write_text("# sports\nHighJump\n\n  serve | a tennis serve \n\tgolf: putt, 9")
    expected = [
        NamedClass("HighJump", ("high jump",)),
        NamedClass("serve", ("serve", "a tennis serve")),
        NamedClass("golf: putt, 9", ("golf: putt, 9",)),
    ]
    assert read_classes(lines) == expected
    write_json(tmp_path / "c.json", {"x": ["y", "z"], "w": "v"})
    assert read_classes(tmp_path / "c.json") == [NamedClass("x", ("y", "z")), NamedClass("w", ("v",))]
    write_json(tmp_path / "l.json", ["HighJump"])
    assert read_classes(tmp_path / "l.json") == expected[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "# nothing", "c.txt: no classes"),
        ("c.txt", "a\na", "c.txt: class named twice: a"),
        ("c.json", '{"a": 3}', "list of names"),
        ("c.json", "3", "list of names"),
        ("c.json", '{"a": []}', "empty"),
        ("c.json", "{", "JSON"),
    ],
)
def test_bad_classes_files_are_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(StaleError, match=message):
        read_classes(tmp_path / name)
