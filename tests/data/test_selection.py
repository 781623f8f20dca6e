"""Which videos a run is trained and tested on, and that no unseen label reaches training."""

import dataclasses
import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from stale.api import infer
from stale.config import PointsConfig, load_config
from stale.data.annotations import Instance, Video, all_labels, read_annotations
from stale.data.dataset import IGNORED, PADDING, load_features, rescale
from stale.data.features import FeatureStore, open_features
from stale.data.selection import (
    TrainingData,
    hold_out,
    load_test_data,
    load_training_data,
    reduce_instances,
    with_features,
)
from stale.errors import StaleError
from stale.io import read_json, write_json
from stale.training.targets import build_targets
from stale.training.trainer import train
from tests import helpers
from tests.helpers import SHARED, needs_shared, tiny_config, video, write_lists

WIDTH = 3


def store_at(
    path: Path, lengths: dict[str, int], attributes: dict[str, dict[str, Any]] | None = None, **shared: Any
) -> FeatureStore:
    """An HDF5 file of features ``lengths`` long, with what is recorded of each and of all."""
    rng = np.random.default_rng(5)
    with h5py.File(path, "w") as file:
        file.attrs.update(shared)
        for name, length in lengths.items():
            file[name] = rng.standard_normal((length, WIDTH)).astype(np.float32)
            file[name].attrs.update((attributes or {}).get(name, {}))
    return open_features(path)


