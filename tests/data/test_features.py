"""Features in their forms and precisions, and everything that can be wrong with them."""

import fcntl
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from data_preparation.pack import pack, write_packed
from stale.config import DataConfig
from stale.data.annotations import Video
from stale.data.features import (
    FeatureStore,
    check_features,
    duration_mismatch,
    open_features,
    recorded_rate,
    spread_windows,
)
from stale.data.selection import open_all_features
from stale.errors import StaleError
from stale.io import write_json
from tests.helpers import write_folder

FORMS = ("npy", "hdf5", "packed")
WIDTH = 5


def some_features(dtype: Any = np.float32, count: int = 3, snippets: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"clip_{i}": rng.standard_normal((snippets, WIDTH)).astype(dtype) for i in range(count)}


def write_features(folder: Path, form: str, arrays: dict[str, np.ndarray]) -> Path:
    """Write ``arrays`` in one of the forms."""
    path = folder / form
    if form == "npy":
        write_folder(path, arrays)
    elif form == "packed":
        array = next(iter(arrays.values()))
        videos = [(name, {}, array) for name, array in arrays.items()]
        write_packed(path, videos, width=array.shape[1], precision=array.dtype.str, notes={})
    else:
        with h5py.File(path, "w") as file:
            file.update(arrays)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_back_what_was_written(tmp_path: Path, form: str, dtype: Any) -> None:
    arrays = some_features(dtype)
    store = open_features(write_features(tmp_path, form, arrays))
    assert set(store.ids) == set(arrays)
    assert store.width == WIDTH
    expected = np.float16 if dtype is np.float16 else np.float32  # of this machine's byte order: torch takes no other
    for name, array in arrays.items():
        loaded = store.read(name)
        assert loaded.dtype == expected
        np.testing.assert_array_equal(loaded, array.astype(expected))
        np.testing.assert_array_equal(store.read(f"v_{name}"), loaded)
    with pytest.raises(StaleError, match=f"^features of video 'other' are missing in {store.path}$"):
        store.read("other")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, WIDTH), np.float32), r"shape \(0, 5\)"),
        (np.zeros((4, 0), np.float32), r"shape \(4, 0\)"),
        (np.zeros(WIDTH, np.float32), r"shape \(5,\)"),
        (np.zeros((1, 4, WIDTH), np.float32), r"shape \(1, 4, 5\)"),
        (np.float32(3), r"shape \(\)"),
        (np.zeros((4, WIDTH), np.int64), "type int64; float16 or float32 is expected"),
        *(
            (np.full((4, WIDTH), value, kind), "NaN or infinite")
            for value in (np.nan, -np.inf)
            for kind in ("f2", "f4")
        ),
        (np.full((4, WIDTH), 1e300), "NaN or infinite"),  # infinite in float32
        (np.zeros((4, WIDTH), np.float32), "all values are 0"),
    ],
)
def test_unusable_arrays_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(StaleError, match=f"^clip: .*{message}"):
        check_features(array, "clip")


# The record, and the rule for durations


FORTY = {"a": np.ones((40, WIDTH), np.float32)}


@pytest.mark.parametrize(
    ("annotated", "record", "extent"),
    [(10.0, {"fps": fps}, extent) for fps, extent in ((4, ""), (1, "40.0"), (None, ""))]
    + [(10.0, {"duration": seconds}, "") for seconds in (12.9, 7.1)]
    + [(10.0, {"duration": seconds}, str(seconds)) for seconds in (99.0, 13.1, 6.9)]
    + [(100.0, {"duration": seconds}, "") for seconds in (91, 109)]
    + [(100.0, {"duration": seconds}, f"{seconds}.0") for seconds in (89, 111)],
)
def test_the_record_is_compared_with_the_annotated_duration(
    tmp_path: Path, annotated: float, record: dict, extent: str
) -> None:
    """At most 3 s off or, of long videos, 10 %."""
    store = open_features(write_folder(tmp_path / "f", FORTY, **record))
    expected = f"{store.path} ({extent} s, annotated {annotated} s)" if extent else ""
    assert duration_mismatch(store, Video("a", "test", annotated, ())) == expected


