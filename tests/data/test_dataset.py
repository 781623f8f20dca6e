"""Features and segment lists of a data set, rescaled or at the videos' own rate."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.config import DataConfig
from stale.data.dataset import (
    IGNORED,
    PADDING,
    NativeDataset,
    VideoDataset,
    load_features,
    load_sampled,
    read_ahead,
    rescale,
    segment_lists,
)
from stale.data.features import FeatureStore, open_features
from stale.errors import StaleError
from tests.helpers import video, write_folder

WIDTH = 3


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_rescaling_is_linear_interpolation_between_snippet_centers(length: int, num_snippets: int) -> None:
    features = torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length))
    places = (np.arange(num_snippets) + 0.5) * length / num_snippets - 0.5
    expected = np.stack([np.interp(places, np.arange(length), column) for column in features.numpy().T], 1)
    np.testing.assert_allclose(rescale(features, num_snippets), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(rescale(features, length), features)


@pytest.mark.parametrize("dtypes", [("f2", "f2"), ("f4", "f4"), ("f2", "f4")])
def test_features_keep_their_precision_and_order(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    rng, scale = np.random.default_rng(0), {"f2": 1.0, "f4": 1e6}  # which is infinite in half precision
    shapes = {"a": (4, WIDTH), "b": (9, WIDTH)}
    arrays = {
        name: (rng.standard_normal(shapes[name]) * scale[dtype]).astype(dtype)
        for name, dtype in zip(shapes, dtypes, strict=True)
    }
    store = open_features(write_folder(tmp_path / "features", arrays))
    block = load_features(["b", "a", "b"], store, 6)
    assert block.shape == (3, 6, WIDTH)
    assert block.dtype == (torch.float32 if "f4" in dtypes else torch.float16)
    for row, name in enumerate("bab"):
        assert torch.equal(block[row], rescale(torch.from_numpy(arrays[name]), 6).to(block.dtype))
    assert load_features([], store, 6).shape == (0, 6, WIDTH)


def test_one_item_is_loaded_ahead_and_an_error_is_raised_at_its_item() -> None:
    loaded: list[int] = []

    def load(item: int) -> int:
        loaded.append(item)
        if item == 3:
            raise StaleError("broken")
        return 10 * item

    used, before = [], threading.active_count()
    with pytest.raises(StaleError, match="broken"):
        for item, value in read_ahead(load, [1, 2, 3, 4]):
            assert value == 10 * item
            assert len(loaded) <= item + 1
            used.append(item)
    assert used == [1, 2]
    assert threading.active_count() == before
    assert list(read_ahead(load, [])) == []


def test_a_generator_is_advanced_in_the_thread_and_closed_when_the_consumer_stops() -> None:
    threads, closed = set(), threading.Event()

    def items() -> Iterator[int]:
        threads.add(threading.current_thread())
        try:
            yield from range(5)
        finally:
            closed.set()

    ahead = read_ahead(lambda item: item, items(), depth=2)
    assert [next(ahead) for _ in range(2)] == [(0, 0), (1, 1)]
    ahead.close()
    assert closed.is_set()
    assert threading.main_thread() not in threads


def test_segment_lists_are_padded_and_in_snippets() -> None:
    videos = [
        video("a", (1, 2, "x"), (4, 10, "elsewhere"), (0, 5, "y"), duration=10.0),
        video("b", (3, 30, "y"), duration=60.0),
        video("c", duration=5.0),
    ]
    segments, labels = segment_lists(videos, ["x", "y"], 20)
    assert segments.tolist() == [
        [[2, 4], [8, 20], [0, 10]],
        [[1, 10], [0, 0], [0, 0]],
        [[0, 0], [0, 0], [0, 0]],
    ]
    assert labels.tolist() == [[0, IGNORED, 1], [1, PADDING, PADDING], [PADDING, PADDING, PADDING]]


def test_a_batch_holds_the_asked_videos_in_single_precision(tmp_path: Path) -> None:
    arrays = {name: np.full((4, WIDTH), number + 5, np.float16) for number, name in enumerate("abc")}
    videos = [video(name, (number, number + 1, "x")) for number, name in enumerate("abc")]
    store = open_features(write_folder(tmp_path / "features", arrays))
    data = VideoDataset(videos, store, ["x"], DataConfig(num_snippets=10)).to(torch.device("cpu"))
    assert len(data) == 3
    batch = data.batch(torch.tensor([2, 0]))
    assert batch.features.dtype == torch.float32
    assert batch.features[:, 0, 0].tolist() == [7, 5]
    assert batch.segments[:, 0].tolist() == [[2, 3], [0, 1]]
    assert batch.labels.tolist() == [[0], [0]]


def ramp(length: int) -> np.ndarray:
    """Features whose value is the snippet's number."""
    return np.repeat(np.arange(length, dtype=np.float16)[:, None], WIDTH, 1)


