"""Training targets against loops over snippets and instances, and each rule by an example."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stale.data.dataset import IGNORED, PADDING, inside_segments
from stale.training.targets import Targets, assign_owners, build_targets, count_unowned
from tests.reference.targets import Row, plain_targets

K = 3  # classes


def targets_of(*videos: list[Row], num_snippets: int = 8) -> Targets:
    """Targets of videos given as lists of (start, end, label)."""
    longest = max(1, *map(len, videos))
    padded = [[*rows, *[(0.0, 0.0, PADDING)] * (longest - len(rows))] for rows in videos]
    table = torch.tensor(padded, dtype=torch.float64)
    return build_targets(table[..., :2].float(), table[..., 2].long(), K, num_snippets)


def assert_same(fast: Targets, video: int, slow: Targets) -> None:
    torch.testing.assert_close(fast.classes[video], slow.classes)
    for name in ("masks", "foreground", "valid", "unambiguous"):
        result, expected = getattr(fast, name)[video], getattr(slow, name)
        assert result.dtype == torch.bool
        assert torch.equal(result, expected), name


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[list[Row]]]:
    """Some videos; times on quarters of a snippet, so that ends meet centers and instances tie in length."""
    num_snippets = draw(st.integers(1, 12))
    time = st.integers(0, 4 * num_snippets).map(lambda quarters: quarters / 4)
    row = st.tuples(st.tuples(time, time).map(sorted), st.sampled_from([IGNORED, *range(K)]))
    rows = st.lists(row.map(lambda pair: (*pair[0], pair[1])), max_size=6)
    return num_snippets, draw(st.lists(rows, min_size=1, max_size=3))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_targets_equal_the_loops(case: tuple[int, list[list[Row]]]) -> None:
    num_snippets, videos = case
    fast = targets_of(*videos, num_snippets=num_snippets)
    for video, rows in enumerate(videos):
        assert_same(fast, video, plain_targets(rows, K, num_snippets))


@given(cases())
@settings(max_examples=50, deadline=None)
def test_no_instance_loses_its_last_snippet_to_another(case: tuple[int, list[list[Row]]]) -> None:
    num_snippets, videos = case
    for rows in filter(None, videos):
        segments = torch.tensor([[row[:2] for row in rows]]).view(1, -1, 2)
        known = inside_segments(segments, num_snippets) & torch.tensor([row[2] >= 0 for row in rows]).view(1, -1, 1)
        if known.any():
            lengths = (segments[..., 1] - segments[..., 0]).unsqueeze(2).masked_fill(~known, torch.inf)
            covered = known.any(1)
            shortest, owner = lengths.argmin(1)[covered].tolist(), assign_owners(segments, known)[covered].tolist()
            assert {*shortest} <= {*owner}


def bits(mask: Tensor) -> str:
    return "".join("#" if value else "." for value in mask.tolist())


def test_a_class_inside_another_shares_its_snippets() -> None:
    """THUMOS14's CliffDiving inside Diving: both classes, and the mask of the shorter instance."""
    targets = targets_of([(1.0, 7.0, 0), (3.0, 5.0, 2)])
    assert targets.classes[0, :, 2].tolist() == [1, 0, 0, 0]
    assert targets.classes[0, :, 3].tolist() == [0.5, 0, 0.5, 0]
    assert bits(targets.masks[0, :, 2]) == ".######."
    assert bits(targets.masks[0, :, 4]) == "...##..."
    twice = targets_of([(1.0, 7.0, 0), (3.0, 5.0, 0), (2.0, 6.0, 1)])
    assert twice.classes[0, :, 4].tolist() == [0.5, 0.5, 0, 0], "the same class twice counts once"


def test_an_instance_covered_by_shorter_ones_keeps_the_snippet_nearest_to_its_middle() -> None:
    rows: list[Row] = [(0.0, 7.0, 0), (0.0, 3.0, 1), (3.0, 4.0, 2), (4.0, 7.0, 1)]
    targets = targets_of(rows)
    columns = [bits(targets.masks[0, :, t]) for t in range(8)]
    # Snippet 3, at the middle, is the only one of another instance; snippet 2 is the first of the next ones.
    assert columns == ["###.....", "###.....", "#######.", "...#....", *["....###."] * 3, "........"]
    twins = targets_of([(2.0, 4.0, 0), (2.0, 5.0, 1), (2.2, 5.0, 2)])
    assert {bits(targets.masks[0, :, t]) for targets in (twins,) for t in (2, 3, 4)} == {"..##....", "..###..."}
    short = torch.tensor([[[2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [2.0, 4.0]]])
    assert count_unowned(short, torch.tensor([[0, 1, 2, 1]]), 8) == 2, "three instances in one snippet"
    assert count_unowned(short, torch.tensor([[0, IGNORED, PADDING, 1]]), 8) == 0


@pytest.mark.parametrize(
    ("start", "end", "covered"),
    [
        (3.6, 3.9, "...#...."),
        (2.0, 2.0, "..#....."),
        (8.0, 8.0, ".......#"),
        (2.5, 3.5, "..#....."),  # one center inside, the next one at the (open) end
        (2.4, 3.6, "..##...."),
    ],
)
def test_short_instances_keep_a_snippet(start: float, end: float, covered: str) -> None:
    targets = targets_of([(start, end, 1)])
    assert bits(targets.foreground[0]) == covered
    assert bits(targets.masks[0, :, covered.index("#")]) == covered
