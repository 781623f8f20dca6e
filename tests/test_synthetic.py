"""The demo's data: sound, the same for the same seed, neither solved nor hopeless without training."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stale.data.annotations import Video, all_labels, in_subset, read_annotations, repair
from stale.data.features import open_features
from stale.data.splits import load_split
from stale.data.synthetic import BETWEEN, CLASSES, SCENES, Recipe, embed, random_tower, random_videos, write_synthetic
from stale.model.text import TextTower, load_text_weights

SMALL = Recipe(training_videos=2, validation_videos=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    path = tmp_path_factory.mktemp("demo")
    write_synthetic(path, SMALL)
    return path


@pytest.fixture(scope="module")
def videos(folder: Path) -> list[Video]:
    """Its videos, read back."""
    return list(read_annotations(folder / "annotations.json").values())


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    _, paths = write_synthetic(tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths.values())
    for path in paths.values():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_another_seed_gives_other_data(videos: list[Video]) -> None:
    assert random_videos(Recipe(seed=1, training_videos=2, validation_videos=1)) != videos
    assert not torch.equal(random_tower(0)["text_projection"], random_tower(1)["text_projection"])


def test_both_subsets_have_every_class_and_a_quarter_is_unseen(videos: list[Video]) -> None:
    for subset in ("training", "validation"):
        assert all_labels(in_subset(videos, subset)) == list(CLASSES)
    split = load_split(list(CLASSES), "75_25", 0)
    assert (len(split.seen), len(split.unseen)) == (15, 5)


def test_instances_follow_each_other_inside_the_video(videos: list[Video]) -> None:
    for video in videos:
        edges = [0.0, *(time for item in video.instances for time in (item.start, item.end)), video.duration]
        assert edges == sorted(edges)
        assert 1 <= len(video.instances) <= 4
    repairs = repair(videos)[1]
    assert (repairs.clipped, repairs.dropped) == (0, 0)


def test_some_videos_have_a_guest_class() -> None:
    videos = random_videos(Recipe())
    guests = [video for video in videos if len({item.label for item in video.instances}) == 2]
    assert 0.05 < len(guests) / len(videos) < 0.3


def test_features_are_unit_half_precision_one_a_second(folder: Path, videos: list[Video]) -> None:
    store = open_features(folder / "features.h5")
    assert store.width == TextTower.from_weights(load_text_weights(folder / "text_tower.pt")).output_width
    for video in videos:
        features = store.read(video.id)
        assert features.dtype == np.float16
        assert len(features) == np.ceil(video.duration)
        np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=1), 1, atol=2e-3)


def test_the_tower_has_clips_names_and_vocabulary(folder: Path) -> None:
    weights = torch.load(folder / "text_tower.pt", weights_only=True)
    assert weights["token_embedding.weight"].shape == (49408, 64)
    assert weights["positional_embedding"].shape == (77, 64)
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_names_are_neither_parallel_nor_unrelated(seed: int) -> None:
    names = embed(random_tower(seed), [*CLASSES, *BETWEEN, *SCENES])
    others = ~np.eye(len(names), dtype=bool)
    cosine = (names @ names.T)[others]
    assert 0.2 < cosine.mean() < 0.8
    assert cosine.max() < 0.99


def test_the_untrained_tower_recognises_actions_better_than_chance_but_not_perfectly(tmp_path: Path) -> None:
    videos, paths = write_synthetic(tmp_path, Recipe(training_videos=6, validation_videos=1))
    text = embed(torch.load(paths["text_tower"], weights_only=True), CLASSES)
    hits: dict[str, list[bool]] = {label: [] for label in CLASSES}
    with h5py.File(paths["features"]) as file:
        for video in videos:
            best = (file[video.id][()].astype(float) @ text.T).argmax(1)
            for item in video.instances:
                inside = best[round(item.start) : round(item.end)]
                hits[item.label].extend(inside == CLASSES.index(item.label))
    rates = {label: np.mean(rows) for label, rows in hits.items()}
    assert 0.3 < np.mean(list(rates.values())) < 0.9
