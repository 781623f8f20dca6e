"""Features that stay in their file: the same to the bit as those in memory, however large the file is."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_training import assert_same_runs
from tiny import SNIPPETS, tiny_config

from stale import memory
from stale.build import load_training_data
from stale.data import dataset
from stale.data.annotations import Video
from stale.data.dataset import MappedFeatures, VideoDataset, load_features, rescale
from stale.data.features import MappedRows, check_features, open_features
from stale.data.pack import pack
from stale.detection.inference import infer
from stale.errors import StaleError
from stale.files import read_json
from stale.training.trainer import train

V, T, D = 9, 5, 3
IDS = [f"clip {number}" for number in range(V)]
LAYOUTS: dict[str, dict[str, Any]] = {"contiguous": {}, "a chunk a video": {"chunks": (1, T, D)}}
# Not where they can be read as they are
OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed": {"chunks": (1, T, D), "compression": "gzip"},
    "several videos a chunk": {"chunks": (2, T, D)},
    "a video in several chunks": {"chunks": (1, T, 1)},
    "double precision": {"dtype": np.float64},
    "foreign byte order": {"dtype": ">f4"},
}


def values(dtype: Any = np.float32) -> np.ndarray:
    """Noise with everything that arithmetic could change in passing: -0, the smallest and the largest numbers."""
    array = np.random.default_rng(0).standard_normal((V, T, D)).astype(dtype)
    limits = np.finfo(dtype)
    array[1, :3, 0] = (-0.0, limits.smallest_subnormal, -limits.max)
    return array


def write_block(path: Path, array: np.ndarray, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=array, **options)
        file["ids"] = IDS
    return path


def videos(ids: list[str] = IDS) -> list[Video]:
    return [Video(name, "training", 10.0, ()) for name in ids]


def bits(features: torch.Tensor) -> list[int]:
    return features.view(torch.int32 if features.dtype == torch.float32 else torch.int16).flatten().tolist()


# The same to the bit


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_those_of_the_rescaled_features(tmp_path: Path, layout: str, dtype: type) -> None:
    array = values(dtype)
    store = open_features(write_block(tmp_path / "p.h5", array, **LAYOUTS[layout]))
    order = [IDS[number] for number in (7, 2, 0, 1, 8)]  # another order, and not all
    mapped, resident = (VideoDataset(videos(order), store, [], T, resident) for resident in ("never", "always"))
    assert isinstance(mapped.features, MappedFeatures)
    assert isinstance(resident.features, torch.Tensor)
    assert (mapped.features.shape, mapped.features.dtype) == (resident.features.shape, resident.features.dtype)
    for indices in ([4, 0, 2], [3], [1, 1, 3], []):
        one, other = (data.batch(torch.tensor(indices, dtype=torch.long)).features for data in (mapped, resident))
        rescaled = [rescale(torch.from_numpy(array[IDS.index(order[i])]), T) for i in indices]
        assert one.dtype == torch.float32
        assert bits(one) == bits(other) == bits(torch.stack(rescaled) if indices else one)
    assert bits(mapped.features[1:3]) == bits(resident.features[1:3])


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_what_cannot_be_read_where_it_lies_is_read_into_memory(tmp_path: Path, layout: str) -> None:
    store = open_features(write_block(tmp_path / "p.h5", values(), **OTHER_LAYOUTS[layout]))
    assert store.map_rows(IDS, T) is None
    torch.testing.assert_close(load_features(IDS, store, T), torch.from_numpy(values()), rtol=0, atol=0)


def test_other_numbers_of_snippets_and_other_stores_are_rescaled(tmp_path: Path) -> None:
    path = write_block(tmp_path / "p.h5", values())
    assert open_features(path).map_rows(IDS, T + 1) is None
    assert open_features([path, path]).map_rows(IDS, T) is None
    assert load_features(IDS, open_features(path), T + 1).shape == (V, T + 1, D)


@pytest.fixture(scope="module")
def packed(data: Path) -> Path:
    """The tiny data set's features as a packed block, beside them."""
    path = data.parent / "packed.h5"
    pack(open_features(data.parent / "features.h5"), path, SNIPPETS)
    return path


