"""Data sets: rescaled features, segment lists, the held-out part, and that no unseen label reaches training."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.build import TrainingData, load_training_data
from stale.config import load_config
from stale.data.annotations import Instance, Video, all_labels, in_subset, repair
from stale.data.dataset import (
    IGNORED,
    PADDING,
    VideoDataset,
    _length_fault,
    anonymise,
    hold_out,
    is_far,
    load_features,
    rescale,
    segment_lists,
    with_any_of,
    with_features,
)
from stale.data.features import FeatureStore, open_features
from stale.data.splits import load_split
from stale.errors import StaleError
from stale.training.targets import build_targets

WIDTH = 3


def video(name: str, *instances: tuple[float, float, str], duration: float = 10.0) -> Video:
    return Video(name, "training", duration, tuple(Instance(*instance) for instance in instances))


def store_of(folder: Path, **arrays: np.ndarray) -> FeatureStore:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return open_features(folder)


# Rescaling


def slow_rescale(features: list[list[float]], num_snippets: int) -> list[list[float]]:
    """Linear interpolation between snippet centres; before the first and after the last one it is constant."""
    length = len(features)
    result = []
    for t in range(num_snippets):
        place = min(max((t + 0.5) * length / num_snippets - 0.5, 0.0), length - 1.0)
        left = min(int(place), length - 1)
        right, share = min(left + 1, length - 1), place - left
        result.append([(1 - share) * a + share * b for a, b in zip(features[left], features[right], strict=True)])
    return result


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_rescaling_equals_plain_linear_interpolation(length: int, num_snippets: int) -> None:
    features = torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length))
    expected = torch.tensor(slow_rescale(features.tolist(), num_snippets))
    torch.testing.assert_close(rescale(features, num_snippets), expected, atol=1e-5, rtol=1e-5)


def test_rescaling_known_values() -> None:
    ramp = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert rescale(ramp, 4).flatten().tolist() == [0, 1, 2, 3]
    assert rescale(ramp, 2).flatten().tolist() == [0.5, 2.5]  # align_corners would give the ends, 0 and 3
    assert rescale(ramp[:1] + 7, 3).flatten().tolist() == [7, 7, 7]


def test_half_precision_is_rescaled_in_single() -> None:
    features = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0)).half()
    assert rescale(features, 5).dtype == torch.float32
    assert torch.equal(rescale(features, 5), rescale(features.float(), 5))


# Features as one block


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_keep_their_precision_and_order(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((length, WIDTH)).astype(dtype) for name, length in (("a", 4), ("b", 9))}
    block = load_features(["b", "a"], store_of(tmp_path, **arrays), 6)
    assert block.shape == (2, 6, WIDTH)
    assert block.dtype == torch.from_numpy(arrays["a"]).dtype
    for row, name in enumerate("ba"):
        assert torch.equal(block[row], rescale(torch.from_numpy(arrays[name]), 6).to(block.dtype))


def test_the_three_forms_give_the_same_data_set(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float16)
    store_of(tmp_path / "npy", a=arrays[0], b=arrays[1])
    with h5py.File(tmp_path / "single.h5", "w") as file:
        file.update({"a": arrays[0], "v_b": arrays[1]})
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        file.update({"features": arrays, "ids": ["a", "b"]})
    blocks = [load_features("ab", open_features(tmp_path / form), 8) for form in ("npy", "single.h5", "packed.h5")]
    assert torch.equal(blocks[0], blocks[1])
    assert torch.equal(blocks[0], blocks[2])


def test_mixed_precisions_lose_nothing(tmp_path: Path) -> None:
    large = np.full((4, WIDTH), 1e6, np.float32)  # infinite in half precision
    store = store_of(tmp_path, a=np.ones((4, WIDTH), np.float16), b=large)
    block = load_features(["a", "b", "a"], store, 4)
    assert block.dtype == torch.float32
    assert torch.equal(block[:, 0, 0], torch.tensor([1.0, 1e6, 1.0]))


def test_no_videos_give_an_empty_block(tmp_path: Path) -> None:
    assert load_features([], store_of(tmp_path, a=np.ones((4, WIDTH), np.float32)), 6).shape == (0, 6, WIDTH)


# Videos without features


def test_missing_features_stop_the_run_and_are_listed(tmp_path: Path) -> None:
    store = store_of(tmp_path, a=np.ones((4, WIDTH), np.float32))
    videos = [video(name) for name in ("a", *"bcdefgh")]
    with pytest.raises(StaleError) as caught:
        with_features(videos, store, "stop")
    expected = f"7 of 8 videos have no features in {tmp_path}: b, c, d, e, f and 2 more; add them, or go on without"
    assert str(caught.value).startswith(expected)
    assert "data.missing=skip" in str(caught.value)


def test_missing_features_can_be_skipped_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("stale"), "propagate", True)  # the commands' log turns it off
    store = store_of(tmp_path, a=np.ones((4, WIDTH), np.float32), v_c=np.ones((4, WIDTH), np.float32))
    with caplog.at_level(logging.WARNING, "stale"):
        found = with_features([video("a"), video("b"), video("c")], store, "skip")
    assert [item.id for item in found] == ["a", "c"]
    assert "1 of 3 videos skipped, no features: b" in caplog.text


def test_no_features_at_all_is_an_error(tmp_path: Path) -> None:
    store = store_of(tmp_path, a=np.ones((4, WIDTH), np.float32))
    with pytest.raises(StaleError, match="none of the 2 videos has features"):
        with_features([video("b"), video("c")], store, "skip")


# Features of another length than the video


def store_at(path: Path, lengths: dict[str, int], attributes: dict[str, dict[str, Any]], **shared: Any) -> FeatureStore:
    """An HDF5 file of features ``lengths`` long, with what is recorded of each and of all."""
    with h5py.File(path, "w") as file:
        file.attrs.update(shared)
        for name, length in lengths.items():
            file[name] = np.ones((length, WIDTH), np.float32)
            file[name].attrs.update(attributes.get(name, {}))
    return open_features(path)


@pytest.mark.parametrize(
    ("extent", "duration", "far"),
    [(10, 10, False), (12.9, 10, False), (13.1, 10, True), (7.1, 10, False), (6.9, 10, True), (0.5, 3, False)]
    + [(109, 100, False), (111, 100, True), (91, 100, False), (89, 100, True), (500, 100, True)],
)
def test_what_is_far_off(extent: float, duration: float, far: bool) -> None:
    assert is_far(extent, duration) is far


def test_features_far_longer_or_shorter_stop_the_run(tmp_path: Path) -> None:
    lengths = {"good": 40, "short": 8, "long": 200, "own rate": 80, "told": 40, "cut": 10}
    own = {"own rate": {"fps": 8.0}, "told": {"duration": 25.0}, "cut": {"duration": 10.0}}
    store = store_at(tmp_path / "f.h5", lengths, own, fps=4.0)
    with pytest.raises(StaleError) as caught:
        with_features([video(name) for name in lengths], store, "stop")
    path = tmp_path / "f.h5"
    assert str(caught.value) == (
        "4 of 6 videos have features far longer or shorter than the annotated duration: "
        f"short in {path} (2.0 s, annotated 10.0 s), long in {path} (50.0 s, annotated 10.0 s), "
        f"told in {path} (25.0 s, annotated 10.0 s), cut in {path} (2.5 s, annotated 10.0 s); "
        "extract them again or correct the annotations, or go on without them by data.misfit=skip"
    )


def test_misfits_can_be_skipped_or_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("stale"), "propagate", True)
    store = store_at(tmp_path / "f.h5", {"good": 40, "short": 8}, {}, fps=4.0)
    videos = [video("good"), video("short")]
    with caplog.at_level(logging.WARNING, "stale"):
        assert with_features(videos, store, "stop", "skip") == videos[:1]
    assert "skipped: 1 of 2 videos have features far longer or shorter" in caplog.text
    assert with_features(videos, store, "stop", "keep") == videos
    with pytest.raises(StaleError, match="1 of 1 videos .*; none is left"):
        with_features(videos[1:], store, "stop", "skip")


def test_features_of_unknown_rate_are_not_judged(tmp_path: Path) -> None:
    """Not even where all others have one rate: they may have been rescaled."""
    store = store_at(tmp_path / "f.h5", {"a": 40, "b": 40, "c": 400}, {"a": {"fps": 4.0}, "b": {"fps": 4.0}})
    assert len(with_features([video("a"), video("b"), video("c")], store, "stop")) == 3
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        file.update({"features": np.ones((2, 5, WIDTH)), "ids": ["a", "b"]})
        file.attrs["fps"] = 4.0  # a packed block has none, whatever it says
    assert len(with_features([video("a"), video("b")], open_features(tmp_path / "packed.h5"), "stop")) == 2


def test_features_side_by_side_are_judged_each(tmp_path: Path) -> None:
    paths = [tmp_path / "one.h5", tmp_path / "other.h5"]
    store_at(paths[0], {"a": 40}, {}, fps=4.0)
    store_at(paths[1], {"a": 40}, {}, fps=1.0)
    with pytest.raises(StaleError, match=r"a in .*other.h5 \(40.0 s, annotated 10.0 s\)"):
        with_features([video("a")], open_features(paths), "stop")


def test_records_beside_npy_files_are_judged(tmp_path: Path) -> None:
    store = store_of(tmp_path, a=np.ones((40, WIDTH), np.float32))
    for record, far in (({"fps": 4}, False), ({"fps": 1}, True), ({"fps": None}, False), ({"duration": 99}, True)):
        (tmp_path / "a.json").write_text(json.dumps(record))
        assert bool(_length_fault(video("a"), store)) is far


@pytest.mark.parametrize("value", ["5", 0, -1, float("nan"), float("inf"), True, [5, 5]])
@pytest.mark.parametrize("name", ["fps", "duration"])
def test_a_rate_or_duration_that_is_none_is_named(tmp_path: Path, name: str, value: Any) -> None:
    store = store_of(tmp_path, a=np.ones((40, WIDTH), np.float32))
    (tmp_path / "a.json").write_text(json.dumps({name: value}))
    with pytest.raises(StaleError, match=f"features of video 'a' in {tmp_path}: '{name}' is recorded as .*; a number"):
        with_features([video("a")], store, "stop")


@needs_shared
def test_the_real_features_last_as_long_as_their_videos(thumos14: dict[str, Video]) -> None:
    """All 412 within 0.36 s and 1.5 %: far from what is refused."""
    store = open_features(SHARED / "data" / "thumos14_captions" / "features.h5")
    assert len(with_features(list(thumos14.values()), store, "stop")) == 412
    off = {name: abs(store.extents(name)[0] - item.duration) for name, item in thumos14.items()}
    assert max(off.values()) < 0.36
    assert max(value / thumos14[name].duration for name, value in off.items()) < 0.015


# Segment lists


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


def test_segment_lists_without_instances_keep_a_column() -> None:
    segments, labels = segment_lists([video("a")], ["x"], 20)
    assert (segments.shape, labels.tolist()) == ((1, 1, 2), [[PADDING]])


def test_a_batch_holds_the_asked_videos_in_single_precision(tmp_path: Path) -> None:
    arrays = {name: np.full((4, WIDTH), number, np.float16) for number, name in enumerate("abc")}
    videos = [video(name, (number, number + 1, "x")) for number, name in enumerate("abc")]
    data = VideoDataset(videos, store_of(tmp_path, **arrays), ["x"], 10).to(torch.device("cpu"))
    assert len(data) == 3
    batch = data.batch(torch.tensor([2, 0]))
    assert batch.features.dtype == torch.float32
    assert batch.features[:, 0, 0].tolist() == [2, 0]
    assert batch.segments[:, 0].tolist() == [[2, 3], [0, 1]]
    assert batch.labels.tolist() == [[0], [0]]


def test_with_any_of_asks_every_instance() -> None:
    videos = [video("a", (0, 1, "x"), (1, 2, "y")), video("b", (0, 1, "z")), video("c")]
    assert [item.id for item in with_any_of(videos, ["y"])] == ["a"]
    assert [item.id for item in with_any_of(videos, ["x", "z"])] == ["a", "b"]


# The held-out part


def many_videos(count: int = 200, num_classes: int = 10) -> list[Video]:
    rng = np.random.default_rng(0)
    labels = [f"class {number}" for number in range(num_classes)]
    return [video(f"v{i:03d}", *((0, 1, label) for label in rng.choice(labels, 2))) for i in range(count)]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_hold_out_takes_its_share_and_parts_disjointly(share: float) -> None:
    videos = many_videos()
    kept, held_out = hold_out(videos, all_labels(videos), share, seed=0)
    assert len(held_out) == round(share * len(videos))
    assert sorted(item.id for item in kept + held_out) == [item.id for item in videos]


def test_hold_out_is_seeded() -> None:
    videos = many_videos()
    labels = all_labels(videos)
    assert hold_out(videos, labels, 0.1, 3) == hold_out(videos, labels, 0.1, 3)
    assert len({tuple(item.id for item in hold_out(videos, labels, 0.1, seed)[1]) for seed in range(5)}) == 5


def test_hold_out_spreads_over_the_classes() -> None:
    videos = [video(f"v{i:03d}", (0, 1, f"class {i % 10}")) for i in range(200)]
    for seed in range(20):
        _, held_out = hold_out(videos, all_labels(videos), 0.1, seed)
        counts = Counter(item.instances[0].label for item in held_out)
        assert set(counts.values()) == {2}
        assert len(counts) == 10


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_hold_out_never_takes_a_class_s_last_video(share: float) -> None:
    rare = [video("rare", (0, 1, "class 0"), (1, 2, "rare")), video("rarer", (0, 1, "rarer"))]
    videos = many_videos(20, 3) + rare
    labels = all_labels(videos)
    for seed in range(20):
        kept, _ = hold_out(videos, labels, share, seed)
        assert all_labels(kept) == labels


def test_hold_out_of_too_few_videos_is_empty() -> None:
    videos = [video("a", (0, 1, "x")), video("b", (0, 1, "x"))]
    assert [len(part) for part in hold_out(videos, ["x"], 0.1, 0)] == [2, 0]
    assert hold_out([], ["x"], 0.1, 0) == ([], [])


@needs_shared
@pytest.mark.parametrize("setting", ["75_25", "50_50"])
def test_held_out_thumos14_videos_leave_every_class_to_train_on(thumos14: dict[str, Video], setting: str) -> None:
    labels, training = all_labels(thumos14.values()), in_subset(thumos14.values(), "validation")
    for index in range(10):
        seen = load_split(labels, setting, index, SHARED / "data" / "splits", "thumos14").seen
        videos = with_any_of(training, seen)
        kept, held_out = hold_out(videos, seen, 0.1, 0)
        assert len(held_out) == round(0.1 * len(videos))
        assert set(seen) <= set(all_labels(kept))
        assert len(set(all_labels(held_out)) & set(seen)) >= 0.8 * len(seen)


# No unseen label reaches training

SEEN, UNSEEN = ("Baking", "Juggling", "Running"), ("Archery", "Knitting", "Zumba")


def database(rng: np.random.Generator) -> dict[str, Any]:
    """40 videos; most mix seen and unseen classes, some segments are empty or leave the video."""
    videos = {}
    for number in range(40):
        labels = rng.choice([*SEEN, *UNSEEN], rng.integers(1, 6)).tolist()
        duration = float(rng.uniform(10, 40))
        starts = rng.uniform(0, duration, len(labels))
        ends = starts + rng.uniform(0, 10, len(labels)) * (rng.random(len(labels)) > 0.1)
        videos[f"clip_{number:02d}"] = {
            "subset": "Training" if number < 32 else "Validation",
            "duration": duration,
            "annotations": [
                {"segment": [start, end], "label": label}
                for start, end, label in zip(starts.tolist(), ends.tolist(), labels, strict=True)
            ],
        }
    return videos


def training_data(folder: Path, videos: dict[str, Any], unseen: tuple[str, ...] = UNSEEN) -> TrainingData:
    """What training gets to see of ``videos``, read from files as any run reads them."""
    folder.mkdir()
    (folder / "annotations.json").write_text(json.dumps({"database": videos}))
    rng = np.random.default_rng(5)
    with h5py.File(folder / "features.h5", "w") as file:
        for name, entry in sorted(videos.items()):
            file[name] = rng.standard_normal((int(entry["duration"]), WIDTH)).astype(np.float16)
    for part, labels in (("train", SEEN), ("test", unseen)):
        path = folder / f"splits/train_75_test_25/Tiny/{part}/split_0.list"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(labels))
    settings = {
        "dataset": "tiny",
        "annotations": folder / "annotations.json",
        "features": folder / "features.h5",
        "splits": folder / "splits",
        "num_snippets": 16,
    }
    assignments = [f"data.{key}={value}" for key, value in settings.items()]
    return load_training_data(load_config([], [*assignments, "model.text.weights=unused"]))


def relabel(videos: dict[str, Any], change: Any) -> dict[str, Any]:
    """A copy in which ``change`` (a label → another) was applied to every label."""
    copy = json.loads(json.dumps(videos))
    for entry in copy.values():
        for item in entry["annotations"]:
            item["label"] = change(item["label"])
    return copy


def everything_trained_on(data: TrainingData) -> Iterator[torch.Tensor]:
    """Every tensor of both data sets, every target made of them."""
    for part in (data.train, data.held_out):
        batch = part.batch(torch.arange(len(part)))
        targets = build_targets(batch.segments, batch.labels, len(data.split.seen), 16)
        for holder in (batch, targets):
            yield from (getattr(holder, item.name) for item in dataclasses.fields(holder))


def same(first: TrainingData, second: TrainingData) -> bool:
    tensors = zip(everything_trained_on(first), everything_trained_on(second), strict=True)
    return all(torch.equal(one, other) for one, other in tensors)


def test_permuting_the_unseen_labels_changes_nothing(tmp_path: Path) -> None:
    videos = database(np.random.default_rng(0))
    original = training_data(tmp_path / "original", videos)
    rng = np.random.default_rng(1)
    shuffled = relabel(videos, lambda label: str(rng.choice(UNSEEN)) if label in UNSEEN else label)
    assert shuffled != videos
    permuted = training_data(tmp_path / "permuted", shuffled)
    assert same(original, permuted)
    assert original.train.videos == permuted.train.videos
    assert original.held_out.videos == permuted.held_out.videos


def test_renaming_the_unseen_labels_changes_nothing(tmp_path: Path) -> None:
    """Names that sort elsewhere, and one that a seen class's name begins with."""
    videos = database(np.random.default_rng(0))
    names = dict(zip(UNSEEN, ("~tilde", "0 first", "Run"), strict=True))
    renamed = relabel(videos, lambda label: names.get(label, label))
    original = training_data(tmp_path / "original", videos)
    other = training_data(tmp_path / "renamed", renamed, tuple(names.values()))
    assert same(original, other)
    assert original.train.videos == other.train.videos


