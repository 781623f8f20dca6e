"""Videos at their own rate: loading, batches of similar length, random crops, and detection in seconds."""

from pathlib import Path

import numpy as np
import torch

from stale.config import DataConfig
from stale.data.dataset import IGNORED, PADDING, NativeDataset, load_native_features
from stale.data.features import FeatureStore, open_features
from tests.helpers import video, write_folder

WIDTH = 4


def ramp(length: int) -> np.ndarray:
    """Features whose value is the snippet's number."""
    return np.repeat(np.arange(length, dtype=np.float16)[:, None], WIDTH, 1)


def store_of(folder: Path, **lengths: int) -> FeatureStore:
    return open_features(write_folder(folder, {name: ramp(length) for name, length in lengths.items()}))


def test_videos_keep_their_rate_or_take_a_common_one(tmp_path: Path) -> None:
    store, videos = store_of(tmp_path / "f", a=30, b=7), [video("a"), video("b", duration=20.0)]
    own = load_native_features(videos, store)
    assert [item.tolist() for item in own] == [ramp(30).tolist(), ramp(7).tolist()]
    assert own[0].dtype is torch.float16
    assert [len(item) for item in load_native_features(videos, store, rate=1.5)] == [15, 30]
    beside = open_features([str(tmp_path / "f"), str(write_folder(tmp_path / "g", {"a": ramp(90), "b": ramp(7)}))])
    assert [item.shape for item in load_native_features(videos, beside)] == [(90, 2 * WIDTH), (7, 2 * WIDTH)]


def test_crops_keep_features_and_segments_together(tmp_path: Path) -> None:
    """The value of a feature is its position, and segments are found again at the values they began at."""
    instances = [(start, start + 4.0, "x") for start in range(0, 300, 20)]
    videos = [video("a", *instances, (100.0, 104.0, "unseen"), duration=300.0), video("b", (1.0, 3.0, "x"))]
    data = NativeDataset(videos, store_of(tmp_path / "f", a=300, b=10), ["x"], DataConfig(max_snippets=64))
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
        kept = (batch.labels[0] == 0).sum()
        expected = sum(min(first + 64, s + 4) - max(first, s) >= 2 for s, _, _ in instances)
        assert kept == expected
        assert batch.labels[1].tolist() == [0] + [PADDING] * (len(instances))
        assert (batch.labels[0] == IGNORED).sum() == len(instances) + 1 - expected
    assert len(starts) > 10


def test_batches_hold_every_video_once_and_similar_lengths(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 64)
    names = {f"v{number}": int(length) for number, length in enumerate(lengths)}
    videos = [video(name, (1.0, 2.0, "x")) for name in names]
    data = NativeDataset(videos, store_of(tmp_path / "f", **names), ["x"], DataConfig())
    batches = data.batches(8, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(list(batches)).tolist()) == list(range(64))
    spreads = [float(np.ptp(lengths[batch.numpy()])) for batch in batches]
    assert np.mean(spreads) < 0.3 * np.ptp(lengths)
    again, other = (data.batches(8, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(batches, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(batches, other, strict=True))