def test_training_from_the_file_is_training_from_memory(data: Path, packed: Path, tmp_path: Path) -> None:
    settings = (f"data.features={packed}", "train.epochs=1")
    config = [tiny_config(data, *settings, f"data.resident={word}") for word in ("always", "never")]
    assert isinstance(load_training_data(config[1]).train.features, MappedFeatures)
    runs = [train(one, tmp_path / one.data.resident) for one in config]
    assert_same_runs(*runs)
    found = []
    for run in runs:
        infer(run)
        found.append(read_json(run.detections("unseen"), "detections")["results"])
    assert found[0] == found[1]


# Larger than memory


def test_training_reads_no_more_than_its_videos(data: Path, tmp_path: Path) -> None:
    """A block of 126 GB with 40 videos written; the rest are holes in the file."""
    ids = sorted(read_json(data.parent / "annotations.json", "annotations")["database"])
    count, width = 240_000, 1 << 14
    rows = np.linspace(0, count - 1, len(ids)).astype(int)
    rng = np.random.default_rng(0)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        block = file.create_dataset("features", (count, SNIPPETS, width), np.float16, dcpl=plan)
        for row in rows:
            block[row] = rng.standard_normal((SNIPPETS, width)).astype(np.float16)
        names = np.array([f"other {number}" for number in range(count)], dtype="S20")
        names[rows] = ids
        file["ids"] = names
    status = os.stat(tmp_path / "huge.h5")
    if status.st_blocks * 512 > 1 << 30:
        pytest.skip("files without holes")
    assert status.st_size > 125e9
    settings = (f"data.features={tmp_path / 'huge.h5'}", "data.resident=never", "model.visual_projection=true")
    run = train(tiny_config(data, *settings, "train.epochs=1"), tmp_path / "run")
    infer(run)
    assert read_json(run.detections("unseen"), "detections")["results"]


