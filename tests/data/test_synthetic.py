"""Synthetic features: sound, the same for the same seed, and marked where they stand for a real data set's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import simulate_features as command
from stale.data.annotations import Video, read_annotations
from stale.data.classes import phrase
from stale.data.embeddings import read_embeddings
from stale.data.features import duration_mismatch, open_features
from stale.errors import StaleError
from stale.io import read_json
from synthetic_data import CLASSES, embed, random_videos, write_synthetic

SMALL = {"training_videos": 2, "validation_videos": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set."""
    path = tmp_path_factory.mktemp("demo")
    write_synthetic(path, **SMALL)
    return path


@pytest.fixture(scope="module")
def videos(folder: Path) -> list[Video]:
    return list(read_annotations(folder / "annotations.json").values())


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path, videos: list[Video]) -> None:
    assert write_synthetic(tmp_path, **SMALL) == videos
    for name in ("annotations.json", "features.h5", "text_encoder.pt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert len(list(tmp_path.iterdir())) == 3
    assert random_videos(1, 2, 1) != videos


def test_the_demo_features_tell_actions_apart_better_than_chance_but_not_perfectly(
    folder: Path, videos: list[Video]
) -> None:
    weights = torch.load(folder / "text_encoder.pt", weights_only=True)
    assert (weights["token_embedding.weight"].shape, weights["positional_embedding"].shape) == ((49408, 64), (77, 64))
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    text = embed(weights, CLASSES)
    alike = ((text @ text.T).sum() - len(text)) / (len(text) * (len(text) - 1))  # the mean cosine of two classes
    assert alike < 0.6, "what prompts of random words have in common is not removed"
    store, hits = open_features(folder / "features.h5"), []
    for video in videos:
        features = store.read(video.id)
        assert (features.dtype, features.shape) == (np.float16, (round(video.duration), 64))
        np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=1), 1, atol=2e-3)
        best = (features.astype(float) @ text.T).argmax(1)
        for item in video.instances:
            hits.extend(best[round(item.start) : round(item.end)] == CLASSES.index(item.label))
    assert 0.5 < np.mean(hits) < 0.8


def test_features_of_the_short_profile_have_the_stated_similarities(tmp_path: Path) -> None:
    videos = write_synthetic(tmp_path, profile="short", training_videos=4, validation_videos=4)
    assert list(read_annotations(tmp_path / "annotations.json").values()) == videos
    text = embed(torch.load(tmp_path / "text_encoder.pt", weights_only=True), [phrase(label) for label in CLASSES])
    store = open_features(tmp_path / "features.h5")
    features = [store.read(video.id).astype(float) for video in videos]
    features = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    similarity = [x @ text.T for x in features]
    assert np.mean([s.mean() for s in similarity]) == pytest.approx(0.22, abs=0.005)
    assert np.mean([s.std(axis=1).mean() for s in similarity]) == pytest.approx(0.015, abs=0.0015)
    assert np.mean([s.std(axis=0).mean() for s in similarity]) == pytest.approx(0.010, abs=0.001)
    mean = np.mean([x.mean(axis=0) for x in features], axis=0)
    assert mean @ mean == pytest.approx(0.72, abs=0.02)
    inside = [(x @ x.T)[~np.eye(len(x), dtype=bool)].mean() for x in features]
    assert np.mean(inside) == pytest.approx(0.91, abs=0.01)


# Stand-ins for features of real annotations


@pytest.fixture
def inputs(folder: Path, tmp_path: Path) -> list[str]:
    """Annotations, one of whose videos has no instance, and text weights, as the command takes them."""
    content = read_json(folder / "annotations.json", "annotations")
    content["database"]["none"] = {"subset": "testing", "duration": 50.0}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return ["--annotations", str(tmp_path / "annotations.json"), "--text-weights", str(folder / "text_encoder.pt")]


def test_simulated_features_say_so_and_last_as_long_as_their_videos(
    inputs: list[str], tmp_path: Path, videos: list[Video]
) -> None:
    command.main([*inputs, "--snippets", "20"])
    store = open_features(tmp_path / "features_simulated")
    assert (store.width, len(store.ids), store.read("demo_0001").shape) == (64, 60, (20, 64))
    assert store.simulated
    assert store.rescaled
    assert store.find("none") is None
    assert store.attributes("demo_0001")["sampling"] == "simulated: not extracted from any video"
    command.main([*inputs, "--rate", "2", "--output", str(tmp_path / "simulated")])
    store = open_features(tmp_path / "simulated")
    for video in videos:
        assert len(store.read(video.id)) == round(2 * video.duration)
        assert duration_mismatch(store, video) == ""
    with pytest.raises(StaleError, match="must contain 'simulated'"):
        command.main([*inputs, "--output", str(tmp_path / "features")])
    assert not (tmp_path / "features").exists()


def test_features_are_simulated_around_class_embeddings(inputs: list[str], tmp_path: Path, videos: list[Video]) -> None:
    vectors = np.random.default_rng(0).standard_normal((len(CLASSES), 48))
    np.savez(tmp_path / "table.npz", embeddings=vectors, classes=np.array(CLASSES))
    command.main([*inputs[:2], "--text-embeddings", str(tmp_path / "table.npz"), "--rate", "2"])
    store, table = open_features(tmp_path / "features_simulated"), read_embeddings(tmp_path / "table.npz")
    gains = []
    for video in videos:
        first = video.instances[0]
        cosine = store.read(video.id).astype(float) @ table.vectors[table.find([first.label])[0]]
        inside = slice(int(2 * first.start) + 1, int(2 * first.end))
        gains.append(cosine[inside].mean() - cosine.mean())
    assert store.width == 48
    assert np.mean(gains) > 0.1
