"""HDF5 written on a disk that fills up, and read without trust."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from processes import start

from stale.data.features import open_features
from stale.data.hdf5 import as_ids, locate_rows, new_hdf5, read_array, read_ids
from stale.errors import StaleError

NAMES = ["clip", "v_b", "Ätna", "漢字", "x" * 300]


# Writing


def test_a_new_file_holds_what_was_written(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((70, 30, 40))
    with new_hdf5(tmp_path / "a.h5") as file:
        file["array"] = array
        file.create_dataset("packed", data=array, chunks=(7, 30, 40), compression="gzip")
        file["ids"] = as_ids(NAMES)
        file.attrs["of"] = "a test"
        assert not (tmp_path / "a.h5").exists()
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["array"], array)
        np.testing.assert_array_equal(file["packed"], array)
        assert read_ids(file["ids"], "ids") == NAMES
        assert file.attrs["of"] == "a test"
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("old")
    with pytest.raises(KeyError), new_hdf5(tmp_path / "a.h5") as file:
        file["array"] = np.ones(3)
        raise KeyError("something else")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.h5", "old")]


@pytest.mark.parametrize("limit", [5000, 20_000, 75_000, -1500, -1])
def test_a_full_disk_is_one_line(data: Path, tmp_path: Path, limit: int) -> None:
    """Wherever it fills up: libhdf5 itself would print its own account, at the end once more, and may crash.

    Args:
        limit: bytes of any file, what is said on stderr too; below 0: so many too few.
    """
    line = (str(data.parent / "features.h5"), str(tmp_path / "p.h5"), "--snippets", "16")
    if limit < 0:
        whole = start(tmp_path / "errors.txt", "scripts/pack_features.py", *line)
        assert whole.finish() == 0, whole.said()
        limit += (tmp_path / "p.h5").stat().st_size
        (tmp_path / "p.h5").unlink()
    full = start(tmp_path / "errors.txt", "scripts/pack_features.py", *line, largest_file=limit)
    assert full.finish() == 2, full.said()
    said = [text for text in full.said().replace("\r", "\n").splitlines() if text.strip() and "pack:" not in text]
    assert said == [f"error: cannot write {tmp_path / 'p.h5'}: File too large"]
    assert [path.name for path in tmp_path.iterdir()] == ["errors.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stale.data.hdf5._Sink.__init__", full_device)
    with pytest.raises(StaleError, match=r"cannot write .*a\.h5: No space left on device"), new_hdf5(tmp_path / "a.h5"):
        pass
    assert not list(tmp_path.iterdir())


def full_device(sink: Any, path: Path) -> None:
    """A sink that ends in a device that is always full."""
    super(type(sink), sink).__init__("/dev/full", "r+b")
    sink.fault = None


# Reading


def texts_of_any_length(path: Path, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((len(NAMES), 2, 3), np.float32)
        file.create_dataset("ids", data=NAMES, dtype=h5py.string_dtype(), **options)
    return path


@pytest.mark.parametrize("options", [{}, {"chunks": (2,)}, {"maxshape": (None,)}], ids=str)
def test_ids_of_any_length_are_read(tmp_path: Path, options: dict) -> None:
    store = open_features(texts_of_any_length(tmp_path / "a.h5", **options))
    assert list(store.ids) == NAMES


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("address", (3 << 30).to_bytes(4, "little")),  # a length of 3 GB
        ("heap", (1 << 62).to_bytes(8, "little")),  # of the whole heap
        ("first text", bytes(2) + bytes(14)),  # free space of no length, on which libhdf5 stays forever
        ("first text", bytes([9])),  # another number: the text is not there
    ],
)
def test_damaged_ids_take_neither_memory_nor_time(tmp_path: Path, place: str, change: bytes) -> None:
    path = texts_of_any_length(tmp_path / "a.h5")
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        places = {"address": file["ids"].id.get_offset()}
    places["heap"] = content.index(b"GCOL") + 8
    places["first text"] = content.index(b"GCOL") + 16
    content[places[place] : places[place] + len(change)] = change
    path.write_bytes(content)
    tracemalloc.start()
    only_stale_errors(lambda: open_features(path))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def only_stale_errors(use: Callable[[], Any]) -> None:
    with contextlib.suppress(StaleError):
        use()


def test_heaps_that_overlap_are_not_read_again_and_again(tmp_path: Path) -> None:
    """Every id in a heap of its own that claims the rest of the file."""
    count = 2000
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.zeros((count, 1, 1), np.float32)
        file.create_dataset("ids", data=[f"clip {number}" for number in range(count)], dtype=h5py.string_dtype())
        start = file["ids"].id.get_offset()
    content = bytearray((tmp_path / "a.h5").read_bytes())
    fakes = len(content)
    content += (b"GCOL\1" + bytes(3) + (count * 16).to_bytes(8, "little")) * count
    for number in range(count):
        heap = fakes + 16 * number
        content[start + 16 * number + 4 : start + 16 * number + 12] = heap.to_bytes(8, "little")
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(StaleError, match="'ids' cannot be read .no heap of texts at byte .*, or one of more"):
        open_features(tmp_path / "a.h5")


def test_ids_whose_lengths_cannot_be_seen_are_refused(tmp_path: Path) -> None:
    path = texts_of_any_length(tmp_path / "a.h5", chunks=(5,), compression="gzip")
    with pytest.raises(StaleError, match="'ids' are stored in an unusual way: refused; write them as texts of one"):
        open_features(path)


def test_ids_never_written_are_not_made_up(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.zeros((2, 2, 3), np.float32)
        file.create_dataset("ids", (2,), h5py.string_dtype())
    with pytest.raises(StaleError, match="names a video twice"):
        open_features(tmp_path / "a.h5")


def test_a_virtual_dataset_is_not_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["clip"] = np.ones((4, 5), np.float32)
    layout = h5py.VirtualLayout((4, 5), np.float32)
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "clip", (4, 5))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("clip", layout)
    with pytest.raises(StaleError, match="lies outside the file.*refused"):
        open_features(tmp_path / "a.h5").read("clip")


def test_rows_never_written_or_elsewhere_have_no_place(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        chunked = file.create_dataset("chunked", (4, 2, 3), np.float32, chunks=(1, 2, 3))
        chunked[2] = 1
        assert locate_rows(chunked, [2]) is not None
        assert locate_rows(chunked, [1, 2]) is None
        assert locate_rows(file.create_dataset("never", (4, 2, 3), np.float32), [0]) is None
        file["plain"] = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
        places = locate_rows(file["plain"], [3, 1])
    with open(tmp_path / "a.h5", "rb") as raw:
        for row, place in zip([3, 1], places, strict=True):
            raw.seek(place)
            assert np.frombuffer(raw.read(24), np.float32).tolist() == list(range(6 * row, 6 * row + 6))


def test_read_array_names_the_damage(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = np.ones((3, 2))
        assert read_array(file["a"], 1, "a").tolist() == [1, 1]
        with pytest.raises(StaleError, match="^the array cannot be read"):
            read_array(file["a"], 7, "the array")
