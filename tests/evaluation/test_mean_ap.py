"""mAP: equal to the official evaluators on golden data, and to an obvious reference on random cases."""

import json

import numpy as np
import pytest
from hypothesis import given, settings

from stale.data.annotations import in_subset, read_annotations
from stale.evaluation import align, detections, drop_duplicates, evaluate, evaluate_results, ground_truth, read_results
from tests.helpers import SHARED, needs_shared
from tests.reference.evaluation import cases, reference_per_class, video

GOLDEN = ["anet13_mini", "anet13_zs50_split0", "thumos14_mini", "thumos14_zs50_split0"]
TIOUS = [0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0]


def load_golden(name):
    folder = SHARED / "golden" / name
    truth = ground_truth(read_annotations(folder / "gt.json").values())
    found = detections(json.loads((folder / "pred.json").read_text())["results"], truth)
    return truth, found, json.loads((folder / "expected.json").read_text())


@needs_shared
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_official_evaluator_and_those_that_drop_duplicates(name):
    truth, found, expected = load_golden(name)
    metrics = evaluate(truth, found, expected["tiou"])
    table = np.array([expected["per_class_ap_activitynet_official"][label] for label in truth.classes]).T
    np.testing.assert_allclose(metrics.ap, table, rtol=0, atol=5.001e-9)  # the file has eight digits
    without = evaluate(drop_duplicates(truth), found, expected["tiou"])
    for evaluator, ours in (("activitynet_official", metrics), ("actionformer", without), ("opentad", without)):
        assert ours.num_instances.sum() == expected["evaluators"][evaluator]["n_gt"]
        np.testing.assert_allclose(ours.mean_ap, expected["evaluators"][evaluator]["mAP"], rtol=0, atol=1e-9)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("setting", ["50", "75"])
def test_published_zero_shot_detections_get_their_published_score(setting):
    """FreeZAD's own evaluation rounds AP of each class to 0.1."""
    folder = SHARED / "golden" / "freezad"
    expected = json.loads((folder / "expected.json").read_text())
    for split, average in enumerate(expected["settings"][setting]["per_split_average_mAP"]):
        truth = ground_truth(read_annotations(folder / f"ground_truth_{setting}_{split}.json").values())
        found, problems = align(read_results(folder / f"detections_{setting}_{split}.json"), truth)
        assert not problems
        assert 100 * evaluate(truth, found, expected["tiou"]).average == pytest.approx(average, abs=0.03)


@needs_shared
def test_published_detections_of_all_thumos14_test_videos_get_the_official_ap():
    """In TennisSwing and BasketballDunk it depends on the order of equal tIoUs, which NumPy leaves to the processor."""
    expected = json.loads((SHARED / "golden" / "pmil" / "expected.json").read_text())
    videos = read_annotations(SHARED / expected["annotations"]).values()
    truth = ground_truth(in_subset(videos, expected["subset"]))
    found, problems = align(read_results(SHARED / "golden" / "pmil" / "base_test.json"), truth)
    metrics = evaluate(truth, found, expected["tiou"])
    assert not problems and len(found) == 31_587
    table = np.array([expected["ap"][label] for label in truth.classes]).T
    order = np.tile([0.5, 0.1, 0.3], 9).argsort().tolist()  # of the machine that made the expected values:
    alike = order == [1, 4, 7, 10, 13, 22, 19, 16, 25, 8, 20, 23, 14, 11, 5, 2, 26, 17, 15, 12, 3, 0, 9, 6, 21, 18, 24]
    tied = np.isin(truth.classes, ["TennisSwing", "BasketballDunk"]) & (not alike)
    np.testing.assert_allclose(metrics.ap[:, ~tied], table[:, ~tied], rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_equals_the_reference_on_random_cases(case):
    truth, found = case
    fast = evaluate(truth, found, TIOUS).ap
    np.testing.assert_allclose(fast, reference_per_class(truth, found, TIOUS), rtol=0, atol=1e-12)


ONE, NEAR = [(0, 10, "x")], [(0, 10, "x"), (2, 12, "x")]


@pytest.mark.parametrize(
    ("instances", "found", "average"),
    [
        pytest.param([*ONE, (50, 60, "x")], [(0, 10, 0.9), (0, 10, 0.8)], 0.5, id="a second on one instance is false"),
        pytest.param(NEAR, [(0, 10, 0.9), (0, 10, 0.8)], 1.0, id="a taken instance leaves the next best"),
        pytest.param(ONE, [(50, 60, 0.5), (0, 10, 0.5)], 1.0, id="of equal scores the later ranks first"),
        pytest.param(ONE, [(0, 10, 0.5), (50, 60, 0.5)], 0.5, id="of equal scores the earlier ranks last"),
    ],
)
def test_rules_of_counting(instances, found, average):
    results = {"v": [{"segment": [start, end], "label": "x", "score": score} for start, end, score in found]}
    assert evaluate_results([video("v", *instances)], results, None, [0.5]).average == average


def test_ground_truth_is_counted_as_written():
    """Empty and out-of-bounds instances count, as in the official evaluator; so do videos without detections."""
    truth = ground_truth([video("a", (3, 3, "x"), (90, 130, "x")), video("b", (0, 5, "x")), video("c")])
    assert len(truth) == 3 and truth.videos == ("a", "b")
    found = detections({"a": [{"segment": [90, 130], "label": "x", "score": 1.0}]}, truth)
    assert evaluate(truth, found, [0.95]).average == pytest.approx(1 / 3)
    metrics = evaluate_results([video("v", (0, 1, "x"))], {}, ["x", "y"], [0.5])
    assert metrics.average == 0.0 and np.isnan(metrics.ap[0, 1]), "a class without ground truth does not count"


def test_duplicates_are_of_one_video_and_class():
    near = [(0, 10, "x"), (0.0005, 10, "x"), (0, 10, "y"), (0, 10.1, "x"), (5, 5, "x")]
    truth = ground_truth([video("a", *near), video("b", (0, 10, "x"))])
    assert len(truth) == 6 and len(drop_duplicates(truth)) == 4
