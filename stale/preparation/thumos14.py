"""THUMOS14's annotations as the challenge published them: one text file a class in a zip archive a subset.

A line is ``video_validation_0000051  67.5 75.9``: video, start and end in seconds. The archives say nothing of how long
a video is; durations and frame rates, facts of the 412 annotated videos, lie in ``thumos14_videos.csv``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stale.data.annotations import Instance, Video
from stale.errors import StaleError, name_some
from stale.preparation.archives import read_members

CLASSES = (
    "BaseballPitch", "BasketballDunk", "Billiards", "CleanAndJerk", "CliffDiving", "CricketBowling", "CricketShot",
    "Diving", "FrisbeeCatch", "GolfSwing", "HammerThrow", "HighJump", "JavelinThrow", "LongJump", "PoleVault",
    "Shotput", "SoccerPenalty", "TennisSwing", "ThrowDiscus", "VolleyballSpiking",
)  # fmt: skip
NAME = "thumos14"
AMBIGUOUS = "Ambiguous"  # neither action nor none, says the challenge: taken out of the evaluation

_MEMBER = re.compile(r"(?:.*/)?([A-Za-z]+)_(val|test)\.txt")
_SUBSETS = {"val": "validation", "test": "test"}
_TABLE = Path(__file__).with_name("thumos14_videos.csv")


@dataclass(frozen=True)
class Parsed:
    """Videos by id, their frames a second, and the number of ambiguous segments left out."""

    videos: dict[str, Video]
    fps: dict[str, float]
    ambiguous: int


def read_archives(*paths: str | Path) -> Parsed:
    """Read the annotation archives of one or both subsets.

    Raises:
        StaleError: an archive is unusable, lacks a class, or names a video that the challenge has not annotated.
    """
    durations, rates = _read_table()
    instances: dict[str, list[Instance]] = {}
    subsets: dict[str, str] = {}
    ambiguous = 0
    for path in paths:
        for label, subset, lines in _class_files(path):
            if label == AMBIGUOUS:
                ambiguous += len(lines)
                continue
            for video, instance in (_parse(line, label, path) for line in lines):
                instances.setdefault(video, []).append(instance)
                subsets[video] = subset
    unknown = sorted(instances.keys() - durations.keys())
    if unknown:
        raise StaleError(f"{name_some(paths)}: no duration is known of {name_some(unknown)}")
    videos = {
        video: Video(video, subsets[video], durations[video], tuple(instances[video])) for video in sorted(instances)
    }
    return Parsed(videos, {video: rates[video] for video in videos}, ambiguous)


def _class_files(path: str | Path) -> list[tuple[str, str, list[str]]]:
    """(label, subset, lines that are not blank) of each class in an archive."""
    found = []
    for name, content in sorted(read_members(path, _MEMBER).items()):
        match = _MEMBER.fullmatch(name)
        if match and match[1] in (*CLASSES, AMBIGUOUS):
            lines = content.decode("utf-8", errors="replace").splitlines()
            found.append((match[1], _SUBSETS[match[2]], [line for line in lines if line.strip()]))
    files = [(label, subset) for label, subset, _ in found]
    if len(set(files)) < len(files):
        raise StaleError(f"archive {path}: a class has two files of one subset")
    missing = set(CLASSES) - {label for label, _ in files}
    if missing:
        raise StaleError(f"archive {path}: no text file of {name_some(sorted(missing))}; is it the right archive?")
    return found


def _parse(line: str, label: str, path: str | Path) -> tuple[str, Instance]:
    try:
        video, start, end = line.split()
        return video, Instance(float(start), float(end), label)
    except ValueError:
        raise StaleError(f"archive {path}, {label}: '{line.strip()[:80]}' is not a video with start and end") from None


def _read_table() -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Duration in seconds and frames a second of each annotated video."""
    with open(_TABLE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return ({row["video"]: float(row["duration"]) for row in rows}, {row["video"]: float(row["fps"]) for row in rows})
