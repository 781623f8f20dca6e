"""The error analysis: kinds of false positives on hand-made cases."""

import numpy as np
import pytest
from hypothesis import given, settings

from stale.evaluation import analysis, evaluate, ground_truth
from stale.evaluation.analysis import KINDS, confusion, diagnose, sensitivity
from tests.reference.evaluation import cases, found_in, video

TRUTH = ground_truth([video("a", (0, 10, "x"), (50, 60, "y")), video("b", (20, 30, "y"))])


def kinds_of(found, tiou=0.5):
    diagnosis = diagnose(TRUTH, found, [tiou])
    segments = map(tuple, diagnosis.ranked.segments.tolist())
    return {segment: KINDS[kind] for segment, kind in zip(segments, diagnosis.kind[0], strict=True)}


def test_each_kind_of_false_positive():
    found = found_in(
        TRUTH,
        a=[
            (0, 10, "x", 0.9),  # right
            (0, 9, "x", 0.8),  # taken already
            (50, 59, "x", 0.7),  # on the other class
            (7, 20, "x", 0.6),  # a little of its class
            (58, 70, "x", 0.5),  # a little of the other
            (80, 90, "x", 0.4),  # nothing
            (9.9, 20, "x", 0.3),  # less than a tenth
        ],
    )
    expected = dict(zip([(0, 10), (0, 9), (50, 59), (7, 20), (58, 70), (80, 90)], KINDS, strict=True))
    assert kinds_of(found) == {**expected, (9.9, 20): "background"}


def test_profile_counts_by_bands_of_the_class():
    found = found_in(TRUTH, a=[(0, 10, "x", 0.9), (80, 90, "x", 0.8), (50, 60, "y", 0.7)], b=[(0, 1, "y", 0.1)])
    profile = analysis.false_positive_profile(diagnose(TRUTH, found, [0.5]))
    assert profile["counts"][:3] == [3, 1, 0]
    assert profile["bands"][0] == pytest.approx([2 / 3, 0, 0, 0, 0, 1 / 3])
    assert profile["bands"][1] == pytest.approx([0, 0, 0, 0, 0, 1.0])


def test_removal_of_the_only_error_makes_it_perfect():
    found = found_in(TRUTH, a=[(80, 90, "x", 0.9), (0, 10, "x", 0.8), (50, 60, "y", 0.7)], b=[(20, 30, "y", 0.1)])
    impact = analysis.removal_impact(diagnose(TRUTH, found, [0.5]))
    assert impact["average_mAP_N"] + impact["gain"]["background"] == pytest.approx(1.0)
    assert impact["gain"]["localization"] == 0.0


def test_sensitivity_leaves_the_others_out():
    found = found_in(TRUTH, a=[(0, 10, "x", 0.9), (50, 60, "y", 0.8)], b=[(70, 80, "y", 0.9)])
    diagnosis = diagnose(TRUTH, found, [0.5])
    assert analysis.on_instances(diagnosis, np.array([True, False, False])) == (1.0, 0.0)
    assert analysis.on_instances(diagnosis, np.array([False, False, True])) == (0.0, 1.0)
    assert analysis.on_instances(diagnosis, np.array([True, True, True]))[1] == pytest.approx(1 / 3)


def test_instances_fall_into_buckets():
    truth = ground_truth([video("a", (0, 10, "x"), (20, 25, "x"), (0, 50, "y"), duration=50.0)])
    edges = {"coverage": (0.1, 0.2), "length": (5, 10), "instances": (1, 2)}
    buckets = sensitivity(diagnose(truth, found_in(truth), [0.5]), edges)
    counts = {name: [one["chosen"].sum() for one in rows] for name, rows in buckets.items()}
    assert counts == {"coverage": [1, 1, 1], "length": [1, 1, 1], "instances": [1, 2, 0]}
    last = buckets["instances"][2]
    assert (last["bucket"], last["above"], last["up_to"], last["mAP_N"], last["missed"]) == ("M", 2, None, None, None)


def test_confusion_of_classes():
    found = found_in(TRUTH, a=[(0, 10, "y", 0.9), (50, 60, "x", 0.3), (50, 60, "y", 0.2)], b=[(0, 1, "y", 0.1)])
    predicted, background = confusion(diagnose(TRUTH, found, [0.5]), 0.5)
    # The instance of x is taken for y, that of y in b is missed; only two detections of y count, the G best.
    assert predicted.tolist() == [1, 1, -1] and not background.any()
    found = found_in(TRUTH, a=[(0, 10, "y", 0.9), (50, 55, "y", 0.8)], b=[])
    diagnosis = diagnose(TRUTH, found, [0.6])
    predicted, background = confusion(diagnosis, 0.6)
    assert predicted.tolist() == [1, -1, -1]
    assert diagnosis.ranked.segments[background].tolist() == [[50, 55]]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_diagnosis_agrees_with_the_evaluator(case):
    truth, found = case
    diagnosis = diagnose(truth, found, [0.5, 0.75])
    counts = diagnosis.num_instances
    # With as many instances in every class the normalization changes nothing.
    if len(set(counts[counts > 0].tolist())) == 1:
        plain = evaluate(truth, found, [0.5, 0.75]).average
        assert analysis.normalized_map(diagnosis, diagnosis.kind >= 0) == pytest.approx(plain)
    impact, profile = analysis.removal_impact(diagnosis), analysis.false_positive_profile(diagnosis)
    assert all(gain >= -1e-12 for gain in impact["gain"].values())
    for shares, count in zip(profile["bands"], profile["counts"], strict=True):
        assert sum(shares) == pytest.approx(1.0 if count else 0.0)
    predicted, background = confusion(diagnosis, 0.5)
    assert (predicted[diagnosis.taken[0][(diagnosis.taken[0] >= 0) & diagnosis.top]] >= 0).all()
    assert not (background & (diagnosis.kind[0] < 3)).any()