def test_the_comparison_notices_a_seen_label(tmp_path: Path) -> None:
    """The two tests above could otherwise pass for the wrong reason."""
    videos = database(np.random.default_rng(0))
    swap = {"Baking": "Juggling", "Juggling": "Baking"}
    original = training_data(tmp_path / "original", videos)
    assert not same(original, training_data(tmp_path / "swapped", relabel(videos, lambda x: swap.get(x, x))))
    assert (original.train.labels == IGNORED).any()


def test_no_unseen_label_is_reachable_from_the_training_data(tmp_path: Path) -> None:
    data = training_data(tmp_path / "data", database(np.random.default_rng(0)))
    for part in (data.train, data.held_out):
        everything = pickle.dumps(part)  # all that can be reached from it
        assert any(label.encode() in everything for label in SEEN)
        assert not any(label.encode() in everything for label in UNSEEN)
    assert set(data.train.labels.unique().tolist()) == {PADDING, IGNORED, 0, 1, 2}


def test_training_uses_training_videos_with_a_seen_class_only(tmp_path: Path) -> None:
    videos = database(np.random.default_rng(0))
    data = training_data(tmp_path / "data", videos)
    used = {item.id for part in (data.train, data.held_out) for item in part.videos}
    with_seen = {
        name
        for name, entry in videos.items()
        if entry["subset"] == "Training"
        and any(item["label"] in SEEN and item["segment"][1] > item["segment"][0] for item in entry["annotations"])
    }
    assert used == with_seen
    assert len(used) < 32


