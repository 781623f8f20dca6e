"""Segment geometry against the plainest possible formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stale.segments import clip_segment, paired_tiou, seconds_to_snippets, snippets_to_seconds
from tests.reference.detection import plain_tiou

TIMES = st.floats(0, 100, allow_nan=False)
SEGMENT = st.tuples(TIMES, TIMES).map(sorted)
PAIRS = st.lists(st.tuples(SEGMENT, SEGMENT), max_size=6)


@given(PAIRS)
def test_paired_tiou_equals_the_formula_row_by_row(pairs: list) -> None:
    first, second = np.array(pairs).reshape(-1, 2, 2).swapaxes(0, 1)
    expected = [plain_tiou(*pair) for pair in pairs]
    assert paired_tiou(first, second) == pytest.approx(np.array(expected), abs=1e-12)


def test_a_snippet_is_its_share_of_the_duration() -> None:
    assert seconds_to_snippets(30.0, 120.0, 100) == 25.0
    assert snippets_to_seconds(25.0, 120.0, 100) == 30.0
    assert seconds_to_snippets(120.0, 120.0, 100) == 100.0  # the end of the video is the end of the last snippet


@given(TIMES, st.floats(0.5, 1000), st.integers(1, 500))
def test_seconds_survive_the_way_there_and_back(seconds: float, duration: float, num_snippets: int) -> None:
    snippets = seconds_to_snippets(seconds, duration, num_snippets)
    assert snippets_to_seconds(snippets, duration, num_snippets) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("segment", "inside"), [((2, 5), (2, 5)), ((-1, 15), (0, 10)), ((12, 15), None), ((0, 0), None)]
)
def test_clipping_keeps_what_lies_inside(segment: tuple, inside: tuple | None) -> None:
    assert clip_segment(*segment, duration=10.0) == inside
