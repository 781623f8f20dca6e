"""The timeline of one video."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from stale.data.annotations import Instance, Video
from stale.plots import choose_classes, draw_timeline, match, save_figure

VIDEO = Video("v", "test", 50.0, (Instance(5, 15, "class 0"), Instance(30, 42, "unknown")))


def detection(start: float, end: float, label: str = "class 0", score: float = 0.5) -> dict:
    return {"segment": [start, end], "label": label, "score": score}


def tick_labels(figure: Figure, axis: int) -> list[str]:
    """The names of the rows."""
    return [tick.get_text() for tick in figure.axes[axis].get_yticklabels()]


@pytest.mark.parametrize(("num_classes", "rows"), [(1, 1), (10, 10), (40, 10)])
def test_draws_a_row_of_scores_for_each_of_at_most_ten_classes(num_classes: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    classes = [f"class {k}" for k in range(num_classes)]
    found = [detection(s, s + 9, str(rng.choice(classes)), rng.random()) for s in rng.uniform(0, 40, 30)]
    figure = draw_timeline(VIDEO, classes, found, rng.random((num_classes, 40)), rng.random(40), threshold=0.5)
    assert len(tick_labels(figure, 2)) == rows
    assert figure.axes[2].get_xlabel() == "time (seconds)"
    assert figure.axes[0].get_xlim() == (0, VIDEO.duration)
    assert not Gcf.figs, "a figure stays behind in matplotlib's global state"


def test_ground_truth_and_detections_have_rows_of_their_own() -> None:
    found = [detection(0, 9), detection(0, 9, "class 1")]
    figure = draw_timeline(VIDEO, ["class 0", "class 1"], found, np.ones((2, 8)))
    rows = ["class 0: ground truth", "detections", "class 1: detections", "unknown: ground truth"]
    assert tick_labels(figure, 0) == rows
    assert tick_labels(figure, 1) == ["class 0", "class 1"], "no scores of a class that is not under test"


def test_only_the_best_detections_are_drawn_with_scores_and_marks_where_there_is_room() -> None:
    scored = {(0, 10): 0.9, (49, 50): 0.8, (20, 30): 0.7, (40, 50): 0.1}
    found = [detection(*segment, score=score) for segment, score in scored.items()]
    figure = draw_timeline(VIDEO, ["class 0"], found, np.zeros((1, 8)), top=3)
    assert {text.get_text() for text in figure.axes[0].texts} == {"✗ 0.90", "✗ 0.70"}


def test_classes_that_occur_come_first_then_detected_ones_then_by_score() -> None:
    scores = np.array([[0.0], [0.3], [0.9], [0.5]])
    order = choose_classes(VIDEO, [f"class {k}" for k in range(4)], [detection(0, 1, "class 3")], scores)
    assert order == ["class 0", "class 3", "class 2", "class 1"]
    many = np.zeros((11, 3))
    many[7, 1] = 0.6
    assert choose_classes(VIDEO, [f"class {k}" for k in range(11)], [], many) == ["class 0", "class 7"]


def test_right_detections_are_those_of_the_evaluation_and_wrong_ones_are_lower() -> None:
    found = [detection(5, 15, score=0.5), detection(6, 16, score=0.9), detection(5, 15, "class 1", 0.8)]
    taken = match(VIDEO, found)
    assert taken == {id(found[1]): VIDEO.instances[0]}
    heights = [bar.get_height() for bar in draw_timeline(VIDEO, ["class 0"], found, np.zeros((1, 8))).axes[0].patches]
    truth, right, wrong = heights[0], max(heights[1:]), min(heights)
    assert truth == right > wrong


@pytest.mark.parametrize("length", [5, 60])
def test_the_legend_and_the_names_are_not_cut(length: int) -> None:
    video = Video("v" * length, "", 50.0, (Instance(5, 15, "W" * length), Instance(30, 42, "unknown" * length)))
    figure = draw_timeline(video, ["W" * length], [detection(0, 9)], np.ones((1, 8)), np.ones(8), threshold=0.5)
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.get_yticklabels()]
    boxes = [one.get_window_extent() for one in (figure.legends[0], *texts)]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.filterwarnings("error")
def test_any_name_is_drawn_and_characters_without_a_font_are_one_line(tmp_path: Path, log) -> None:
    names = ["\U000e0041跳高", "ऊंची कूद", "🏊", "\udcff", "é"]
    figure = draw_timeline(VIDEO, names, [detection(1, 9, names[3])], np.zeros((5, 8)))
    save_figure(figure, tmp_path / "a.png")
    assert log.text.count("no font") == len(log.records) <= 1
    assert tick_labels(figure, 1)[:2] == ["\\udcff", "\\U000e0041跳高"]


def test_ground_truth_past_the_end_is_marked_and_opacity_is_absolute() -> None:
    past = Video("v", "test", 50.0, tuple(Instance(start, start + 5, "a") for start in (10, 50, 70)))
    figure = draw_timeline(past, ["a"], [detection(1, 9, "a", 0.001)], np.zeros((1, 8)))
    assert "→ 2 past the end" in "".join(text.get_text() for text in figure.axes[0].texts)
    assert figure.axes[0].patches[-1].get_facecolor()[3] == pytest.approx(0.1, abs=0.01)