def test_repaired_training_segments_are_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("stale"), "propagate", True)
    videos = database(np.random.default_rng(0))
    used = [
        (item["segment"], entry["duration"])
        for entry in videos.values()
        if entry["subset"] == "Training" and any(other["label"] in SEEN for other in entry["annotations"])
        for item in entry["annotations"]
    ]
    dropped = sum(start == end for (start, end), _ in used)
    clipped = sum(end > start and end - duration > 0.01 for (start, end), duration in used)
    assert dropped > 0
    assert clipped > 0
    with caplog.at_level(logging.INFO, "stale"):
        training_data(tmp_path / "data", videos)
    assert f"training segments: {clipped} clipped to their video, {dropped} dropped as empty" in caplog.text


def test_anonymise_keeps_the_segments() -> None:
    videos = [video("a", (0, 1, "x"), (2, 3, "y")), video("b", (4, 5, "z"))]
    assert anonymise(videos, ["x"]) == [video("a", (0, 1, "x"), (2, 3, "")), video("b", (4, 5, ""))]


@needs_shared
def test_every_thumos14_training_instance_becomes_a_target(thumos14: dict[str, Video]) -> None:
    """All 3,007 less 4 after their videos' ends; the released code lost most of them."""
    videos, _ = repair(in_subset(thumos14.values(), "validation"))
    segments, labels = segment_lists(videos, all_labels(videos), 256)
    assert int((labels >= 0).sum()) == 3003
    assert not (labels == IGNORED).any()
    targets = build_targets(segments, labels, 20, 256)
    for row, item in enumerate(videos):
        expected = {all_labels(videos).index(instance.label) for instance in item.instances}
        assert set(targets.classes[row, :-1].amax(1).nonzero().flatten().tolist()) == expected
