"""Decoding against loops over snippets, thresholds and places."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scripts.benchmarks.decode import plain_decode
from stale.config import DetectionConfig
from stale.data.annotations import Video
from stale.detection.decode import Candidates, best_regions, decode_masks
from stale.detection.detector import candidates_of, to_results
from stale.model.stale import Outputs

Found = dict[tuple[int, float, float], float]  # (label, start, end) → score


def as_found(candidates: Candidates, video: int) -> Found:
    """The candidates of one video; the same segment of a class twice is an error."""
    rows = zip(*(getattr(candidates, name)[video].tolist() for name in ("labels", "segments", "scores")), strict=True)
    found = [((label, *segment), score) for label, segment, score in rows if score > 0]
    assert len(dict(found)) == len(found)
    return dict(found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    K=st.integers(1, 4),
    T=st.integers(2, 14),
    top=st.integers(1, 70),
    thresholds=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.55, 0.8, 0.99]), min_size=1, max_size=5, unique=True),
    min_length=st.sampled_from([0.0, 0.2, 0.5]),
    levels=st.sampled_from([2, 5, 1000]),
    region_score=st.sampled_from(["max", "mean", "contrast"]),
    fill_holes=st.booleans(),
)
def test_decoding_equals_loops(
    seed: int,
    K: int,
    T: int,
    top: int,
    thresholds: list[float],
    min_length: float,
    levels: int,
    region_score: str,
    fill_holes: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = 3
    scores = torch.rand(B, K + 1, T, generator=generator).softmax(1)[:, :-1]
    masks = (torch.rand(B, T, T, generator=generator) * levels).floor() / levels  # few levels: long regions and ties
    switches = (min_length, region_score, fill_holes)
    candidates = decode_masks(scores, masks, top, thresholds, 10_000, *switches)
    rounding = 1e-6 if region_score == "contrast" else 0.0  # of a difference, which can be 0
    for b in range(B):
        table = plain_decode(scores[b].numpy(), masks[b].numpy(), top, thresholds, None, *switches)
        expected = {(row.label, row.start, row.end): row.score for row in table.itertuples() if row.score > rounding}
        found = {key: score for key, score in as_found(candidates, b).items() if score > rounding}
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5, abs=rounding or None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.integers(1, 12))
def test_the_best_candidates_are_kept_in_order(seed: int, limit: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, masks = torch.rand(2, 3, 8, generator=generator), torch.rand(2, 8, 8, generator=generator)
    everything = decode_masks(scores, masks, 24, [0.2, 0.6], 10_000)
    few = decode_masks(scores, masks, 24, [0.2, 0.6], limit)
    assert few.scores.shape == (2, limit)
    torch.testing.assert_close(few.scores, everything.scores[:, :limit])
    assert (few.scores.diff(dim=1) <= 0).all()
    for b in range(2):
        assert as_found(few, b).items() <= as_found(everything, b).items()


def test_separate_regions_stay_separate() -> None:
    """No hole is filled: two instances of an action are two candidates."""
    curve = torch.tensor([0.0, 0.9, 0.8, 0.0, 0.0, 0.7, 0.7, 0.0])
    candidates = decode_masks(
        torch.full((1, 1, 8), 0.5), curve.view(1, 8, 1).expand(1, 8, 8), top_snippets=1, thresholds=[0.3, 0.5],
        max_candidates=10,
    )  # fmt: skip
    assert as_found(candidates, 0) == pytest.approx({(0, 1.0, 3.0): 0.45, (0, 5.0, 7.0): 0.35})


def test_regions_at_the_ends_of_the_video() -> None:
    candidates = best_regions(
        torch.tensor([[[0.9, 0.9, 0.1, 0.6]]]), torch.ones(1, 1), torch.tensor([[2]]), [0.5], 10, 0.0
    )
    assert as_found(candidates, 0) == pytest.approx({(2, 0.0, 2.0): 0.9, (2, 3.0, 4.0): 0.6})


def test_only_the_top_snippets_are_read() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.2]]])
    masks = torch.eye(3)[None] * 0.8  # snippet t's mask is place t
    assert as_found(decode_masks(scores, masks, 1, [0.5], 10), 0) == pytest.approx({(0, 1.0, 2.0): 0.72})
    assert len(as_found(decode_masks(scores, masks, 2, [0.5], 10), 0)) == 2


def test_a_column_is_the_snippets_mask_not_a_row() -> None:
    masks = torch.zeros(1, 4, 4)
    masks[0, 1:3, 0] = 0.9  # snippet 0 says: places 1 and 2
    scores = torch.tensor([[[0.5, 0.0, 0.0, 0.0]]])
    assert as_found(decode_masks(scores, masks, 4, [0.5], 10), 0) == pytest.approx({(0, 1.0, 3.0): 0.45})


def test_nothing_above_the_thresholds_leaves_an_empty_video() -> None:
    candidates = decode_masks(torch.rand(2, 3, 8), torch.full((2, 8, 8), 0.4), 5, [0.5], 10)
    assert (candidates.scores == 0).all()
    assert candidates.segments.shape == (2, 1, 2)


def test_a_video_without_candidates_beside_one_with() -> None:
    masks = torch.zeros(2, 4, 4)
    masks[1] = 0.9
    candidates = decode_masks(torch.full((2, 1, 4), 0.5), masks, 4, [0.5], 10)
    assert as_found(candidates, 0) == {}
    assert as_found(candidates, 1) == pytest.approx({(0, 0.0, 4.0): 0.45})


def outputs_of(class_logits: Tensor, mask_logits: Tensor, foreground_logits: Tensor | None = None) -> Outputs:
    return Outputs(torch.zeros(1), class_logits, mask_logits, foreground_logits)


def test_the_background_competes_but_is_never_a_candidate() -> None:
    logits = torch.zeros(1, 3, 4)  # two classes and the background
    logits[0, 2] = 9.0
    logits[0, 1, 2], logits[0, 2, 2] = 9.0, 0.0
    found = as_found(candidates_of(outputs_of(logits, torch.full((1, 4, 4), 5.0)), DetectionConfig()), 0)
    assert {label for label, _, _ in found} == {0, 1}
    probability = math.exp(9) / (math.exp(9) + 2)
    assert found[1, 0.0, 4.0] == pytest.approx(probability / (1 + math.exp(-5)), rel=1e-4)
    assert found[0, 0.0, 4.0] < 1e-3


@pytest.mark.parametrize("weighted", [True, False])
def test_foreground_weighs_class_scores_where_wanted(weighted: bool) -> None:
    """Without it a masked-out snippet, the same for every class, can outdo one that shows an action."""
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = 0.5
    foreground = torch.tensor([[-9.0, 2.0, 2.0, -9.0]])
    diagonal = torch.where(torch.eye(4) > 0, 20.0, -20.0)[None]  # snippet t's mask is place t
    options = DetectionConfig(foreground_weight=weighted)
    found = as_found(candidates_of(outputs_of(logits, diagonal, foreground), options), 0)
    for t, share in enumerate(foreground[0].sigmoid().tolist()):
        probability = float(logits[0, :, t].softmax(0)[0])
        assert found[0, t, t + 1] == pytest.approx(probability * (share if weighted else 1.0), rel=1e-4)


def test_results_are_in_seconds_sorted_and_complete() -> None:
    videos = [Video("long", "test", 80.0, ()), Video("empty", "test", 10.0, ())]
    candidates = Candidates(
        torch.tensor([[[2.0, 4.0], [0.0, 8.0], [0.0, 0.0]], [[0.0, 0.0]] * 3]),
        torch.tensor([[0.9, 0.5, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1, 0, 0], [0, 0, 0]]),
    )
    results = to_results(videos, candidates, ["a", "b"], 8, DetectionConfig())
    assert results["empty"] == []
    assert [(row["segment"], row["label"]) for row in results["long"]] == [([20.0, 40.0], "b"), ([0.0, 80.0], "a")]
    assert [row["score"] for row in results["long"]] == pytest.approx([0.9, 0.5])
    assert all(type(row["score"]) is float for row in results["long"])


def test_no_more_detections_than_asked_for() -> None:
    video = Video("v", "test", 8.0, ())
    spans = torch.tensor([[[float(i), i + 1.0] for i in range(8)]])
    candidates = Candidates(spans, torch.linspace(0.9, 0.2, 8)[None], torch.zeros(1, 8, dtype=torch.long))
    results = to_results([video], candidates, ["a"], 8, DetectionConfig(max_detections=3))
    assert [row["segment"] for row in results["v"]] == [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