def test_missing_features_stop_the_run_or_are_skipped(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    store = store_at(tmp_path / "f.h5", {"a": 4, "v_c": 4})
    videos = [video(name) for name in "abcdefgh"]
    with pytest.raises(StaleError) as caught:
        with_features(videos, store, "stop")
    assert str(caught.value) == (
        f"6 of 8 videos have no features in {tmp_path / 'f.h5'}: b, d, e, f, g and 1 more; add them, or continue "
        "without them by data.missing=skip"
    )
    assert [item.id for item in with_features(videos, store, "skip")] == ["a", "c"]
    assert "skipped: 6 of 8 videos have no features in" in log.text
    with pytest.raises(StaleError, match="none of the 2 videos has usable features"):
        with_features([video("b"), video("d")], store, "skip")


def test_features_far_longer_or_shorter_stop_the_run(tmp_path: Path) -> None:
    lengths, path = {"good": 40, "short": 8, "own rate": 80, "recorded": 40}, tmp_path / "f.h5"
    own = {"own rate": {"fps": 8.0}, "recorded": {"duration": 25.0}}
    store = store_at(path, lengths, own, fps=4.0)
    with pytest.raises(StaleError) as caught:
        with_features([video(name) for name in lengths], store, "stop")
    assert str(caught.value) == (
        "2 of 4 videos have features far longer or shorter than annotated: "
        f"short in {path} (2.0 s, annotated 10.0 s), recorded in {path} (25.0 s, annotated 10.0 s); "
        "extract them again or correct the annotations, or continue without them by data.duration_mismatch=skip"
    )
    assert with_features([video("good"), video("short")], store, "stop", "skip") == [video("good")]
    assert with_features([video("short")], store, "stop", "keep") == [video("short")]
    store_at(tmp_path / "other.h5", {"good": 40}, fps=1.0)
    with pytest.raises(StaleError, match=r"good in .*other.h5 \(40.0 s, annotated 10.0 s\)"):
        with_features([video("good")], open_features([path, tmp_path / "other.h5"]), "stop")


@needs_shared
def test_the_real_features_last_as_long_as_their_videos(thumos14: dict[str, Video]) -> None:
    store = open_features(SHARED / "data" / "thumos14_captions" / "features.h5")
    assert (len(store.ids), store.width) == (412, 384)
    assert len(with_features(list(thumos14.values()), store, "stop")) == 412


def many_videos(count: int = 200, num_classes: int = 10) -> list[Video]:
    rng = np.random.default_rng(0)
    labels = [f"class {number}" for number in range(num_classes)]
    return [video(f"v{i:03d}", *((0, 1, label) for label in rng.choice(labels, 2))) for i in range(count)]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_hold_out_takes_its_share_by_seed(share: float) -> None:
    videos = many_videos()
    labels = all_labels(videos)
    kept, held_out = hold_out(videos, labels, share, seed=0)
    assert len(held_out) == round(share * len(videos))
    assert sorted(item.id for item in kept + held_out) == [item.id for item in videos]
    assert hold_out(videos, labels, share, 0) == (kept, held_out)
    assert len({tuple(item.id for item in hold_out(videos, labels, share, seed)[1]) for seed in range(5)}) == 5
    assert hold_out([], labels, share, 0) == ([], [])
    even = [video(f"v{i:03d}", (0, 1, f"class {i % 10}")) for i in range(200)]
    counts = Counter(item.instances[0].label for item in hold_out(even, all_labels(even), share, 0)[1])
    assert (set(counts.values()), len(counts)) == ({round(20 * share)}, 10), "spread over the classes"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_hold_out_never_takes_the_last_video_of_a_class(share: float) -> None:
    rare = [video("rare", (0, 1, "class 0"), (1, 2, "rare")), video("rarer", (0, 1, "rarer"))]
    videos = many_videos(20, 3) + rare
    for seed in range(20):
        kept, _ = hold_out(videos, all_labels(videos), share, seed)
        assert all_labels(kept) == all_labels(videos)


SEEN, UNSEEN = ("Baking", "Juggling", "Running"), ("Archery", "Knitting", "Zumba")


def database() -> dict[str, Any]:
    """40 videos; most mix seen and unseen classes, some segments are empty or leave the video."""
    videos, rng = {}, np.random.default_rng(0)
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


def training_data(
    folder: Path, sampling: str, change: Callable[[str], str] = str, unseen: tuple[str, ...] = UNSEEN
) -> TrainingData:
    """The training data of the videos, loaded from files as any run's, with ``change`` applied to every label."""
    videos = database()
    for item in (item for entry in videos.values() for item in entry["annotations"]):
        item["label"] = change(item["label"])
    write_json(folder / "annotations.json", {"database": videos})
    store_at(folder / "features.h5", {name: int(entry["duration"]) for name, entry in videos.items()})
    write_lists(folder / "splits", SEEN, unseen)
    files = {"annotations": "annotations.json", "features": "features.h5", "splits": "splits"}
    assignments = [f"data.{key}={folder / name}" for key, name in files.items()]
    rest = ["data.dataset=tiny", "data.num_snippets=16", "model.text.weights=ViT-B/16", f"data.sampling={sampling}"]
    if sampling == "native":
        rest += ["data.max_snippets=64", "model.localizer.kind=none", "detection.proposals=foreground"]
    return load_training_data(load_config([], [*assignments, *rest]))


def trained_ids(data: TrainingData) -> set[str]:
    return {item.id for part in (data.train, data.held_out) for item in part.videos}


def everything_trained_on(data: TrainingData) -> Iterator[torch.Tensor]:
    """Every tensor of both data sets, every target made of them."""
    for part in (data.train, data.held_out):
        batch = part.batch(torch.arange(len(part)))
        size = len(data.split.seen), batch.features.shape[1]
        targets = build_targets(batch.segments, batch.labels, *size, valid=batch.valid, points=PointsConfig())
        for holder in (batch, targets, targets.points):
            values = (getattr(holder, item.name) for item in dataclasses.fields(holder))
            yield from (value for value in values if isinstance(value, torch.Tensor))


def same(first: TrainingData, second: TrainingData) -> bool:
    tensors = zip(everything_trained_on(first), everything_trained_on(second), strict=True)
    equal = all(torch.equal(one, other) for one, other in tensors)
    return equal and first.train.videos == second.train.videos and first.held_out.videos == second.held_out.videos


@pytest.mark.parametrize("sampling", ["rescale", "native"])
def test_permuting_or_renaming_the_unseen_labels_changes_nothing(tmp_path: Path, sampling: str) -> None:
    """New names sort elsewhere, and one begins a seen class's name."""
    rng = np.random.default_rng(1)
    original = training_data(tmp_path / "original", sampling)
    permute = lambda label: str(rng.choice(UNSEEN)) if label in UNSEEN else label  # noqa: E731
    assert same(original, training_data(tmp_path / "permuted", sampling, permute))
    assert (tmp_path / "permuted/annotations.json").read_text() != (tmp_path / "original/annotations.json").read_text()
    names = dict(zip(UNSEEN, ("~tilde", "0 first", "Run"), strict=True))
    renamed = training_data(tmp_path / "renamed", sampling, lambda label: names.get(label, label), (*names.values(),))
    assert same(original, renamed)
    # The comparison notices a seen label: it does not pass for the wrong reason.
    swap = {"Baking": "Juggling", "Juggling": "Baking"}
    assert not same(original, training_data(tmp_path / "swapped", sampling, lambda label: swap.get(label, label)))
    assert (original.train.labels == IGNORED).any()


@pytest.mark.parametrize("sampling", ["rescale", "native"])
def test_no_unseen_label_is_reachable_from_the_training_data(tmp_path: Path, sampling: str) -> None:
    data = training_data(tmp_path / "data", sampling)
    for part in (data.train, data.held_out):
        everything = pickle.dumps(part)  # all that can be reached from it
        assert any(label.encode() in everything for label in SEEN)
        assert not any(label.encode() in everything for label in UNSEEN)
    assert set(data.train.labels.unique().tolist()) == {PADDING, IGNORED, 0, 1, 2}

    with_seen = {
        name
        for name, entry in database().items()
        if entry["subset"] == "Training"
        and any(item["label"] in SEEN and item["segment"][1] > item["segment"][0] for item in entry["annotations"])
    }
    assert trained_ids(data) == with_seen
    assert len(with_seen) < 32


@pytest.mark.parametrize(
    ("instances", "shrink", "shorter", "left"),
    [
        ("all", 0, 0, [(0, 3), (4, 5), (6, 12)]),
        ("last", 0, 0, [(6, 12)]),
        ("all", 1, 0, [(1, 2), (7, 11)]),
        ("all", 0, 2, [(0, 3), (6, 12)]),
        ("all", 1, 2, [(7, 11)]),
    ],
)
def test_the_released_codes_instances(instances: str, shrink: float, shorter: float, left: list) -> None:
    unknown = Instance(13.0, 14.0, "unseen")
    seen = (Instance(start, end, "seen") for start, end in [(0, 3), (4, 5), (6, 12)])
    changed = {"num_snippets": 16, "instances": instances, "shrink": shrink, "drop_shorter": shorter}
    settings = load_config([]).data.model_copy(update=changed)
    (reduced,) = reduce_instances([Video("v", "training", 16.0, (*seen, unknown))], ["seen"], settings)
    assert [(item.start, item.end) for item in reduced.instances if item.label == "seen"] == left
    assert unknown in reduced.instances, "instances of other classes are still ignored"


def test_videos_without_an_instance_left_are_not_trained_on(data: Path) -> None:
    usual = load_training_data(tiny_config(data))
    last = load_training_data(tiny_config(data, "data.instances=last"))
    count = (usual.train.labels >= 0).sum(), (last.train.labels >= 0).sum()
    assert count[0] > count[1] == len(last.train)
    assert torch.equal(usual.held_out.labels, last.held_out.labels), "what chooses the checkpoint is not reduced"
    with pytest.raises(StaleError, match="no instance is left"):
        load_training_data(tiny_config(data, f"data.drop_shorter={helpers.SNIPPETS + 1}"))


def test_features_of_several_sources_are_concatenated(data: Path, tmp_path: Path) -> None:
    first, ids = data.parent / "features.h5", [f"video_{number:03d}" for number in range(40)]
    store_at(tmp_path / "other.h5", dict.fromkeys(ids, 11))  # at a rate of its own
    both = [str(first), str(tmp_path / "other.h5")]
    store = open_features(both)
    assert store.width == helpers.WIDTH + WIDTH
    for row, name in zip(load_features(ids[:2], store, 16), ids, strict=False):
        parts = [rescale(torch.from_numpy(open_features(path).read(name)), 16) for path in both]
        torch.testing.assert_close(row, torch.cat(parts, 1))
    setting = f"data.features=[{', '.join(both)}]"
    with pytest.raises(StaleError, match="67 wide.*visual_projection"):
        train(tiny_config(data, setting), tmp_path / "refused")
    run = train(tiny_config(data, setting, "model.visual_projection=true", "train.epochs=1"), tmp_path / "run")
    infer(run)
    assert read_json(run.detections("unseen"), "detections")["protocol"]["features"] == " + ".join(both)
    assert not run.baselines("snippets", "unseen").exists()
    assert "left out: the features" in run.log.read_text(encoding="utf-8")
    store_at(tmp_path / "few.h5", {"video_000": 3})
    assert set(open_features([first, tmp_path / "few.h5"]).ids) == {"video_000"}, "what one source lacks is missing"


@pytest.mark.parametrize("fold", range(3))
def test_a_video_of_a_pseudo_unseen_class_is_tested_and_not_trained_on(data: Path, fold: int) -> None:
    config = tiny_config(data, "data.setting=seen_cv", "data.cv_setting=75_25", f"data.fold={fold}")
    training, test = load_training_data(config), load_test_data(config, "unseen")
    assert trained_ids(training) and test.videos
    assert not trained_ids(training) & {video.id for video in test.videos}
    assert set(training.split.seen) | set(test.classes) == set(helpers.SEEN)
    assert {item.label for video in training.train.videos for item in video.instances} <= {*training.split.seen, ""}
    subset = {video.id: video.subset for video in read_annotations(config.data.annotations).values()}
    assert {subset[video.id] for video in test.videos} == {"validation"}, "no video of the test subset is used"
    for vocabulary in ("seen", "all"):
        with pytest.raises(StaleError, match=f"tests pseudo-unseen classes alone, not {vocabulary}"):
            load_test_data(config, vocabulary)


BOTH = "validation+test"


@pytest.mark.parametrize(
    ("train_on", "test_on"), [("validation", BOTH), (BOTH, "validation"), (BOTH, "test"), (BOTH, BOTH)]
)
def test_training_videos_of_an_unseen_class_are_kept_for_testing(data: Path, train_on: str, test_on: str) -> None:
    config = tiny_config(data, f"data.train_subset={train_on}", f"data.test_subset={test_on}")
    training, test = load_training_data(config), load_test_data(config, "unseen")
    assert {video.subset for video in test.videos} == {*test_on.split("+")}
    assert trained_ids(training) and not trained_ids(training) & {video.id for video in test.videos}
    assert training.digests["segments"] != hashlib.sha256(b"[]").hexdigest()
