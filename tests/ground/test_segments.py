"""Times of snippets, and clipping; tIoU is tested with the evaluation."""

import pytest

from stale.segments import clip_segment, seconds_to_snippets, snippets_to_seconds


def test_a_snippet_is_its_share_of_the_duration() -> None:
    assert seconds_to_snippets(30.0, 120.0, 100) == 25.0
    assert snippets_to_seconds(25.0, 120.0, 100) == 30.0
    assert seconds_to_snippets(120.0, 120.0, 100) == 100.0  # the end of the video is the end of the last snippet


@pytest.mark.parametrize(
    ("segment", "inside"), [((2, 5), (2, 5)), ((-1, 15), (0, 10)), ((12, 15), None), ((0, 0), None)]
)
def test_clipping_keeps_what_lies_inside(segment: tuple, inside: tuple | None) -> None:
    assert clip_segment(*segment, duration=10.0) == inside
