"""Segment geometry against the plainest possible formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stale.segments import clip_segment, pairwise_tiou, seconds_to_snippets, snippets_to_seconds

TIMES = st.floats(0, 100, allow_nan=False)
SEGMENTS = st.lists(st.tuples(TIMES, TIMES).map(sorted), max_size=6)


def plain_tiou(first: list[float], second: list[float]) -> float:
    intersection = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = (first[1] - first[0]) + (second[1] - second[0]) - intersection
    return intersection / union if union > 0 else 0.0


@given(SEGMENTS, SEGMENTS)
def test_pairwise_tiou_equals_the_formula_pair_by_pair(first: list, second: list) -> None:
    result = pairwise_tiou(np.array(first).reshape(-1, 2), np.array(second).reshape(-1, 2))
    assert result.shape == (len(first), len(second))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            assert result[i, j] == pytest.approx(plain_tiou(a, b), abs=1e-12)


def test_tiou_of_known_pairs() -> None:
    segments = np.array([[0.0, 10.0], [5.0, 15.0], [10.0, 20.0], [3.0, 3.0]])
    expected = [[1, 1 / 3, 0, 0], [1 / 3, 1, 1 / 3, 0], [0, 1 / 3, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(pairwise_tiou(segments, segments), expected)


def test_a_snippet_is_its_share_of_the_duration() -> None:
    assert seconds_to_snippets(30.0, 120.0, 100) == 25.0
    assert snippets_to_seconds(25.0, 120.0, 100) == 30.0
    assert seconds_to_snippets(120.0, 120.0, 100) == 100.0  # the end of the video is the end of the last snippet


@given(TIMES, st.floats(0.5, 1000), st.integers(1, 500))
def test_seconds_survive_the_way_there_and_back(seconds: float, duration: float, num_snippets: int) -> None:
    snippets = seconds_to_snippets(seconds, duration, num_snippets)
    assert snippets_to_seconds(snippets, duration, num_snippets) == pytest.approx(seconds)


def test_arrays_and_tensors_change_units_alike() -> None:
    seconds, durations = np.array([[1.0, 2.0], [30.0, 60.0]]), np.array([[10.0], [120.0]])
    expected = [[10.0, 20.0], [25.0, 50.0]]
    assert seconds_to_snippets(seconds, durations, 100).tolist() == expected
    assert seconds_to_snippets(torch.tensor(seconds), torch.tensor(durations), 100).tolist() == expected


@pytest.mark.parametrize(
    ("segment", "inside"),
    [
        ((2, 5), (2, 5)),
        ((-3, 5), (0, 5)),
        ((2, 15), (2, 10)),
        ((-1, 15), (0, 10)),
        ((12, 15), None),
        ((-5, -1), None),
        ((10, 12), None),
        ((4, 4), None),
        ((0, 0), None),
    ],
)
def test_clipping_keeps_what_lies_inside(segment: tuple, inside: tuple | None) -> None:
    assert clip_segment(*segment, duration=10.0) == inside
