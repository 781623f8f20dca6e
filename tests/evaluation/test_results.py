"""Loading anyone's detections: every form, every irregularity by name."""

import gzip
import json
import pickle

import numpy as np
import pytest

from stale.data.annotations import Instance, Video
from stale.errors import StaleError
from stale.evaluation import align, ground_truth, read_results, results_from_dict

NAN = float("nan")
GOOD = {"segment": [0.0, 5.0], "label": "Ballet", "score": 0.9}


def truth():
    videos = [Video(name, "test", 100.0, (Instance(0, 5, "Ballet"),)) for name in ("a", "v_b")]
    return ground_truth(videos, ["Ballet", "Archery"])


def test_activitynet_form(tmp_path):
    content = {"version": "1", "external_data": {"used": False}, "results": {"a": [GOOD], "b": []}}
    text, path = json.dumps(content).encode(), tmp_path / "p.json"
    for written in (text, gzip.compress(text)):
        path.write_bytes(written)
        results = read_results(path)
        assert results.videos == ("a", "b") and results.labels == ("Ballet",)
        assert results.segments.tolist() == [[0.0, 5.0]] and results.scores.tolist() == [0.9]
        assert results.external_data == {"used": False}
    path.write_text(json.dumps({"a": [GOOD, GOOD]}))
    assert len(read_results(path)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "an object with 'results'"),
        ({"results": []}, "must map each video"),
        ({"results": {"a": [{"segment": [0, 1], "label": "x"}]}}, "video 'a': a detection needs"),
        ({"results": {"a": [{"segment": [0], "label": "x", "score": 1}]}}, "video 'a': a detection needs"),
        ({"results": {"a": [3]}}, "video 'a': a detection needs"),
        (b'{"results": {"a": [], "a": []}}', "given twice in the same object: a"),
        (pickle.dumps({"video-id": ["a"]}), "is a pickle"),
        (gzip.compress(pickle.dumps(["a"]), mtime=0), "is a pickle"),
        (None, "file not found"),
    ],
)
def test_wrong_forms_are_named(tmp_path, content, message):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(StaleError, match=message):
        read_results(path)


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("text", ["label", "a: b"])
def test_every_way_of_writing_is_parsed_alike(tmp_path, space, text):
    content = {"note": text, "results": {"v": [{**GOOD, "label": text, "score": 1e-7}, {**GOOD, "score": NAN}]}}
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content, separators=(",", space + ":")))
    results = read_results(path)
    assert (results.labels, results.scores[0], np.isnan(results.scores[1])) == ((text, "Ballet"), 1e-7, True)
    path.write_text(path.read_text().replace('"segment"', '"score"', 1))
    with pytest.raises(StaleError, match="given twice in the same object: score"):
        read_results(path)


ODD = {
    "a segment or score that is not a number": {
        "a": [{**GOOD, "score": NAN}, {**GOOD, "score": 10**400}, {**GOOD, "segment": [None, 3]}]
    },
    "a segment of negative length": {"a": [{**GOOD, "segment": [5, 1]}]},
    "a start after the end of their video": {"a": [{**GOOD, "segment": [101, 102]}]},
    "an unknown video": {"zzz": [GOOD, GOOD]},
    "a label outside the vocabulary": {"a": [{**GOOD, "label": "Juggling"}]},
}
NAMES = {"an unknown video": "zzz", "a label outside the vocabulary": "Juggling"}


@pytest.mark.parametrize("kind", ODD)
def test_oddities_are_counted_and_named(kind):
    odd = ODD[kind]
    results = results_from_dict({"v_b": [GOOD], **odd})
    found, (problem,) = align(results, truth())
    assert (problem["kind"], problem["count"]) == (kind, sum(map(len, odd.values())))
    assert problem["names"] == [NAMES.get(kind, "a")]
    assert len(found) == (1 if problem["treatment"] == "left out" else 1 + problem["count"])


def test_known_videos_and_ids_with_or_without_prefix_are_no_problem():
    found, problems = align(results_from_dict({"seen": [GOOD], "v_a": [GOOD], "b": [GOOD]}), truth(), {"seen"})
    assert not problems and found.video.tolist() == [-1, 0, 1]
    twice = results_from_dict({"v_a": [GOOD], "a": [GOOD], "b": [GOOD], "v_v_b": [GOOD]})
    found, (problem,) = align(twice, truth())  # one video under two names: the exact one counts
    assert (found.video.tolist(), problem["names"]) == ([-1, 0, 1, -1], ["v_a", "v_v_b"])
    relative = results_from_dict({"a": 10 * [{**GOOD, "segment": [0.1, 0.9]}]})
    assert align(relative, truth())[1][0]["kind"] == "an end within the first second"
