"""Class labels become the words a text encoder knows."""

from __future__ import annotations

import pytest
from conftest import needs_shared

from stale.data.annotations import Video, all_labels
from stale.data.vocabulary import phrase


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("HammerThrow", "hammer throw"),
        ("CleanAndJerk", "clean and jerk"),
        ("VolleyballSpiking", "volleyball spiking"),
        ("Tai chi", "Tai chi"),
        ("Doing a powerbomb", "Doing a powerbomb"),
        ("Having an ice cream", "Having an ice cream"),
        ("BMX", "BMX"),
        ("BMXRace", "bmx race"),
        ("Shotput", "Shotput"),
        ("Rock-paper-scissors", "Rock-paper-scissors"),
        ("clean_and_jerk", "clean and jerk"),
        ("Clean_And_Jerk", "clean and jerk"),
        ("_long__jump_", "long jump"),
        ("diving", "diving"),
        ("  Diving ", "Diving"),
    ],
)
def test_phrases(label: str, words: str) -> None:
    assert phrase(label) == words


@needs_shared
def test_activitynet_names_stay_as_they_are(activitynet: dict[str, Video]) -> None:
    labels = all_labels(activitynet.values())
    assert [phrase(label) for label in labels] == labels


@needs_shared
def test_thumos_names_are_words_and_stay_different(thumos14: dict[str, Video]) -> None:
    labels = all_labels(thumos14.values())
    phrases = [phrase(label) for label in labels]
    assert len(set(phrases)) == len(labels) == 20
    for label, words in zip(labels, phrases, strict=True):
        assert words.replace(" ", "").lower() == label.lower()
        assert len(words.split()) == 1 + sum(letter.isupper() for letter in label[1:])