def test_opening_reads_nothing_of_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: after opening none, after a batch exactly its videos, in the order of the disk."""
    read: list[str] = []

    def counted(array: np.ndarray, where: str) -> np.ndarray:
        read.append(where)
        return check_features(array, where)

    monkeypatch.setattr("stale.data.features.check_features", counted)
    path = write_block(tmp_path / "p.h5", values())
    data = VideoDataset(videos(), open_features(path), [], T, "never")
    assert not read
    data.batch(torch.tensor([8, 3, 5]))
    assert read == [f"features of video '{IDS[number]}' in {path}" for number in (3, 5, 8)]


# In memory or not


@pytest.mark.parametrize(
    ("resident", "share", "in_memory"),
    [("auto", 2.1, True), ("auto", 1.9, False), ("auto", None, True), ("always", 0.1, True), ("never", 100, False)],
)
def test_the_choice_and_its_reason_are_logged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    resident: str,
    share: float | None,
    in_memory: bool,
) -> None:
    """``share``: free memory over what the features take; None: the system does not tell."""
    monkeypatch.setattr(logging.getLogger("stale"), "propagate", True)
    free = None if share is None else int(share * V * T * D * 4)
    monkeypatch.setattr(dataset, "free_memory", lambda device: free)
    store = open_features(write_block(tmp_path / "p.h5", values()))
    with caplog.at_level(logging.INFO, "stale"):
        data = VideoDataset(videos(), store, [], T, resident)
    assert isinstance(data.features, torch.Tensor) is in_memory
    assert data.index_device == torch.device("cpu")
    if resident != "always":
        assert f"data.resident={resident}" in caplog.text
        assert ("in memory" if in_memory else "batch by batch") in caplog.text


def test_the_scarcer_of_both_memories_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 1 << 40, "cuda": V * T * D * 4}
    monkeypatch.setattr(dataset, "free_memory", lambda device: free[device.type])
    store = open_features(write_block(tmp_path / "p.h5", values()))
    on_gpu = VideoDataset(videos(), store, [], T, "auto", torch.device("cuda"))
    assert isinstance(on_gpu.features, MappedFeatures)
    assert isinstance(VideoDataset(videos(), store, [], T, "auto").features, torch.Tensor)


def test_the_memory_that_is_free(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 64 kB\nMemAvailable:      32 kB\n")
    assert memory._available(tmp_path / "meminfo") == 32 * 1024
    assert memory._available(tmp_path / "none") is None
    (tmp_path / "own").write_text("5:memory:/old\n0::/job/step\n")
    group = tmp_path / "root" / "job" / "step"
    group.mkdir(parents=True)
    assert memory._granted(tmp_path / "own", tmp_path / "root") is None
    for folder, limit, taken in ((group, "max", 5), (group.parent, "1000", 400), (group.parents[1], "5000", 100)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{taken}\n")
    assert memory._granted(tmp_path / "own", tmp_path / "root") == 600
    assert memory.free_memory(torch.device("cpu")) is None or memory.free_memory(torch.device("cpu")) > 0


# What cannot be


@pytest.mark.parametrize("setting", ["data.features={folder}/features.h5", "data.num_snippets=17"])
def test_features_that_must_be_rescaled_cannot_stay_in_their_file(
    data: Path, packed: Path, tmp_path: Path, setting: str
) -> None:
    settings = (f"data.features={packed}", "data.resident=never", setting.format(folder=data.parent))
    with pytest.raises(StaleError, match=r"data.resident is never, but .*\.h5 does not hold 1[67] snippets of every"):
        train(tiny_config(data, *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_values_that_are_no_numbers_are_found_when_they_are_read(tmp_path: Path, dtype: type, value: float) -> None:
    array = values(dtype)
    array[4, 2, 1] = value
    store = open_features(write_block(tmp_path / "p.h5", array))
    with pytest.raises(StaleError, match="features of video 'clip 4' in .*: NaN or infinite"):
        VideoDataset(videos(), store, [], T, "always")
    data = VideoDataset(videos(), store, [], T, "never")
    data.batch(torch.tensor([3, 5]))
    with pytest.raises(StaleError, match="features of video 'clip 4' in .*: NaN or infinite"):
        data.batch(torch.tensor([3, 4]))


def test_a_block_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    """Reading there would end the process."""
    path = write_block(tmp_path / "p.h5", values())
    with h5py.File(path) as file:
        block = file["features"]
        size = path.stat().st_size
        for offset in (size - T * D * 4 + 1, -1, 1 << 62):
            with pytest.raises(StaleError, match="^a video: beyond the end of the file, which is damaged$"):
                MappedRows(block, np.array([offset]), ["a video"])
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(StaleError, match="not an HDF5 file or damaged"):
        open_features(path)


def test_videos_that_are_not_in_the_block_are_named(tmp_path: Path) -> None:
    store = open_features(write_block(tmp_path / "p.h5", values()))
    with pytest.raises(StaleError, match="features of 2 videos are missing in .*p.h5: a, b"):
        store.map_rows(["a", *IDS, "b"], T)


def test_a_replaced_file_is_no_harm(data: Path, tmp_path: Path) -> None:
    """The open file stays what it was, under whatever name."""
    store = open_features(write_block(tmp_path / "p.h5", values()))
    write_block(tmp_path / "other.h5", values() + 1)
    (tmp_path / "other.h5").replace(tmp_path / "p.h5")
    assert torch.equal(load_features(IDS, store, T), torch.from_numpy(values()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_reach_the_gpu(tmp_path: Path) -> None:
    store = open_features(write_block(tmp_path / "p.h5", values()))
    device = torch.device("cuda")
    mapped, resident = (VideoDataset(videos(), store, [], T, word, device).to(device) for word in ("never", "always"))
    indices = torch.tensor([4, 0, 2])
    for where in (mapped.index_device, device):
        one, other = mapped.batch(indices.to(where)), resident.batch(indices.to(device))
        assert one.features.device.type == one.labels.device.type == "cuda"
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.segments, other.segments)
