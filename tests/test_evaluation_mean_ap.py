"""mAP: equal to the official evaluators on golden data, and to an obvious reference on random cases."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, SHARED, needs_shared
from evaluation_reference import reference_per_class
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.data.annotations import Instance, Video, read_annotations
from stale.evaluation import (
    Detections,
    GroundTruth,
    detections,
    drop_duplicates,
    evaluate,
    evaluate_results,
    ground_truth,
)

GOLDEN = ["anet13_mini", "anet13_zs50_split0", "thumos14_mini", "thumos14_zs50_split0"]
TIOUS = [0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0]


def load_golden(name):
    folder = SHARED / "golden" / name
    truth = ground_truth(read_annotations(folder / "gt.json").values())
    found = detections(json.loads((folder / "pred.json").read_text())["results"], truth)
    return truth, found, json.loads((folder / "expected.json").read_text())


@needs_shared
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_official_evaluator(name):
    truth, found, expected = load_golden(name)
    metrics = evaluate(truth, found, expected["tiou"])
    official = expected["evaluators"]["activitynet_official"]
    assert len(truth) == official["n_gt"]
    np.testing.assert_allclose(metrics.mean_ap, official["mAP"], rtol=0, atol=1e-9)
    table = np.array([expected["per_class_ap_activitynet_official"][label] for label in truth.classes]).T
    np.testing.assert_allclose(metrics.ap, table, rtol=0, atol=5.001e-9)  # the file has eight digits


@needs_shared
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("evaluator", ["actionformer", "opentad"])
def test_equals_those_that_drop_duplicates(name, evaluator):
    truth, found, expected = load_golden(name)
    truth = drop_duplicates(truth)
    assert len(truth) == expected["evaluators"][evaluator]["n_gt"]
    mean_ap = evaluate(truth, found, expected["tiou"]).mean_ap
    np.testing.assert_allclose(mean_ap, expected["evaluators"][evaluator]["mAP"], rtol=0, atol=1e-9)


@needs_shared
@pytest.mark.parametrize("name", ["anet13_mini", "thumos14_mini"])
@pytest.mark.parametrize("decimals", [7, 1])  # with one decimal most scores are tied
def test_equals_the_reference_on_golden_data(name, decimals):
    truth, found, expected = load_golden(name)
    found = Detections(found.video, found.label, found.segments, found.scores.round(decimals))
    fast = evaluate(truth, found, expected["tiou"]).ap
    np.testing.assert_allclose(fast, reference_per_class(truth, found, expected["tiou"]), rtol=0, atol=1e-12)


@st.composite
def cases(draw):
    """Few videos, classes, places and scores, so that overlaps, ties and duplicates abound."""

    def segments(count, shortest):
        starts = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
        lengths = draw(st.lists(st.integers(shortest, 5), min_size=count, max_size=count))
        return np.array([(s, s + n) for s, n in zip(starts, lengths, strict=True)], dtype=float).reshape(-1, 2)

    def indices(count, low, high):
        values = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
        return np.array(values, dtype=np.int64)

    num_true, num_found = draw(st.integers(1, 12)), draw(st.integers(0, 25))
    video, label = indices(num_true, 0, 1), indices(num_true, 0, 1)
    truth = GroundTruth(("a", "b"), ("x", "y", "z"), np.full(2, 11.0), video, label, segments(num_true, 0))
    scores = indices(num_found, 0, 4) / 4
    found = Detections(indices(num_found, -1, 1), indices(num_found, 0, 2), segments(num_found, -1), scores)
    return truth, found


@settings(max_examples=400, deadline=None)
@given(cases())
def test_equals_the_reference_on_random_cases(case):
    truth, found = case
    fast = evaluate(truth, found, TIOUS).ap
    np.testing.assert_allclose(fast, reference_per_class(truth, found, TIOUS), rtol=0, atol=1e-12)


def video(name, *instances, duration=100.0):
    return Video(name, "test", duration, tuple(Instance(*instance) for instance in instances))


def test_the_second_on_one_instance_is_false():
    results = {"v": [{"segment": [0, 10], "label": "x", "score": s} for s in (0.9, 0.8)]}
    metrics = evaluate_results([video("v", (0, 10, "x"), (50, 60, "x"))], results, None, [0.5])
    assert metrics.ap.tolist() == [[0.5]]


def test_a_taken_instance_leaves_the_next_best():
    truth = [video("v", (0, 10, "x"), (2, 12, "x"))]
    results = {"v": [{"segment": [0, 10], "label": "x", "score": s} for s in (0.9, 0.8)]}
    assert evaluate_results(truth, results, None, [0.5]).average == 1.0


def test_of_equal_scores_the_later_ranks_first():
    truth = [video("v", (0, 10, "x"))]
    right, wrong = ({"segment": [s, s + 10], "label": "x", "score": 0.5} for s in (0, 50))
    assert evaluate_results(truth, {"v": [wrong, right]}, None, [0.5]).average == 1.0
    assert evaluate_results(truth, {"v": [right, wrong]}, None, [0.5]).average == 0.5


def test_ground_truth_is_counted_as_written():
    """Empty and out-of-bounds instances count, as in the official evaluator; so do videos without detections."""
    truth = ground_truth([video("a", (3, 3, "x"), (90, 130, "x")), video("b", (0, 5, "x")), video("c")])
    assert len(truth) == 3 and truth.videos == ("a", "b")
    found = detections({"a": [{"segment": [90, 130], "label": "x", "score": 1.0}]}, truth)
    assert evaluate(truth, found, [0.95]).average == pytest.approx(1 / 3)


def test_classes_without_ground_truth_do_not_count():
    metrics = evaluate_results([video("v", (0, 1, "x"))], {}, ["x", "y"], [0.5])
    assert metrics.average == 0.0 and np.isnan(metrics.ap[0, 1])


def test_duplicates_are_of_one_video_and_class():
    near = [(0, 10, "x"), (0.0005, 10, "x"), (0, 10, "y"), (0, 10.1, "x"), (5, 5, "x")]
    truth = ground_truth([video("a", *near), video("b", (0, 10, "x"))])
    assert len(truth) == 6 and len(drop_duplicates(truth)) == 4


def test_evaluation_needs_no_torch():
    code = "import sys, eval, stale.evaluation, stale.evaluation.analysis_page; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
