"""Reading anyone's detections: every form, every oddity by name."""

from __future__ import annotations

import gzip
import json
import pickle

import numpy as np
import pytest

from stale.data.annotations import Instance, Video
from stale.errors import StaleError
from stale.evaluation import align, ground_truth, read_results, results_from_dict
from stale.evaluation.results import refuse

NAN = float("nan")
GOOD = {"segment": [0.0, 5.0], "label": "Ballet", "score": 0.9}


def truth():
    videos = [Video(name, "test", 100.0, (Instance(0, 5, "Ballet"),)) for name in ("a", "v_b")]
    return ground_truth(videos, ["Ballet", "Archery"])


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_activitynet_form(tmp_path):
    content = {"version": "1", "external_data": {"used": False}, "results": {"a": [GOOD], "b": []}}
    plain = read_results(write(tmp_path / "p.json", content))
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    for results in (plain, read_results(tmp_path / "p.json.gz")):
        assert results.videos == ("a", "b") and results.labels == ("Ballet",)
        assert results.segments.tolist() == [[0.0, 5.0]] and results.scores.tolist() == [0.9]
        assert results.external_data == {"used": False}


def test_bare_object_of_videos(tmp_path):
    assert len(read_results(write(tmp_path / "p.json", {"a": [GOOD, GOOD]}))) == 2


@pytest.mark.parametrize("labels", [["Ballet", "Archery"], [0, 1]])
def test_columns_of_actionformer(tmp_path, labels):
    columns = {"video-id": ["a", "v_b"], "t-start": [0, 1], "t-end": [5, 6], "label": labels, "score": [0.9, 0.8]}
    results = read_results(write(tmp_path / "p.json", columns), lambda: {0: "Ballet", 1: "Archery"})
    found, problems = align(results, truth())
    assert found.video.tolist() == [0, 1] and found.label.tolist() == [0, 1] and not problems
    assert found.segments.tolist() == [[0, 5], [1, 6]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "an object with 'results'"),
        ({"results": []}, "must map each video"),
        ({"results": {"a": [{"segment": [0, 1], "label": "x"}]}}, "video 'a': a detection needs"),
        ({"results": {"a": [{"segment": [0], "label": "x", "score": 1}]}}, "video 'a': a detection needs"),
        ({"results": {"a": [{"segment": [0, 1], "label": 3, "score": 1}]}}, "video 'a': a detection needs"),
        ({"results": {"a": [3]}}, "video 'a': a detection needs"),
        ({"video-id": ["a"], "t-start": [], "t-end": [], "label": [], "score": []}, "differ in length"),
        ({"video-id": ["a"], "t-start": [0], "t-end": [1], "label": [7], "score": [1]}, "label 7"),
    ],
)
def test_wrong_forms_are_named(tmp_path, content, message):
    with pytest.raises(StaleError, match=message):
        read_results(write(tmp_path / "p.json", content))


def test_a_video_listed_twice_is_an_error(tmp_path):
    (tmp_path / "p.json").write_text('{"results": {"a": [], "a": []}}')
    with pytest.raises(StaleError, match="listed twice: a"):
        read_results(tmp_path / "p.json")


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"video-id": ["a"]}))
    with pytest.raises(StaleError, match="is a pickle"):
        read_results(tmp_path / "p.pkl")


def test_missing_file(tmp_path):
    with pytest.raises(StaleError, match="detections file not found"):
        read_results(tmp_path / "none.json")


ODD = {
    "a segment or score that is not a number": {"a": [{**GOOD, "score": NAN}, {**GOOD, "segment": [None, 3]}]},
    "a segment of negative length": {"a": [{**GOOD, "segment": [5, 1]}]},
    "an unknown video": {"zzz": [GOOD, GOOD]},
    "a label outside the vocabulary": {"a": [{**GOOD, "label": "Juggling"}]},
}
NAMES = {"an unknown video": "zzz", "a label outside the vocabulary": "Juggling"}


@pytest.mark.parametrize("kind", ODD)
def test_oddities_are_counted_and_named(kind):
    odd = ODD[kind]
    results = results_from_dict({"v_b": [GOOD], **odd})
    found, problems = align(results, truth())
    assert [(one.kind, one.count) for one in problems] == [(kind, sum(map(len, odd.values())))]
    assert problems[0].names == (NAMES.get(kind, "a"),)
    left_out = problems[0].treatment == "left out"
    assert len(found) == (1 if left_out else 1 + problems[0].count)
    with pytest.raises(StaleError, match=kind):
        refuse(problems, "p.json")


def test_videos_without_tested_classes_are_no_problem():
    found, problems = align(results_from_dict({"seen": [GOOD]}), truth(), known_videos={"seen"})
    assert not problems and found.video.tolist() == [-1]


def test_ids_match_with_and_without_prefix():
    found, problems = align(results_from_dict({"v_a": [GOOD], "b": [GOOD]}), truth())
    assert not problems and sorted(found.video.tolist()) == [0, 1]


def test_numbers_as_text_are_read():
    results = results_from_dict({"a": [{**GOOD, "score": "0.5"}, {**GOOD, "score": {}}]})
    np.testing.assert_array_equal(results.scores, [0.5, NAN])
