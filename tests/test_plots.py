"""The timeline of one video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from stale.build import load_annotations
from stale.data.annotations import Instance, Video
from stale.detection.explain import explain
from stale.errors import StaleError
from stale.plots import choose_classes, draw_timeline, pack, save_figure
from stale.training.trainer import train
from tests.tiny import SNIPPETS, UNSEEN, make_data_set, tiny_config

VIDEO = Video("v", "test", 50.0, (Instance(5, 15, "class 0"), Instance(30, 42, "a stranger")))


def detection(start: float, end: float, label: str = "class 0", score: float = 0.5) -> dict:
    """One detection."""
    return {"segment": [start, end], "label": label, "score": score}


def timeline(num_classes: int, foreground: bool = True, **options: object) -> Figure:
    """The picture of VIDEO with random scores."""
    rng = np.random.default_rng(0)
    classes = [f"class {k}" for k in range(num_classes)]
    found = [detection(s, s + 9, str(rng.choice(classes)), rng.random()) for s in rng.uniform(0, 40, 30)]
    mask = rng.random(40) if foreground else None
    return draw_timeline(VIDEO, classes, found, rng.random((num_classes, 40)), mask, **options)


def tick_labels(figure: Figure, axis: int) -> list[str]:
    """The rows' names."""
    return [tick.get_text() for tick in figure.axes[axis].get_yticklabels()]


@pytest.mark.parametrize(("num_classes", "rows"), [(1, 1), (5, 5), (10, 10), (40, 10)])
def test_draws_a_row_of_scores_for_each_of_at_most_ten_classes(num_classes: int, rows: int) -> None:
    figure = timeline(num_classes, threshold=0.5)
    assert len(tick_labels(figure, 2)) == rows
    assert figure.axes[2].get_xlabel() == "time (seconds)"
    assert figure.axes[0].get_xlim() == (0, VIDEO.duration)


def test_nothing_stays_behind_in_matplotlib() -> None:
    timeline(3)
    assert not Gcf.figs


def test_the_legend_names_what_is_drawn_and_nothing_else() -> None:
    def keys(figure: Figure) -> list[str]:
        return [text.get_text() for text in figure.legends[0].get_texts()]

    full, plain = keys(timeline(3, threshold=0.5)), keys(timeline(3, foreground=False))
    assert {"ground truth", "foreground mask L", "its threshold", "… of a class not asked for"} <= set(full)
    assert "foreground mask L" not in plain
    assert "its threshold" not in plain


def test_the_title_is_the_video_unless_another_is_given() -> None:
    assert timeline(1).get_suptitle() == "v"
    assert timeline(1, title="other").get_suptitle() == "other"


def test_ground_truth_of_other_classes_has_a_row_but_no_scores() -> None:
    figure = timeline(3)
    assert "a stranger" in tick_labels(figure, 0)
    assert "a stranger" not in tick_labels(figure, 2)


def test_a_video_without_instances_or_detections_can_be_drawn() -> None:
    empty = Video("e", "test", 10.0, ())
    figure = draw_timeline(empty, ["a"], [], np.zeros((1, 8)))
    assert tick_labels(figure, 1) == ["a"]


def test_only_the_best_detections_are_drawn() -> None:
    found = [detection(0, 10, score=0.9), detection(20, 30, score=0.8), detection(40, 50, score=0.1)]
    figure = draw_timeline(VIDEO, ["class 0"], found, np.zeros((1, 8)), top=2)
    assert {text.get_text() for text in figure.axes[0].texts} == {"0.90", "0.80"}


def test_classes_that_occur_come_first_then_detected_ones_then_by_score() -> None:
    classes = [f"class {k}" for k in range(4)]
    scores = np.array([[0.0], [0.3], [0.9], [0.5]])
    order = choose_classes(VIDEO, classes, [detection(0, 1, "class 3")], scores)
    assert order == ["class 0", "class 3", "class 2", "class 1"]


def test_of_many_classes_those_without_a_say_are_left_out() -> None:
    classes = [f"class {k}" for k in range(11)]
    scores = np.zeros((11, 3))
    scores[7, 1] = 0.6
    assert choose_classes(VIDEO, classes, [], scores) == ["class 0", "class 7"]


def test_overlapping_detections_get_rows_of_their_own() -> None:
    rows = pack([detection(0, 10), detection(5, 15), detection(10, 20), detection(6, 7)], most_rows=2)
    assert [[item["segment"] for item in row] for row in rows] == [[[0, 10], [10, 20]], [[5, 15]]]


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_saves_by_the_ending_and_leaves_nothing_else(tmp_path: Path, ending: str) -> None:
    save_figure(timeline(2), tmp_path / "deep" / f"picture.{ending}")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [f"picture.{ending}"]


def test_explains_any_annotated_video_with_a_trained_run(tmp_path: Path) -> None:
    config = tiny_config(make_data_set(tmp_path / "data"), "train.epochs=1")
    run = train(config, tmp_path / "run")
    videos, split = load_annotations(config.data)
    seen = explain(run, next(iter(videos)))  # a training video
    assert seen.classes == list(split.unseen) == sorted(UNSEEN)
    assert seen.class_scores.shape == (len(UNSEEN), SNIPPETS)
    assert seen.foreground is not None
    assert seen.foreground.shape == (SNIPPETS,)
    assert all(item["label"] in UNSEEN for item in seen.detections)
    with pytest.raises(StaleError, match="did you mean 'video_0"):
        explain(run, "video_00")