@pytest.mark.parametrize("value", ["5", 0, -1, float("nan"), float("inf"), True, [5, 5]], ids=str)
@pytest.mark.parametrize("name", ["fps", "duration"])
def test_a_rate_or_duration_that_is_none_is_named(tmp_path: Path, name: str, value: Any) -> None:
    store = open_features(write_folder(tmp_path / "f", FORTY, **{name: value}))
    with pytest.raises(StaleError, match=f"features of video 'a' in {tmp_path}/f: '{name}' is .*; a number"):
        duration_mismatch(store, Video("a", "test", 10.0, ()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("seconds", "length"), [(160, 320), (159.5, 319), (176, 320), (150, 320), (250, 500)])
def test_features_are_mapped_by_their_rate(tmp_path: Path, seconds: float, length: int, packed: bool) -> None:
    """A video of 160 s. Its features are cut or filled up to that, unless they are far longer or agree."""
    features = np.arange(2 * seconds, dtype=np.float32)[:, None].repeat(WIDTH, 1)
    store = open_features(write_folder(tmp_path / "f", {"v_a": features}, fps=2.0))
    if packed:
        pack(store, tmp_path / "p", precision="float32")
        store = open_features(tmp_path / "p")
    store.annotate({"a": Video("a", "test", 160.0, ())})
    (fitted,) = store.read_parts("a")
    shared = min(length, len(features))
    assert len(fitted) == length
    np.testing.assert_array_equal(fitted[:shared], features[:shared])
    np.testing.assert_allclose(fitted[shared:], features.mean())


@pytest.mark.parametrize(
    ("recorded", "given", "rate"), [({}, 2, 2), ({"fps": 2}, None, 2), ({"fps": 29.97}, 30, 29.97), ({}, None, None)]
)
def test_a_given_rate_is_compared_with_the_record(recorded: dict, given: float | None, rate: float | None) -> None:
    assert recorded_rate(recorded, "clip", given) == rate
    with pytest.raises(StaleError, match="^clip record 2 snippets a second, not 25: leave out --fps"):
        recorded_rate({"fps": 2}, "clip", 25)
    for fps in (0, np.nan, np.inf, 5e-324):
        with pytest.raises(StaleError, match="^clip: 'fps' is"):
            recorded_rate(recorded, "clip", fps)


def test_a_video_has_not_the_features_of_another(tmp_path: Path) -> None:
    store = open_features(write_folder(tmp_path / "f", {"a": np.ones((4, WIDTH)), "v_b": np.ones((4, WIDTH))}))
    assert (store.find("v_a"), store.find("b")) == ("a", "v_b")
    store.annotate({name: Video(name, "test", 1.0, ()) for name in ("a", "v_a", "b")})
    assert (store.find("v_a"), store.find("a"), store.find("b")) == (None, "a", "v_b")


# A folder of .npy


def npy_bytes(array: np.ndarray, save: Callable = np.save) -> bytes:
    buffer = io.BytesIO()
    save(buffer, array)
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
        npy_bytes(np.zeros((4, WIDTH)), np.savez),
    ],
    ids=["empty", "cut header", "cut data", "web page", "bad header", "huge header", "npz"],
)
def test_damaged_npy_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = write_features(tmp_path, "npy", some_features(count=1))
    (path / "clip_1.npy").write_bytes(content)
    with pytest.raises(StaleError, match=f"{path}/clip_1"):
        open_features(path).read("clip_1")


@pytest.mark.parametrize("form", ["npy", "hdf5"])
def test_a_first_video_of_another_shape_is_named(tmp_path: Path, form: str) -> None:
    path = write_features(tmp_path, form, {"clip": np.zeros(3)})
    with pytest.raises(StaleError, match=f"^features of video 'clip' in {path}: shape .3,., not .snippets, width.$"):
        open_features(path)


