"""The error analysis: kinds of false positives by hand-made cases, and a page that stands on its own."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from test_evaluation_mean_ap import cases, video
from test_evaluation_measures import found_in

import eval as command
from stale.evaluation import evaluate, ground_truth
from stale.evaluation.analysis import (
    KINDS,
    analyze,
    characteristics,
    class_confusion,
    diagnose,
    false_positive_profile,
    missed_share,
    normalized_map,
    normalized_map_of,
    removal_impact,
)
from stale.evaluation.analysis_page import html_table, plain_text

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


def test_a_detection_in_an_unknown_video_is_background():
    assert kinds_of(found_in(TRUTH, z=[(0, 10, "x", 1.0)])) == {(0, 10): "background"}


def test_profile_counts_by_bands_of_the_class():
    found = found_in(TRUTH, a=[(0, 10, "x", 0.9), (80, 90, "x", 0.8), (50, 60, "y", 0.7)], b=[(0, 1, "y", 0.1)])
    profile = false_positive_profile(diagnose(TRUTH, found, [0.5]))
    assert profile["counts"][:3] == [3, 1, 0]
    assert profile["bands"][0] == pytest.approx([2 / 3, 0, 0, 0, 0, 1 / 3])
    assert profile["bands"][1] == [0, 0, 0, 0, 0, 1.0]


def test_removal_of_the_only_error_makes_it_perfect():
    found = found_in(TRUTH, a=[(80, 90, "x", 0.9), (0, 10, "x", 0.8), (50, 60, "y", 0.7)], b=[(20, 30, "y", 0.1)])
    impact = removal_impact(diagnose(TRUTH, found, [0.5]))
    assert impact["average_mAP_N"] + impact["gain"]["background"] == pytest.approx(1.0)
    assert impact["gain"]["localization"] == 0.0


def test_sensitivity_leaves_the_others_out():
    found = found_in(TRUTH, a=[(0, 10, "x", 0.9), (50, 60, "y", 0.8)], b=[(70, 80, "y", 0.9)])
    diagnosis = diagnose(TRUTH, found, [0.5])
    assert normalized_map_of(diagnosis, np.array([True, False, False])) == 1.0
    assert normalized_map_of(diagnosis, np.array([False, False, True])) == 0.0
    assert missed_share(diagnosis, np.array([True, True, True])) == pytest.approx(1 / 3)


def test_characteristics_of_instances():
    truth = ground_truth([video("a", (0, 10, "x"), (20, 25, "x"), (0, 50, "y"), duration=50.0)])
    values = characteristics(truth)
    assert values["coverage"].tolist() == [0.2, 0.1, 1.0]
    assert values["length"].tolist() == [10, 5, 50] and values["instances"].tolist() == [2, 2, 1]


def test_confusion_of_classes():
    found = found_in(TRUTH, a=[(0, 10, "y", 0.9), (50, 60, "y", 0.8)])
    confusion = class_confusion(diagnose(TRUTH, found, [0.5]))
    assert confusion["counts"] == [[0, 1], [0, 1]]
    assert confusion["pairs"] == [{"true": "x", "predicted": "y", "count": 1}]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_diagnosis_agrees_with_the_evaluator(case):
    truth, found = case
    diagnosis = diagnose(truth, found, [0.5, 0.75])
    counts = diagnosis.num_instances
    # With as many instances in every class the normalization changes nothing.
    if len(set(counts[counts > 0].tolist())) == 1:
        plain = evaluate(truth, found, [0.5, 0.75]).average
        assert normalized_map(diagnosis, diagnosis.kind >= 0) == pytest.approx(plain)
    content = analyze(truth, found, [0.5, 0.75])
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert all(gain >= -1e-12 for gain in content["removal"]["gain"].values())
    for buckets in (*content["sensitivity"].values(), *content["missed"].values()):
        assert sum(one["count"] for one in buckets) == len(truth)
    for shares, count in zip(content["false_positives"]["bands"], content["false_positives"]["counts"], strict=True):
        assert sum(shares) == pytest.approx(1.0 if count else 0.0)


def test_page_is_whole_and_escaped(tmp_path):
    label = '<script>alert("x")</script> $\\frac$ & co'
    items = [{"segment": [0, 10], "label": label}, {"segment": [20, 40], "label": "Other"}]
    database = {"v<b>": {"subset": "validation", "duration": 50.0, "annotations": items}}
    (tmp_path / "a<i>.json").write_text(json.dumps({"database": database}))
    results = {"v<b>": [{"segment": [1, 10], "label": label, "score": 0.5}]}
    results["v<b>"].append({"segment": [20, 40], "label": label, "score": 0.4})
    (tmp_path / "p.json").write_text(json.dumps({"results": results}))
    folder = tmp_path / "analysis"
    files = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(tmp_path / "a<i>.json")]
    command.main([*files, "--analyze", str(folder)])
    page = (folder / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<i>" not in page and "DETAD" in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,22})', page)) == {"data:image/png;base64,"}
    assert page.count("<img") == 4 and page.startswith("<!DOCTYPE html>") and "protocol: a&lt;i&gt;" in page
    names = {path.name for path in folder.iterdir()}
    pictures = {f"{name}.png" for name in ("false_positives", "sensitivity", "missed", "confusion")}
    assert names == {"index.html", "analysis.json", *pictures}
    content = json.loads((folder / "analysis.json").read_text())
    assert content["protocol"]["dataset"] == "a<i>" and content["kinds"] == list(KINDS)


def test_text_is_made_safe():
    assert html_table(["<h>"], [["<c>"]]).count("&lt;") == 2
    assert plain_text("a$b$") == "a\\$b\\$" and len(plain_text("n" * 99)) == 28
