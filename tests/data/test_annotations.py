"""Annotation files: the two real ones complete, and everything that can be wrong with one."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_preparation.converters import load_any_layout
from stale.data.annotations import (
    CLIPPED,
    EMPTY,
    OUTSIDE,
    Instance,
    Video,
    all_labels,
    in_subset,
    match_video_id,
    read_annotations,
    repair,
    unit_fault,
)
from stale.data.classes import parse_classes
from stale.data.dataset import IGNORED, segment_lists
from stale.data.features import open_features
from stale.data.splits import read_class_list
from stale.errors import StaleError
from stale.evaluation import align, ground_truth, results_from_dict
from tests.helpers import needs_shared

GOOD = {"subset": "training", "duration": 10.0, "annotations": [{"segment": [1, 2.5], "label": "Diving"}]}


NUMBERED = [{"segment": [0, 1], "label": label, "label_id": 3} for label in ("x", "y")]


def write(folder: Path, database: Any) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps({"version": "1.3", "database": database, "taxonomy": []}))
    return path


@needs_shared
def test_activitynet_is_read_completely(activitynet: dict[str, Video]) -> None:
    videos = list(activitynet.values())
    # The numbers of the ActivityNet-1.3 release: training, validation, (unlabeled) testing.
    assert Counter(video.subset for video in videos) == {"training": 10024, "validation": 4926, "testing": 5044}
    assert sum(len(video.instances) for video in videos) == 23064
    assert len(all_labels(videos)) == 200
    assert not any(video.instances for video in videos if video.subset == "testing")
    assert [name for name in activitynet if name.startswith("v_")] == ["v_UmAH95xls", "v_Vg4a8igc0"]
    repaired, changes = repair(videos)
    assert changes == {CLIPPED: 14, EMPTY: 12}, "by more than rounding"
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
    repaired, changes = repair(thumos14.values())
    lost = {after.id: len(thumos14[after.id].instances) - len(after.instances) for after in repaired}
    assert changes == {OUTSIDE: 30}
    assert lost["video_test_0000270"] == 22
    # The released code lost most of the training instances.
    training = in_subset(repaired, "validation")
    _, labels = segment_lists(training, all_labels(training), 256)
    assert (int((labels >= 0).sum()), int((labels == IGNORED).sum())) == (3007 - 4, 0)


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    extra = {"segment": [9, 12], "label": "Tai chi", "segment(frames)": [270, 360], "label_id": 3}
    entry = {"fps": 30, "subset": "Validation", "duration": 10, "annotations": [*GOOD["annotations"], extra]}
    expected = Video("clip", "validation", 10.0, (Instance(1.0, 2.5, "Diving"), Instance(9.0, 12.0, "Tai chi")), 30)
    assert read_annotations(write(tmp_path, {"clip": entry})) == {"clip": expected}


def test_the_optional_v_before_an_id() -> None:
    found = {("abc", "v_abc"): "v_abc", ("v_abc", "abc"): "abc", ("v_a", "v_a", "a"): "v_a", ("abc", "ABC", "bc"): None}
    found |= {("v_a", "v_v_a"): "v_v_a", ("v_v_a", "v_a"): "v_a"}
    for (wanted, *known), expected in found.items():
        assert match_video_id(wanted, known) == expected


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("High jump", "High jump "),
        ("High jump", " High\xa0 jump"),
        ("Café", "Cafe\u0301"),
        ("日本 語", "日本\u3000語\t"),
    ],
)
def test_blanks_and_unicode_forms_do_not_matter(tmp_path: Path, name: str, written: str) -> None:
    entry = {"subset": "training\xa0", "duration": 10, "annotations": [{"segment": [1, 2], "label": written}]}
    videos = read_annotations(write(tmp_path, {written: entry}))
    assert videos == {name: Video(name, "training", 10.0, (Instance(1.0, 2.0, name),))}
    assert in_subset(videos.values(), "Training ") == [videos[name]]
    (tmp_path / "a.csv").write_text(f"video,subset,duration,start,end,label\n{written},training,10,1,2,{written}\n")
    assert load_any_layout(tmp_path / "a.csv").videos == videos
    (tmp_path / "a.list").write_text(written)
    assert read_class_list(tmp_path / "a.list") == [item.label for item in parse_classes([written])] == [name]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[written] = np.ones((3, 2), np.float32)
    assert open_features(tmp_path / "a.h5").find(name) == written
    results = results_from_dict({written: [{"segment": [1, 2], "label": written, "score": 1}]})
    found, problems = align(results, ground_truth(videos.values()))
    assert (found.video.tolist(), found.label.tolist(), problems) == ([0], [0], [])


def test_an_exact_name_comes_first_and_messages_show_blanks(tmp_path: Path) -> None:
    assert list(read_annotations(write(tmp_path, {"a ": GOOD, "a": GOOD}))) == ["a ", "a"]
    with pytest.raises(StaleError, match="differ in blanks or Unicode form alone: 'a ', ' a'"):
        read_annotations(write(tmp_path, {"a ": GOOD, " a": GOOD}))
    with pytest.raises(StaleError, match="no video in subset 'b'; the annotations have: 'a '$"):
        in_subset([Video("x", "a ", 1, ())], "b")


@pytest.mark.parametrize(
    ("factor", "fault"),
    [(1, ""), (25, "frames"), (1000, "milliseconds"), (1.5, "another unit than the"), (1 / 40, "shares .0 to 1. of")],
)
def test_segments_in_other_units_are_named(factor: float, fault: str) -> None:
    instances = tuple(Instance(factor * start, factor * (start + 2), "x") for start in range(1, 38))
    found = unit_fault([Video("clip", "test", 40.0, instances), Video("empty", "training", 40.0, ())])
    assert re.fullmatch(f"subset 'test': .*they seem to be in {fault}.*; convert .*" if fault else "", found)


def test_repair_clips_drops_and_counts() -> None:
    segments = [(1, 2), (-1, 3), (8, 12), (-5, 50), (4, 4), (10, 11), (20, 30), (5, 10.009)]
    video = Video("clip", "training", 10.0, tuple(Instance(*times, f"c{i}") for i, times in enumerate(segments)))
    (repaired,), changes = repair([video])
    assert changes == {CLIPPED: 3, OUTSIDE: 2, EMPTY: 1}
    kept = [(1, 2, "c0"), (0, 3, "c1"), (8, 10, "c2"), (0, 10, "c3"), (5, 10, "c7")]
    assert repaired.instances == tuple(Instance(*item) for item in kept)
    assert repair([repaired]) == ([repaired], {})


# Faults: each names the file and the video


SEGMENTS = ([1], [1, 2, 3], [1, "2"], [None, 2], [5, 2], [1, float("nan")], [1, float("inf")], [1, 10**400])
ITEMS = (
    "Diving",
    {"segment": [0, 1]},
    {"label": "Diving"},
    *({"segment": [0, 1], "label": label} for label in (" ", 3)),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"duration": value}, f"'duration' must be a positive number of seconds, not {value!r}")
            for value in (0, -2.0, "10", None, True, float("nan"), float("inf"))
        ),
        ({"subset": None}, "'subset' is missing"),
        *(({"annotations": value}, "'annotations' must be a list") for value in ({"segment": [0, 1]}, None)),
        *(
            ({"annotations": [item]}, "each annotation needs a 'segment' [start, end] in seconds and a 'label', not")
            for item in (*ITEMS, *({"segment": times, "label": "Diving"} for times in SEGMENTS))
        ),
    ],
)
def test_a_faulty_entry_names_file_and_video(tmp_path: Path, changes: dict, message: str) -> None:
    path = write(tmp_path, {"clip": {**GOOD, **changes}})
    with pytest.raises(StaleError, match=f"^annotation file {path}: video 'clip': {re.escape(message)}"):
        read_annotations(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(
            (text, "annotation file .*: JSON with a 'database' object")
            for text in ('{"results": {}}', "[]", '{"database": []}')
        ),
        ('{"database": {"clip": []}}', "annotation file .*: video 'clip': an object with subset"),
        (
            json.dumps({"database": {"a": {**GOOD, "annotations": NUMBERED}}}),
            "annotation file .*: 'x' and 'y' have one label_id .3.; correct it$",
        ),
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