def test_a_folder_of_other_files_or_with_a_video_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(StaleError, match=f"^features folder {tmp_path} holds no .npy, .npz or .pt file$"):
        open_features(tmp_path)
    path = write_features(tmp_path, "npy", some_features(count=1))
    transposed = write_folder(tmp_path / "transposed", {"a": np.zeros((512, 90)), "b": np.zeros((512, 137))})
    with pytest.raises(StaleError, match=r"\(512, 90\) seems to be width × snippets: transpose the features"):
        open_features(transposed)
    (path / "._clip_0.npy").write_bytes(b"\x00\x05\x16\x07")  # left by macOS
    assert set(open_features(path).ids) == {"clip_0"}
    for folder in ("one", "two"):
        write_folder(tmp_path / "twice" / folder, {"a": np.ones((2, 8), np.float32)})
    with pytest.raises(StaleError, match="video 'a' are twice in .*one/a.npy and .*two/a.npy"):
        open_features(tmp_path / "twice")


# A packed folder


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["videos"].append(index["videos"][0]),
        lambda index: index["videos"][2].update(count=5),
        lambda index: index["videos"][0].update(first=-1),
        lambda index: index["videos"][0].update(count=0),
        lambda index: index["videos"][0].update(first=0.5),
        lambda index: index["videos"][0].pop("id"),
        lambda index: index.pop("videos"),
    ],
)
def test_an_index_that_does_not_fit_is_named(tmp_path: Path, change: Callable[[dict], Any]) -> None:
    path = write_features(tmp_path, "packed", some_features())
    index = json.loads((path / "index.json").read_text())
    change(index)
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StaleError, match=f"^features {path}: index.json does not fit features.npy"):
        open_features(path)


def test_an_incomplete_packed_folder_is_named(tmp_path: Path) -> None:
    path = write_features(tmp_path, "packed", some_features())
    rows = (path / "features.npy").read_bytes()
    (path / "features.npy").write_bytes(rows[:-1])
    with pytest.raises(StaleError, match=f"^features file {path}/features.npy cannot be read"):
        open_features(path)
    (path / "index.json").unlink()
    with pytest.raises(StaleError, match=f"^features {path}: features.npy without index.json; pack the features again"):
        open_features(path)


# HDF5


def test_hdf5_of_another_layout_or_with_data_elsewhere_is_refused(tmp_path: Path) -> None:
    secret = write_features(tmp_path, "hdf5", {"clip": np.ones((4, WIDTH), np.float32)}).rename(tmp_path / "secret.h5")
    layout, path = h5py.VirtualLayout((4, WIDTH), np.float32), tmp_path / "a.h5"
    layout[:] = h5py.VirtualSource(secret, "clip", (4, WIDTH))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("external", (4, WIDTH), np.float32, external=[(str(secret), 0, 80)])
    for name in ("virtual", "external"):
        with pytest.raises(StaleError, match=f"video '{name}' in .* lies outside the file: refused"):
            open_features(path).read(name)
    for items, message in (
        ({}, "no dataset a video"),
        ({"clip": h5py.ExternalLink(secret.name, "/clip")}, "clip lie in other files: refused"),
    ):
        path = write_features(tmp_path, "hdf5", items)
        with pytest.raises(StaleError, match=f"^features {path}: {message}"):
            open_features(path)


def test_a_file_that_is_no_hdf5_or_cut_short_is_named(tmp_path: Path) -> None:
    path = write_features(tmp_path, "hdf5", some_features())
    for content in (path.read_bytes()[:-100], b"not at all"):
        path.write_bytes(content)
        with pytest.raises(StaleError, match=f"^features {path}: not an HDF5 file or damaged"):
            open_features(path)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StaleError, match=f"^features {path}: another program is writing there; wait"):
            open_features(path)
    with pytest.raises(StaleError, match=f"^features not found: {tmp_path}/none; set data.features"):
        open_features(tmp_path / "none")