def store_of(folder: Path, **lengths: int) -> FeatureStore:
    return open_features(write_folder(folder, {name: ramp(length) for name, length in lengths.items()}))


def test_videos_keep_their_rate_or_take_a_common_one(tmp_path: Path) -> None:
    store, videos = store_of(tmp_path / "f", a=30, b=7), [video("a"), video("b", duration=20.0)]
    own = load_sampled(videos, store, DataConfig(), None)
    assert [item.tolist() for item in own] == [ramp(30).tolist(), ramp(7).tolist()]
    assert own[0].dtype is torch.float16
    assert [len(item) for item in load_sampled(videos, store, DataConfig(rate=1.5), None)] == [15, 30]
    beside = open_features([str(tmp_path / "f"), str(write_folder(tmp_path / "g", {"a": ramp(90), "b": ramp(7)}))])
    shapes = [item.shape for item in load_sampled(videos, beside, DataConfig(), None)]
    assert shapes == [(90, 2 * WIDTH), (7, 2 * WIDTH)]


def test_crops_keep_features_and_segments_together(tmp_path: Path) -> None:
    """The value of a feature is its position, and segments are found again at the values they began at."""
    instances = [(start, start + 4.0, "x") for start in range(0, 300, 20)]
    videos = [video("a", *instances, (100.0, 104.0, "unseen"), duration=300.0), video("b", (1.0, 3.0, "x"))]
    data = NativeDataset(
        videos, store_of(tmp_path / "f", a=300, b=10), ["x"], DataConfig(sampling="native", max_snippets=64)
    )
    starts = set()
    for epoch in range(20):
        data.batches(2, torch.Generator().manual_seed(epoch))
        batch = data.batch(torch.tensor([0, 1]))
        assert batch.features.shape == (2, 64, WIDTH)
        assert batch.valid.sum(1).tolist() == [64, 10]
        assert (batch.features[~batch.valid] == 0).all()
        first = int(batch.features[0, 0, 0])
        assert batch.features[0, :, 0].tolist() == list(range(first, first + 64))
        starts.add(first)
        for (start, end), label in zip(batch.segments[0].tolist(), batch.labels[0].tolist(), strict=True):
            assert 0 <= start <= end <= 64
            if label == 0:
                assert end - start >= 2
                assert (start + first) % 20 == 0 or start == 0
        inside = [min(first + 64, s + 4) - max(first, s) for s, _, _ in instances]
        partly = sum(0 < seconds < 2 for seconds in inside) + (first < 104 and first + 64 > 100)  # or unseen
        counts = [int((batch.labels[0] == label).sum()) for label in (0, IGNORED)]
        assert counts == [sum(seconds >= 2 for seconds in inside), partly]  # what is outside is not there
        assert batch.labels[1].tolist() == [0] + [PADDING] * (len(instances))
    assert len(starts) > 10


def test_batches_hold_every_video_once_and_similar_lengths(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 64)
    names = {f"v{number}": int(length) for number, length in enumerate(lengths)}
    videos = [video(name, (1.0, 2.0, "x")) for name in names]
    data = NativeDataset(videos, store_of(tmp_path / "f", **names), ["x"], DataConfig(sampling="native"))
    batches = data.batches(8, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(list(batches)).tolist()) == list(range(64))
    spreads = [float(np.ptp(lengths[batch.numpy()])) for batch in batches]
    assert np.mean(spreads) < 0.3 * np.ptp(lengths)
    again, other = (data.batches(8, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(batches, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(batches, other, strict=True))
