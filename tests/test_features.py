"""Features in their three forms and two precisions, and everything that can be wrong with them."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.data.annotations import Video
from stale.data.features import FeatureStore, check_features, open_features
from stale.errors import StaleError

FORMS = ("npy", "hdf5", "packed")
WIDTH = 5


def some_features(dtype: Any = np.float32, count: int = 3, snippets: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"clip_{i}": rng.standard_normal((snippets, WIDTH)).astype(dtype) for i in range(count)}


def write_features(folder: Path, form: str, arrays: dict[str, np.ndarray]) -> Path:
    """Write ``arrays`` (of equal lengths, for ``packed``) in one of the three forms."""
    path = folder / form
    if form == "npy":
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
        return path
    with h5py.File(path, "w") as file:
        if form == "hdf5":
            file.update(arrays)
        else:
            file["features"] = np.stack(list(arrays.values()))
            file["ids"] = list(arrays)
    return path


# What all forms share


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_precision_gives_back_what_was_written(tmp_path: Path, form: str, dtype: type) -> None:
    arrays = some_features(dtype)
    store = open_features(write_features(tmp_path, form, arrays))
    assert set(store.ids) == set(arrays)
    assert store.width == WIDTH
    for name, array in arrays.items():
        read = store.read(name)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("form", ["npy", "hdf5"])
def test_videos_may_differ_in_length(tmp_path: Path, form: str) -> None:
    arrays = {f"v{count}": np.full((count, WIDTH), count, np.float32) for count in (1, 2, 50)}
    store = open_features(write_features(tmp_path, form, arrays))
    assert {name: len(store.read(name)) for name in store.ids} == {"v1": 1, "v2": 2, "v50": 50}


@pytest.mark.parametrize("form", FORMS)
def test_the_optional_v_before_an_id(tmp_path: Path, form: str) -> None:
    arrays = dict(zip(("v_abc", "def"), some_features().values(), strict=False))
    store = open_features(write_features(tmp_path, form, arrays))
    np.testing.assert_array_equal(store.read("abc"), arrays["v_abc"])
    np.testing.assert_array_equal(store.read("v_def"), arrays["def"])
    assert store.find("ghi") is None
    with pytest.raises(StaleError, match=f"^features of video 'ghi' are missing in {store.path}$"):
        store.read("ghi")


@pytest.mark.parametrize("form", FORMS)
def test_double_precision_becomes_single(tmp_path: Path, form: str) -> None:
    store = open_features(write_features(tmp_path, form, some_features(np.float64)))
    assert store.read("clip_0").dtype == np.float32
    np.testing.assert_array_equal(store.read("clip_0"), some_features(np.float64)["clip_0"].astype(np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_foreign_byte_order_is_read(tmp_path: Path, form: str) -> None:
    store = open_features(write_features(tmp_path, form, some_features(">f4")))
    assert store.read("clip_1").dtype == np.float32  # of this machine's order: torch takes no other
    np.testing.assert_array_equal(store.read("clip_1"), some_features()["clip_1"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS)
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, form: str, value: float) -> None:
    arrays = some_features()
    arrays["clip_1"][2, 3] = value
    store = open_features(write_features(tmp_path, form, arrays))
    store.read("clip_0")
    where = re.escape(f"features of video 'clip_1' in {store.path}")
    with pytest.raises(StaleError, match=f"^{where}: NaN or infinite values"):
        store.read("clip_1")


@pytest.mark.parametrize("form", ["npy", "hdf5"])
def test_another_width_is_refused(tmp_path: Path, form: str) -> None:
    arrays = {**some_features(), "clip_1": np.zeros((4, WIDTH + 1), np.float32)}
    store = open_features(write_features(tmp_path, form, arrays))
    with pytest.raises(StaleError, match="^features of video 'clip_1' in .*: width 6, but the others are 5 wide$"):
        store.read("clip_1")


# One array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, WIDTH), np.float32), r"shape \(0, 5\)"),
        (np.zeros((4, 0), np.float32), r"shape \(4, 0\)"),
        (np.zeros(WIDTH, np.float32), r"shape \(5,\)"),
        (np.zeros((1, 4, WIDTH), np.float32), r"shape \(1, 4, 5\)"),
        (np.float32(3), r"shape \(\)"),
        (np.zeros((4, WIDTH), np.int64), "type int64; float16 or float32 is expected"),
        (np.zeros((4, WIDTH), complex), "type complex128"),
        (np.full((4, WIDTH), "a"), "type <U1"),
        (np.full((4, WIDTH), 1e300), "NaN or infinite"),  # infinite in float32
    ],
)
def test_unusable_arrays_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(StaleError, match=f"^clip: .*{message}"):
        check_features(array, "clip")


def test_a_single_snippet_is_enough() -> None:
    array = np.ones((1, WIDTH), np.float16)
    assert check_features(array, "clip") is array


# A folder of .npy


def npy_store(folder: Path, content: bytes) -> FeatureStore:
    """A folder with a sound clip and one whose file holds ``content``."""
    path = write_features(folder, "npy", some_features(count=1))
    (path / "clip_1.npy").write_bytes(content)
    return open_features(path)


def npy_bytes(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros((4, WIDTH)))
    return buffer.getvalue()


WHOLE = npy_bytes(np.zeros((4, WIDTH), np.float32))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        WHOLE[:40],
        WHOLE[:-1],
        b"<html>404 not found</html>",
        WHOLE.replace(b"(4, 5), }", b"(4,1e9),}"),
        WHOLE.replace(b"(4, 5), }               ", b"(4, 500000000000000), }"),
        npy_bytes(np.array([[{"a": 1}]], dtype=object), allow_pickle=True),
        npz_bytes(),
    ],
    ids=["empty", "cut header", "cut data", "web page", "bad header", "huge header", "pickled objects", "npz"],
)
def test_damaged_npy_files_are_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(StaleError, match=f"{tmp_path}/npy") as caught:
        npy_store(tmp_path, content).read("clip_1")
    assert "clip_1" in str(caught.value)


@given(st.binary(max_size=8), st.integers(0, len(WHOLE)), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_no_damage_to_an_npy_file_crashes(
    tmp_path_factory: pytest.TempPathFactory, patch: bytes, place: int, cut: int
) -> None:
    store = npy_store(tmp_path_factory.mktemp("damage"), (WHOLE[:place] + patch + WHOLE[place + len(patch) :])[cut:])
    try:
        array = store.read("clip_1")
    except StaleError:
        return
    assert array.ndim == 2
    assert array.shape[1] == WIDTH
    assert np.isfinite(array).all()


def test_pickled_objects_are_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    store = npy_store(tmp_path, npy_bytes(np.array([[Bomb()]], dtype=object), allow_pickle=True))
    with pytest.raises(StaleError, match="clip_1"):
        store.read("clip_1")
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_npy_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(StaleError, match=f"^features folder {tmp_path} holds no .npy file$"):
        open_features(tmp_path)


def test_the_file_system_s_own_files_are_no_videos(tmp_path: Path) -> None:
    path = write_features(tmp_path, "npy", some_features(count=1))
    (path / "._clip_0.npy").write_bytes(b"\x00\x05\x16\x07")
    assert set(open_features(path).ids) == {"clip_0"}


# HDF5


def hdf5(path: Path, **items: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.update(items)
    return path


BLOCK = np.zeros((2, 4, WIDTH), np.float32)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({}, "no dataset a video and no packed 'features' with 'ids'"),
        ({"clip": np.zeros(3)}, r"dataset 'clip' has shape \(3,\), not \(snippets, width\)"),
        ({"features": BLOCK, "ids": ["a"]}, "'features' must be videos × T × width with one of 'ids' a video"),
        ({"features": BLOCK[0], "ids": ["a", "b", "c", "d"]}, "'features' must be videos × T × width"),
        ({"features": BLOCK, "ids": "ab"}, "'features' must be videos × T × width"),
        ({"features": BLOCK, "ids": [["a"], ["b"]]}, "'features' must be videos × T × width"),
        ({"features": BLOCK, "ids": [1, 2]}, "'ids' must be the videos' ids as text, not int64"),
        ({"features": BLOCK, "ids": ["a", "a"]}, "'ids' names a video twice"),
    ],
)
def test_hdf5_of_another_layout_is_refused(tmp_path: Path, items: dict, message: str) -> None:
    path = hdf5(tmp_path / "a.h5", **items)
    with pytest.raises(StaleError, match=f"^features {path}: {message}"):
        open_features(path)


def test_groups_in_the_place_of_packed_arrays_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("features")
        file["ids"] = ["a"]
    with pytest.raises(StaleError, match="'features' must be videos × T × width"):
        open_features(tmp_path / "a.h5")


def test_ids_of_fixed_length_are_read(tmp_path: Path) -> None:
    store = open_features(hdf5(tmp_path / "a.h5", features=BLOCK, ids=np.array([b"clip", b"v_b"])))
    assert set(store.ids) == {"clip", "v_b"}


def test_a_file_that_is_no_hdf5_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"not at all")
    with pytest.raises(StaleError, match=f"^features {path}: not an HDF5 file or damaged"):
        open_features(path)


def test_a_truncated_hdf5_is_named(tmp_path: Path) -> None:
    path = write_features(tmp_path, "hdf5", some_features())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StaleError, match=f"^features {path}: not an HDF5 file or damaged"):
        open_features(path)


@pytest.mark.parametrize("form", ["hdf5", "packed"])
def test_damaged_hdf5_data_is_named_with_its_video(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.h5"
    array = np.random.default_rng(0).standard_normal((2, 50, WIDTH)).astype(np.float32)
    with h5py.File(path, "w") as file:
        name, part = ("features", array) if form == "packed" else ("clip_1", array[1])
        data = file.create_dataset(name, data=part, chunks=part.shape, compression="gzip")
        place = data.id.get_chunk_info(0)
        if form == "packed":
            file["ids"] = ["clip_0", "clip_1"]
    content = bytearray(path.read_bytes())
    content[place.byte_offset + 20 : place.byte_offset + 220] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(StaleError, match=f"^features {path}: video 'clip_1' cannot be read"):
        open_features(path).read("clip_1")


def test_a_missing_path_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match=f"^features not found: {tmp_path}/none; set data.features"):
        open_features(tmp_path / "none")


# The real ones


@needs_shared
def test_the_thumos14_caption_features_cover_every_video(thumos14: dict[str, Video]) -> None:
    store = open_features(SHARED / "data" / "thumos14_captions" / "features.h5")
    assert (len(store.ids), store.width) == (412, 384)
    assert all(store.find(name) == name for name in thumos14)
    features = store.read("video_test_0000004")
    assert features.dtype == np.float16
    assert len(features) == pytest.approx(2 * thumos14["video_test_0000004"].duration, abs=2)  # 2 a second
    assert np.linalg.norm(features.astype(np.float32), axis=1).mean() == pytest.approx(1, abs=0.05)
