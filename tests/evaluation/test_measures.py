"""Recall, top-1 accuracy, localization or classification alone, external video scores."""

import json

import numpy as np
import pytest
from hypothesis import given, settings

from stale.data.annotations import all_labels, in_subset, read_annotations, with_any_of
from stale.data.datasets import facts
from stale.data.splits import load_split
from stale.errors import StaleError
from stale.evaluation import Detections, evaluate, ground_truth
from stale.evaluation.measures import (
    average_recall,
    class_agnostic,
    random_whole_video,
    top1_accuracy,
    top1_whole_video,
    with_true_labels,
    with_true_segments,
)
from stale.evaluation.results import read_video_scores
from tests.helpers import SHARED, needs_shared
from tests.reference.evaluation import cases, found_in, tiou, video

TRUTH = ground_truth([video("a", (0, 10, "x"), (50, 60, "y")), video("b", (20, 30, "y"))])


def test_recall_counts_a_segment_with_two_labels_once():
    twice = found_in(TRUTH, a=[(0, 10, "x", 0.9), (0, 10, "y", 0.8), (50, 60, "y", 0.7)])
    assert average_recall(TRUTH, twice, [0.5], at=(2,))["2"] == pytest.approx(2 / 3)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_recall_equals_its_definition(case):
    truth, found = case
    for k, recall in average_recall(truth, found, [0.5, 0.75], at=(1, 3)).items():
        covered = []
        for where, segment in zip(truth.video, truth.segments, strict=True):
            order = [i for i in np.lexsort((-np.arange(len(found)), -found.scores)) if found.video[i] == where]
            best = list(dict.fromkeys(tuple(found.segments[i]) for i in order))[: int(k)]
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
    twice = ground_truth([video("a", (0, 10, "Diving"), (0, 10, "CliffDiving"))])
    assert class_agnostic(twice, found_in(twice, a=[(0, 10, "Diving", 1.0)]), [0.5]).average == 1.0


def test_true_labels_leave_only_the_error_of_localization():
    found = found_in(TRUTH, a=[(0, 10, "y", 0.9), (52, 60, "x", 0.8)], b=[(80, 90, "x", 0.7)])
    assert with_true_labels(TRUTH, found, [0.5]).ap[0].tolist() == [1.0, 0.5]


def test_classes_that_happen_at_once_all_count():
    truth = ground_truth([video("a", (0, 10, "x"), (0.1, 10, "y"), (1, 9, "z")), video("b", (20, 30, "y"))])
    # One detected segment for two instances, a better-scored one on the third, and a detection without an instance.
    found = found_in(truth, a=[(0, 10, "x", 0.5), (1, 9, "x", 0.9), (50, 60, "x", 0.1)], b=[(20, 30, "x", 0.6)])
    assert with_true_labels(truth, found, [0.5, 0.9]).ap.tolist() == [[1.0, 1.0, 1.0]] * 2
    # A better-scored label of another segment does not count against this one.
    found = found_in(truth, a=[(0, 10, "x", 0.2), (0.1, 10, "y", 0.2), (1, 9, "z", 0.9)], b=[(20, 30, "y", 0.1)])
    assert with_true_segments(truth, found, [0.5, 0.9]).ap.tolist() == [[1.0, 1.0, 1.0]] * 2


