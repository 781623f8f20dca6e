"""Annotation files: the two real ones complete, and everything that can be wrong with one."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stale.data.annotations import (
    Instance,
    Repairs,
    Video,
    all_labels,
    in_subset,
    match_video_id,
    read_annotations,
    repair,
)
from stale.errors import StaleError
from tests.helpers import needs_shared

GOOD = {"subset": "training", "duration": 10.0, "annotations": [{"segment": [1, 2.5], "label": "Diving"}]}


def write(path: Path, database: Any) -> Path:
    path.write_text(json.dumps({"version": "1.3", "database": database, "taxonomy": []}))
    return path


def one(tmp_path: Path, **changes: Any) -> Path:
    """A file with one video ``clip``, changed."""
    return write(tmp_path / "a.json", {"clip": {**GOOD, **changes}})


# The real files


@needs_shared
def test_activitynet_is_read_completely(activitynet: dict[str, Video]) -> None:
    videos = list(activitynet.values())
    # The numbers of the ActivityNet-1.3 release: training, validation, (unlabelled) testing.
    assert Counter(video.subset for video in videos) == {"training": 10024, "validation": 4926, "testing": 5044}
    assert sum(len(video.instances) for video in videos) == 23064
    assert len(all_labels(videos)) == 200
    assert not any(video.instances for video in videos if video.subset == "testing")
    assert [name for name in activitynet if name.startswith("v_")] == ["v_UmAH95xls", "v_Vg4a8igc0"]
    with_prefix = {f"v_{name}" for name in activitynet}
    assert all(match_video_id(name, with_prefix) == f"v_{name}" for name in activitynet)
    assert all(match_video_id(f"v_{name}", activitynet) == name for name in activitynet)
    repaired, repairs = repair(videos)
    assert repairs == Repairs(clipped=14, dropped=12), "by more than rounding"
    assert sum(len(video.instances) for video in repaired) == 23064 - 12
    assert all(0 <= item.start < item.end <= video.duration for video in repaired for item in video.instances)


@needs_shared
def test_thumos14_is_read_completely(thumos14: dict[str, Video]) -> None:
    for subset, num_videos, num_instances in (("Validation", 200, 3007), ("TEST", 212, 3358)):
        videos = in_subset(thumos14.values(), subset)
        assert len(videos) == num_videos
        assert sum(len(video.instances) for video in videos) == num_instances
        assert len(all_labels(videos)) == 20
    # 30 segments lie wholly after the end of their video, 22 of them in one; none straddles it.
    repaired, repairs = repair(thumos14.values())
    lost = {after.id: len(thumos14[after.id].instances) - len(after.instances) for after in repaired}
    assert (repairs, lost["video_test_0000270"]) == (Repairs(clipped=0, dropped=30), 22)


# Reading


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    extra = {"segment": [9, 12], "label": "Tai chi", "segment(frames)": [270, 360], "label_id": 3}
    path = one(tmp_path, fps=30, subset="Validation", annotations=[*GOOD["annotations"], extra])
    expected = Video("clip", "validation", 10.0, (Instance(1.0, 2.5, "Diving"), Instance(9.0, 12.0, "Tai chi")))
    assert read_annotations(path) == {"clip": expected}


def test_subset_names_match_in_any_case(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"a": {**GOOD, "subset": "Validation"}, "b": {"subset": "Test", "duration": 3}})
    videos = read_annotations(path)
    assert videos["b"].instances == ()
    for name in ("validation", "Validation", "VALIDATION"):
        assert in_subset(videos.values(), name) == [videos["a"]]
    with pytest.raises(StaleError, match="no video in subset 'training'; the annotations have: test, validation"):
        in_subset(videos.values(), "training")


@pytest.mark.parametrize(
    ("wanted", "known", "found"),
    [
        ("abc", {"abc"}, "abc"),
        ("abc", {"v_abc"}, "v_abc"),
        ("v_abc", {"abc"}, "abc"),
        ("v_abc", {"v_abc", "abc"}, "v_abc"),
        ("v_UmAH95xls", {"v_v_UmAH95xls"}, "v_v_UmAH95xls"),
        ("abc", {"ABC", "bc"}, None),
    ],
)
def test_the_optional_v_before_an_id(wanted: str, known: set[str], found: str | None) -> None:
    assert match_video_id(wanted, known) == found


# Repair


def test_repair_clips_drops_and_counts() -> None:
    segments = [(1, 2), (-1, 3), (8, 12), (-5, 50), (4, 4), (10, 11), (20, 30), (5, 10.009)]
    video = Video("clip", "training", 10.0, tuple(Instance(*times, f"c{i}") for i, times in enumerate(segments)))
    (repaired,), repairs = repair([video])
    assert repairs == Repairs(clipped=3, dropped=3)
    assert repaired.instances == (
        Instance(1, 2, "c0"),
        Instance(0, 3, "c1"),
        Instance(8, 10, "c2"),
        Instance(0, 10, "c3"),
        Instance(5, 10, "c7"),
    )
    assert repair([repaired]) == ([repaired], Repairs(0, 0))


# Faults: each names the file and the video


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"duration": value}, f"'duration' must be a positive number of seconds, not {value!r}")
            for value in (0, -2.0, "10", None, True, float("nan"), float("inf"))
        ),
        ({"subset": None}, "'subset' is missing"),
        ({"annotations": {"segment": [0, 1]}}, "'annotations' must be a list"),
        ({"annotations": [{"segment": [0, 1]}]}, "each annotation needs a 'label'"),
        ({"annotations": [{"segment": [0, 1], "label": " "}]}, "each annotation needs a 'label'"),
        ({"annotations": [{"segment": [0, 1], "label": 3}]}, "each annotation needs a 'label'"),
        ({"annotations": [{"label": "Diving"}]}, "each annotation needs a 'segment' of two numbers"),
        ({"annotations": ["Diving"]}, "each annotation needs a 'segment' of two numbers"),
        ({"annotations": None}, "'annotations' must be a list"),
        ({"annotations": [{"segment": [5, 2], "label": "Diving"}]}, "segment [5, 2] ends before it starts"),
        *(
            ({"annotations": [{"segment": times, "label": "Diving"}]}, "each annotation needs a 'segment' of two")
            for times in ([1], [1, 2, 3], [1, "2"], [None, 2], [1, float("nan")], [1, float("inf")], [1, 10**400])
        ),
    ],
)
def test_a_faulty_entry_names_file_and_video(tmp_path: Path, changes: dict, message: str) -> None:
    path = one(tmp_path, **changes)
    with pytest.raises(StaleError, match=f"^annotation file {path}: video 'clip': {re.escape(message)}"):
        read_annotations(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((text, "annotation file .*: no 'database' object") for text in ('{"results": {}}', "[]", '{"database": []}')),
        ('{"database": {"clip": []}}', "annotation file .*: video 'clip': an object with subset"),
        ('{"database": {"clip": ', "annotation file is not valid JSON: "),
        ('{"database": {"a": {}, "a": {}}}', "annotation file .*: given twice in the same object: a$"),
        ('{"database": {"a": {"subset": "b", "subset": "c"}}}', "annotation file .*: given twice .*: subset$"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(StaleError, match=f"^{message}"):
        read_annotations(tmp_path / "a.json")
    with pytest.raises(StaleError, match=f"^annotation file not found: {tmp_path}/b.json$"):
        read_annotations(tmp_path / "b.json")
