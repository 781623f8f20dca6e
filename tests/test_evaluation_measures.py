"""Recall, top-1 accuracy, localization alone, where the error sits, external video scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluation_reference import tiou
from hypothesis import given, settings
from test_evaluation_mean_ap import cases, video

from stale.errors import StaleError
from stale.evaluation import detections, evaluate, ground_truth
from stale.evaluation.assess import by_lot, own_label_whole_video, restrict
from stale.evaluation.measures import (
    average_recall,
    best_of_equals,
    class_agnostic,
    top1_accuracy,
    with_true_labels,
    with_true_segments,
)
from stale.evaluation.video_scores import read_video_scores


def found_in(truth, **results):
    """Detections from ``video=[(start, end, label, score), ...]``."""
    keys = ("label", "score")
    return detections(
        {
            v: [{"segment": one[:2], **dict(zip(keys, one[2:], strict=True))} for one in items]
            for v, items in results.items()
        },
        truth,
    )


TRUTH = ground_truth([video("a", (0, 10, "x"), (50, 60, "y")), video("b", (20, 30, "y"))])


def test_recall_looks_at_the_best_of_each_video():
    found = found_in(TRUTH, a=[(0, 10, "y", 0.2), (70, 80, "x", 0.9), (50, 58, "x", 0.1)], b=[(20, 30, "x", 0.01)])
    recall = average_recall(TRUTH, found, [0.5, 0.9], at=(1, 2, 3))
    assert recall == pytest.approx({1: 2 / 6, 2: 4 / 6, 3: 5 / 6})


def test_recall_counts_a_segment_with_several_labels_once():
    found = found_in(TRUTH, a=[(0, 10, "x", 0.9), (0, 10, "y", 0.8), (50, 60, "y", 0.7)])
    assert average_recall(TRUTH, found, [0.5], at=(2,))[2] == pytest.approx(2 / 3)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_recall_equals_its_definition(case):
    truth, found = case
    for k, recall in average_recall(truth, found, [0.5, 0.75], at=(1, 3)).items():
        covered = []
        for where, segment in zip(truth.video, truth.segments, strict=True):
            order = [i for i in np.lexsort((-np.arange(len(found)), -found.scores)) if found.video[i] == where]
            best = list(dict.fromkeys(tuple(found.segments[i]) for i in order))[:k]
            covered += [max((tiou(one, segment) for one in best), default=0) >= t for t in (0.5, 0.75)]
        # Ties of score between different segments may fall either way after merging equal segments.
        if len(set(found.scores.tolist())) == len(found):
            assert recall == pytest.approx(np.mean(covered))


def test_top1_is_the_label_of_the_best_detection():
    found = found_in(TRUTH, a=[(0, 1, "x", 0.2), (3, 9, "y", 0.9)], b=[(0, 1, "x", 0.9), (0, 1, "y", 0.3)])
    assert top1_accuracy(TRUTH, found) == 0.5
    assert top1_accuracy(TRUTH, found_in(TRUTH)) == 0.0


def test_class_agnostic_ignores_labels():
    found = found_in(TRUTH, a=[(0, 10, "y", 0.9), (50, 60, "x", 0.8), (50, 60, "y", 0.5)], b=[(20, 30, "x", 0.7)])
    assert class_agnostic(TRUTH, found, [0.5]).average == 1.0
    assert evaluate(TRUTH, found, [0.5]).average == pytest.approx(0.5 * 1 / 2 * 1 / 2)


def test_class_agnostic_counts_a_true_segment_with_two_labels_once():
    truth = ground_truth([video("a", (0, 10, "Diving"), (0, 10, "CliffDiving"))])
    assert class_agnostic(truth, found_in(truth, a=[(0, 10, "Diving", 1.0)]), [0.5]).average == 1.0


def test_true_labels_leave_only_the_error_of_localization():
    found = found_in(TRUTH, a=[(0, 10, "y", 0.9), (52, 60, "x", 0.8)], b=[(80, 90, "x", 0.7)])
    metrics = with_true_labels(TRUTH, found, [0.5])
    assert metrics.ap[0].tolist() == [1.0, 0.5]


def test_true_segments_leave_only_the_error_of_naming():
    found = found_in(TRUTH, a=[(0, 3, "x", 0.9), (49, 52, "x", 0.95), (55, 70, "y", 0.2)], b=[(25, 90, "y", 0.7)])
    metrics = with_true_segments(TRUTH, found, [0.95])
    assert metrics.ap[0].tolist() == [1.0, 1.0]
    assert with_true_segments(TRUTH, found_in(TRUTH), [0.95]).average == 0.0


@settings(max_examples=100, deadline=None)
@given(cases())
def test_measures_stand_anything(case):
    truth, found = case
    for measure in (class_agnostic, with_true_labels, with_true_segments):
        assert np.all((metrics := measure(truth, found, [0.5]).mean_ap) >= 0) and np.all(metrics <= 1 + 1e-12)
    assert 0 <= top1_accuracy(truth, found) <= 1
    assert len(best_of_equals(found)) <= len(found)
    assert len(by_lot(truth)) == len(truth.videos) * len(truth.classes)
    assert len(own_label_whole_video(truth, found)) == len(set(found.video.tolist()) - {-1})


def test_own_label_on_the_whole_video():
    found = found_in(TRUTH, a=[(0, 1, "x", 0.2), (3, 9, "y", 0.9)], b=[(0, 1, "x", 0.9)])
    whole = own_label_whole_video(TRUTH, found)
    rows = sorted(
        zip(whole.video.tolist(), whole.label.tolist(), whole.segments.tolist(), whole.scores.tolist(), strict=True)
    )
    assert rows == [(0, 1, [0.0, 100.0], 0.9), (1, 0, [0.0, 100.0], 0.9)]


def test_restriction_to_some_classes():
    found = found_in(TRUTH, a=[(0, 10, "x", 0.9)])
    metrics = evaluate(TRUTH, found, [0.5])
    assert (metrics.average, restrict(metrics, ["x"]).average, restrict(metrics, ["y"]).average) == (0.5, 1.0, 0.0)


FORMS = {
    "objects": {"a": {"class": "y", "score": 0.5}, "v_b": {"label": "x", "score": 0.25}},
    "pairs": {"a": ["y", 0.5], "b": ["x", 0.25]},
    "matrix": {"classes": ["y", "x"], "results": {"a": [0.5, 0.1], "b": [0.2, 0.25]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_video_scores_overwrite_labels(tmp_path, form):
    (tmp_path / "s.json").write_text(json.dumps(FORMS[form]))
    scores = read_video_scores(tmp_path / "s.json", TRUTH)
    found = scores.apply(found_in(TRUTH, a=[(0, 10, "x", 0.8), (0, 10, "y", 0.4)], b=[(1, 2, "y", 1.0)]))
    assert found.label.tolist() == [1, 0] and found.scores.tolist() == [0.4, 0.25]
    whole = scores.whole_videos(TRUTH)
    assert whole.segments.tolist() == [[0, 100], [0, 100]] and whole.label.tolist() == [1, 0]


def test_video_scores_beyond_the_vocabulary_are_refused(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"class": ["y", "z"], "results": {"a": [0.1, 0.9], "b": [0, 1]}}))
    with pytest.raises(StaleError, match=r"beyond the vocabulary under test \(z\).*--allow-unseen-supervision"):
        read_video_scores(tmp_path / "s.json", TRUTH)
    allowed = read_video_scores(tmp_path / "s.json", TRUTH, allow_unseen=True)
    assert "--allow-unseen-supervision" in allowed.source
    assert allowed.label.tolist() == [1, 1] and allowed.score.tolist() == [0.1, 0.0]


@pytest.mark.parametrize(
    "content", [[], {}, {"a": 3}, {"a": ["y", None]}, {"classes": ["x"], "results": {"a": [1, 2]}}, {"classes": ["x"]}]
)
def test_wrong_video_scores_are_named(tmp_path, content):
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(StaleError, match="video scores"):
        read_video_scores(tmp_path / "s.json", TRUTH)