def test_true_segments_leave_only_the_error_of_classification():
    found = found_in(TRUTH, a=[(0, 3, "x", 0.9), (49, 52, "x", 0.95), (55, 70, "y", 0.2)], b=[(25, 90, "y", 0.7)])
    metrics = with_true_segments(TRUTH, found, [0.95])
    assert metrics.ap[0].tolist() == [1.0, 1.0]
    assert with_true_segments(TRUTH, found_in(TRUTH), [0.95]).average == 0.0
    negative = found_in(TRUTH, a=[(0, 10, "x", -0.15), (50, 90, "x", -0.2)])
    assert with_true_segments(TRUTH, negative, [0.95]).ap[0].tolist() == [1.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_measures_accept_anything_and_perfect_detections_score_full(case):
    truth, found = case
    truth = truth.take(truth.segments[:, 0] < truth.segments[:, 1])
    scores = np.random.default_rng(len(truth)).random(len(truth))
    perfect = Detections(truth.video, truth.label, truth.segments, scores)
    for measure in (evaluate, class_agnostic, with_true_labels, with_true_segments) if len(truth) else ():
        assert measure(truth, perfect, [0.5, 1.0]).average == pytest.approx(1.0)
    truth, found = case
    for measure in (class_agnostic, with_true_labels, with_true_segments):
        assert np.all((metrics := measure(truth, found, [0.5]).mean_ap) >= 0) and np.all(metrics <= 1 + 1e-12)
    assert 0 <= top1_accuracy(truth, found) <= 1
    assert len(found.of_segments) <= len(found)
    assert len(random_whole_video(truth)) == len(truth.videos) * len(truth.classes)
    assert len(top1_whole_video(truth, found)) == len(set(found.video.tolist()) - {-1})


def read_scores(folder, content, truth=TRUTH, **options):
    (folder / "s.json").write_text(json.dumps(content))
    return read_video_scores(folder / "s.json", truth, **options)


def test_video_scores_overwrite_labels(tmp_path):
    scores = read_scores(tmp_path, {"class": ["y", "x"], "results": {"a": [0.5, 0.1], "v_b": [0.2, 0.25]}})
    found = scores.apply(found_in(TRUTH, a=[(0, 10, "x", 0.8), (0, 10, "y", 0.4)], b=[(1, 2, "y", 1.0)]))
    assert found.label.tolist() == [1, 0] and found.scores.tolist() == [0.4, 0.25]
    with pytest.raises(StaleError, match="must not be negative"):
        scores.apply(found_in(TRUTH, a=[(0, 10, "x", -0.1)]))
    whole = scores.whole_videos(TRUTH)
    assert whole.segments.tolist() == [[0, 100], [0, 100]] and whole.label.tolist() == [1, 0]


def test_classes_beyond_the_vocabulary_are_refused_or_left_out_and_named(tmp_path):
    content = {"class": ["y", "z"], "results": {"a": [0.1, 0.9]}}
    with pytest.raises(StaleError, match="1 classes beyond those under test .z.: .*--allow-unseen-supervision"):
        read_scores(tmp_path, content)
    scores = read_scores(tmp_path, content, allow_unseen=True)
    assert scores.label.tolist() == [[1], [-1]] and scores.score.tolist() == [[0.1], [0.0]]
    assert scores.source == "s.json with --allow-unseen-supervision, nothing for 1 of 2 videos"


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"kind": "zero_shot", "source": "a CLIP"}, "s.json (zero-shot, by a CLIP)"), ({"kind": "oracle"}, "(ORACLE)")],
)
def test_a_classifier_without_training_on_the_classes_may_know_more_of_them(tmp_path, fields, named):
    scores = read_scores(tmp_path, {"classes": ["y", "z"], "results": {"a": [0.1, 0.9]}, **fields})
    assert scores.label.tolist() == [[1], [-1]] and named in scores.source


def test_several_labels_of_a_video(tmp_path):
    scores = read_scores(tmp_path, {"class": ["y", "x"], "results": {"a": [0.5, 0.4]}}, top=2, decay=0.5)
    found = scores.apply(found_in(TRUTH, a=[(0, 10, "x", 0.8), (0, 10, "y", 0.4), (50, 60, "x", 0.5)]))
    rows = zip(found.label.tolist(), found.segments[:, 0].tolist(), found.scores.tolist(), strict=True)
    expected = {(1, 0): 0.8 * 0.5, (1, 50): 0.5 * 0.5, (0, 0): 0.8 * 0.2, (0, 50): 0.5 * 0.2}
    assert {(label, start): score for label, start, score in rows} == pytest.approx(expected)
    assert len(scores.whole_videos(TRUTH)) == 2


@needs_shared
@pytest.mark.parametrize(("setting", "published"), [("75_25", 91.3), ("50_50", 83.5)])
def test_true_segments_with_real_zero_shot_labels(tmp_path, setting, published):
    """The values are others'; the ten official splits of THUMOS14."""
    content = json.loads((SHARED / "data/clip/thumos14_test_clip_vitb16_video_scores.json").read_text())
    content |= {"kind": "zero_shot", "source": "CLIP ViT-B/16"}
    videos, values = read_annotations(SHARED / "data/annotations/thumos14.json"), []
    for split in range(10):
        lists = {"folder": SHARED / "data/splits", "dataset": "thumos14"}
        unseen = load_split(all_labels(videos.values()), setting, split, **lists).unseen
        truth = ground_truth(with_any_of(in_subset(videos.values(), "test"), unseen), unseen)
        perfect = Detections(truth.video, truth.label, truth.segments, np.ones(len(truth)))
        found = read_scores(tmp_path, content, truth).apply(perfect)
        values.append(100 * evaluate(truth, found, facts("thumos14").tious).average)
    assert np.mean(values) == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize(
    "content",
    [
        *([], {}, {"class": ["x"]}, {"class": ["x"], "results": {}, "kind": "other"}),
        {"class": ["x"], "results": {}, "kind": "zero_shot"},
        *({"class": ["x"], "results": {"a": row}} for row in ([1, 2], 3, [None], [-0.1], [10**400, 1])),
    ],
)
def test_wrong_video_scores_are_named(tmp_path, content):
    with pytest.raises(StaleError, match="video scores"):
        read_scores(tmp_path, content)