def test_damaged_hdf5_data_is_named_with_its_video(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    array = np.random.default_rng(0).standard_normal((50, WIDTH)).astype(np.float32)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("clip_1", data=array, chunks=array.shape, compression="gzip")
        chunk = data.id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 20 : chunk.byte_offset + 220] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(StaleError, match=f"^features of video 'clip_1' in {path} cannot be read"):
        open_features(path).read("clip_1")


# Features of others


@pytest.mark.parametrize("form", [".npy", ".npz", ".pt", "hdf5"])
def test_names_shapes_and_folders_of_others(tmp_path: Path, form: str) -> None:
    arrays = {"a": np.ones((1, 5, 8), np.float32), "b": np.full((4, 8, 1, 1), 2, np.float32)}
    for number, (name, array) in enumerate(arrays.items()):
        path = tmp_path / f"part_{number}" / f"v1-{name}_clip{form}"
        path.parent.mkdir()
        if form == "hdf5":
            with h5py.File(tmp_path / "a.h5", "a") as file:
                file[f"v1-{name}_clip"] = array
        elif form == ".pt":
            torch.save(torch.from_numpy(array), path)
        else:
            (np.save if form == ".npy" else np.savez)(path, array)
    store = open_features(tmp_path / "a.h5" if form == "hdf5" else tmp_path, "v1-{id}_clip")
    assert set(store.ids) == {"a", "b"}
    np.testing.assert_array_equal(store.read("a"), arrays["a"][0])
    np.testing.assert_array_equal(store.read("b"), arrays["b"][..., 0, 0])
    with pytest.raises(StaleError, match="no name fits data.id_pattern={id}_x; the first is v1-a_clip"):
        open_features(store.path, "{id}_x")


def test_windows_lie_where_their_centres_are() -> None:
    """Windows of 16 frames every 4, of a ramp over the frames: a snippet's value is the time of its center."""
    stride, window, count = 4, 16, 40
    ramp = (window / 2 + stride * np.arange(count, dtype=np.float32))[:, None]
    frames = window + (count - 1) * stride
    found = spread_windows(ramp, (window / stride - 1) / 2)[:, 0]
    expected = (np.arange(len(found)) + 0.5) * frames / len(found)
    np.testing.assert_allclose(found, expected.clip(ramp[0, 0], ramp[-1, 0]), atol=1e-4)
    assert spread_windows(ramp, 0.0) is ramp and len(spread_windows(ramp[:1], -0.47)) == 1


def test_windows_have_the_frame_rate_over_their_stride(tmp_path: Path) -> None:
    """That of the settings, else of the annotations; a recorded rate comes first."""
    path = write_folder(tmp_path / "f", {name: np.ones((20, WIDTH), np.float32) for name in "ab"})
    write_json(path / "b.json", {"fps": 3})
    videos = {name: Video(name, "test", 10.0, (), fps=16.0) for name in "ab"}

    def store(**settings: float) -> FeatureStore:
        return open_all_features(DataConfig(features=str(path), **settings)).annotate(videos)

    rates = [store(**given).attributes("a") for given in ({}, {"stride": 8}, {"stride": 8, "fps": 40}, {"fps": 4})]
    assert rates == [{}, {"fps": 2.0}, {"fps": 5.0}, {"fps": 4.0}]
    assert store(stride=8, fps=40).attributes("b") == {"fps": 3}
    wide = store(stride=8, window=24)
    assert wide.extents("a") == [11.0], "a window of three strides reaches over both ends by one"
    assert len(wide.read_parts("a")[0]) == 20, "and what lies after the end of the video is cut off"
    mismatch = duration_mismatch(store(stride=8, fps=40), videos["a"])
    assert mismatch == f"{path} (4.0 s, annotated 10.0 s)"
