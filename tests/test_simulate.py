"""Simulated features have the traits they claim, fit the reader, stay small in memory, and say what they are."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny import text_tower_weights

from stale.data.annotations import Instance, Video
from stale.data.features import open_features
from stale.errors import StaleError
from stale.preparation import simulate as module
from stale.preparation.converters import Annotations, write_as
from stale.preparation.simulate import Grid, Space, Strengths, describe, make_space, simulate, simulate_video

WIDTH = 64
LABELS = [f"class {number}" for number in range(12)]


def make_videos(count: int = 60) -> dict[str, Video]:
    """Videos of one class each, a third of which is action; one id begins with v_, one video has no instance."""
    rng = np.random.default_rng(0)
    videos = {}
    for number in range(count):
        name = f"v_{number}" if number % 2 else f"a{number}"
        duration = float(rng.uniform(30, 200))
        instance = Instance(duration / 3, 2 * duration / 3, LABELS[number % len(LABELS)])
        videos[name] = Video(name, "training", duration, (instance,))
    videos["none"] = Video("none", "testing", 50.0, ())
    return videos


@pytest.fixture(scope="module")
def space() -> Space:
    """Text embeddings with a large common part."""
    rng = np.random.default_rng(1)
    text = rng.standard_normal(WIDTH) + 0.7 * rng.standard_normal((len(LABELS), WIDTH))
    return make_space(LABELS, text / np.linalg.norm(text, axis=1, keepdims=True), Strengths().gap, 0)


def statistics(space: Space, **strengths: float) -> dict[str, float]:
    """What features of these strengths look like."""
    videos = [video for video in make_videos().values() if video.instances]
    chosen = Strengths(**strengths)
    return describe(videos, lambda video: simulate_video(video, space, Grid(count=100), chosen, 0), space)


def test_the_traits_are_there(space: Space) -> None:
    found = statistics(space)
    assert 0.3 < found["cosine, two videos"] < 0.7
    assert found["cosine, two videos"] + 0.1 < found["cosine, one video"] < found["cosine, neighbouring snippets"]
    assert 0.6 < found["AUC, inside against outside"] < 0.95
    assert 1 / len(LABELS) < found["videos named right"]


def test_every_strength_does_what_it_says(space: Space) -> None:
    usual = statistics(space)
    assert statistics(space, common=0.2)["cosine, two videos"] < usual["cosine, two videos"] - 0.1
    assert statistics(space, video=2.0)["cosine, one video"] > usual["cosine, one video"]
    assert statistics(space, smoothness=0.0)["cosine, neighbouring snippets"] < usual["cosine, neighbouring snippets"]
    assert statistics(space, inside=1.0, confusion=0.0)["AUC, inside against outside"] > 0.99
    even = statistics(space, inside=0.25, outside=0.25)["AUC, inside against outside"]
    assert abs(even - 0.5) < 0.1
    assert statistics(space, outside=0.8, inside=0.9)["videos named right"] > 0.95


def test_the_gap_lies_between_the_modalities() -> None:
    rng = np.random.default_rng(2)
    text = 3 * rng.standard_normal(WIDTH) + rng.standard_normal((len(LABELS), WIDTH))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    mean = text.mean(axis=0) / np.linalg.norm(text.mean(axis=0))
    cosines = [float(make_space(LABELS, text, gap, 0).common @ mean) for gap in (0.0, 0.6, 1.0)]
    assert cosines == pytest.approx([1.0, 0.8, 0.0])


def test_a_video_is_the_same_whatever_the_others(space: Space) -> None:
    video = make_videos()["a0"]
    first, again = (simulate_video(video, space, Grid(count=50), Strengths(), 3) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, simulate_video(video, space, Grid(count=50), Strengths(), 4))
    assert first.dtype == np.float16 and np.allclose(np.linalg.norm(first.astype(float), axis=1), 1, atol=0.01)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Annotations and a text tower."""
    write_as("activitynet", Annotations(make_videos()), tmp_path / "annotations.json")
    torch.save(text_tower_weights(), tmp_path / "tower.pt")
    return tmp_path / "annotations.json", tmp_path / "tower.pt"


def test_a_packed_block_that_the_reader_reads(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "features_simulated.h5"
    simulate(*inputs, output, Grid(count=20))
    store = open_features(output)
    assert store.width == WIDTH and len(store.ids) == 60
    assert store.read("v_1").shape == (20, WIDTH)
    assert store.find("none") is None
    with h5py.File(output) as file:
        assert file.attrs["simulated"] and "simulated" in file.attrs["sampling"]
        assert "annotations.json, SHA-256" in file.attrs["annotations"] and '"gap": 0.9' in file.attrs["strengths"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "annotations.json", "features_simulated.h5", "tower.pt",
    ]  # fmt: skip


def test_a_dataset_a_video_at_a_rate(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "simulated.h5"
    simulate(*inputs, output, Grid(rate=2.0), everything=True)
    store, videos = open_features(output), make_videos()
    assert set(store.ids) == set(videos)
    assert all(len(store.read(name)) == round(2 * video.duration) for name, video in videos.items())


def test_the_name_must_tell(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StaleError, match="must have 'simulated' in it"):
        simulate(*inputs, tmp_path / "features.h5")
    assert not (tmp_path / "features.h5").exists()


@pytest.mark.parametrize("strengths", [{"gap": 1.5}, {"noise": -1.0}, {"noise": float("nan")}])
def test_impossible_strengths(inputs: tuple[Path, Path], tmp_path: Path, strengths: dict[str, float]) -> None:
    with pytest.raises(StaleError, match=f"{next(iter(strengths))} is"):
        simulate(*inputs, tmp_path / "simulated.h5", strengths=Strengths(**strengths))


def test_nothing_is_left_when_it_is_interrupted(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        simulate(*inputs, tmp_path / "simulated.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations.json", "tower.pt"]


def test_memory_does_not_grow_with_the_number_of_videos(space: Space, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        videos = [video for video in make_videos(count).values() if video.instances]
        with h5py.File(tmp_path / f"{count}.h5", "w") as file:
            tracemalloc.start()
            module._write(file, videos, lambda video: simulate_video(video, space, grid, Strengths(), 0), grid, WIDTH)
            size = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return size

    grid = Grid(count=200)
    small, large = peak(10), peak(200)
    assert large < 1.5 * small < 200 * 200 * WIDTH * 2
