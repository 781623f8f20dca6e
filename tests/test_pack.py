"""Packing features into one block, and the report of what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from scripts import pack_features as command
from stale.data import pack as packing
from stale.data.annotations import Video
from stale.data.dataset import rescale
from stale.data.features import open_features
from stale.data.pack import pack
from stale.data.tower import Tower
from stale.errors import StaleError
from stale.files import write_json

WIDTH, T = 6, 8


def write_folder(folder: Path, arrays: dict[str, np.ndarray], **attributes: object) -> Path:
    """A folder of .npy, each with ``attributes`` recorded."""
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        if attributes:
            write_json(folder / f"{name}.json", attributes)
    return folder


def some(snippets: int = 20, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((snippets, width)).astype(np.float32)


def annotated(**durations: float) -> dict[str, Video]:
    return {name: Video(name, "test", duration, ()) for name, duration in durations.items()}


def problems(report: packing.PackReport) -> dict[str, str]:
    return {video: kind for video, kind, _ in report.problems}


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("form", ["npy", "hdf5"])
def test_a_packed_block_reads_as_the_rescaled_features(tmp_path: Path, form: str, precision: str) -> None:
    arrays = {"a": some(20), "b": some(3, 1), "c": some(1, 2)}
    if form == "npy":
        source = write_folder(tmp_path / "f", arrays)
    else:
        source = tmp_path / "f.h5"
        with h5py.File(source, "w") as file:
            file.update(arrays)
    report = pack(open_features(source), tmp_path / "packed.h5", T, precision)
    assert not report.problems
    assert report.shape == (3, T, WIDTH)
    store = open_features(tmp_path / "packed.h5")
    for name, array in arrays.items():
        packed = store.read(name)
        assert packed.dtype == precision
        expected = rescale(torch.from_numpy(array), T).numpy()
        np.testing.assert_allclose(packed, expected, atol=2e-3 if precision == "float16" else 0)


def test_every_kind_of_problem_is_told_by_its_video(tmp_path: Path) -> None:
    spoilt = some()
    spoilt[3, 2] = np.nan
    arrays = {
        "all_nan": np.full((20, WIDTH), np.nan, np.float32),
        "good": some(),
        "constant": np.ones((20, WIDTH), np.float32),
        "flat": some()[0],
        "large": some() * 1e6,
        "long": some(90),
        "nan": spoilt,
        "wide": some(width=WIDTH + 1),
    }
    store = open_features(write_folder(tmp_path / "f", arrays))
    videos = annotated(**dict.fromkeys([*arrays, "nowhere"], 4.0))
    report = pack(store, tmp_path / "packed.h5", T, "float16", videos, fps=5)
    assert problems(report) == {
        "all_nan": packing.UNUSABLE,
        "constant": packing.CONSTANT,
        "flat": packing.UNUSABLE,
        "large": packing.TOO_LARGE,
        "long": packing.MISFIT,
        "nan": packing.UNUSABLE,
        "nowhere": packing.MISSING,
        "wide": packing.UNUSABLE,
    }
    assert sorted(report.left_out) == ["all_nan", "constant", "flat", "large", "nan", "nowhere", "wide"]
    assert set(open_features(tmp_path / "packed.h5").ids) == {"good", "long"}
    text = "\n".join(report.lines())
    for words in ("NaN", "width 7", "20 equal snippets", "18.0 s of features, 4.0 s annotated", "left out: nowhere"):
        assert words in text


def test_only_annotated_videos_are_packed_in_their_order(tmp_path: Path) -> None:
    store = open_features(write_folder(tmp_path / "f", {"a": some(), "b": some(), "v_c": some()}))
    pack(store, tmp_path / "p.h5", T, videos=annotated(c=4.0, a=4.0), fps=5)
    with h5py.File(tmp_path / "p.h5") as file:
        assert list(file["ids"].asstr()) == ["c", "a"]


def test_the_tower_travels_into_the_block_where_all_share_it(tmp_path: Path) -> None:
    record = {"fps": 5, "duration": 4.0, "backbone": "ViT-B/16", "weights_sha256": "ab"}
    store = open_features(write_folder(tmp_path / "f", {"a": some(), "b": some()}, **record))
    pack(store, tmp_path / "p.h5", T)
    assert open_features(tmp_path / "p.h5").tower() == Tower("ViT-B/16", "ab")
    write_json(tmp_path / "f/b.json", {**record, "weights_sha256": "cd"})
    pack(store, tmp_path / "p.h5", T)
    assert open_features(tmp_path / "p.h5").tower() == Tower("ViT-B/16", "")


def test_a_recorded_duration_is_compared_without_a_rate(tmp_path: Path) -> None:
    store = open_features(write_folder(tmp_path / "f", {"a": some()}, fps=5, duration=9.0))
    report = pack(store, tmp_path / "p.h5", T, videos=annotated(a=4.0))
    assert problems(report) == {"a": packing.MISFIT}
    unknown = open_features(write_folder(tmp_path / "g", {"a": some()}))
    assert problems(pack(unknown, tmp_path / "p.h5", T, videos=annotated(a=4.0))) == {"a": packing.RATE_UNKNOWN}


def test_a_rate_that_is_none_is_reported(tmp_path: Path) -> None:
    store = open_features(write_folder(tmp_path / "f", {"a": some()}, fps="fast"))
    report = pack(store, tmp_path / "p.h5", T, videos=annotated(a=4.0))
    assert problems(report) == {"a": packing.RATE_UNKNOWN}
    assert "'fps' is recorded as 'fast'" in report.lines()[1]


def test_the_block_can_be_read_where_it_lies(tmp_path: Path) -> None:
    """Whatever was left out between."""
    arrays = {"a": some(), "constant": np.ones((20, WIDTH), np.float32), "b": some(seed=1), "Ätna": some(seed=2)}
    pack(open_features(write_folder(tmp_path / "f", arrays)), tmp_path / "p.h5", T)
    store = open_features(tmp_path / "p.h5")
    assert set(store.ids) == {"a", "b", "Ätna"}
    rows = store.map_rows(["b", "Ätna", "a"], T)
    found = np.empty(rows.shape, rows.dtype)
    rows.read(np.arange(3), found)
    for row, name in enumerate(["b", "Ätna", "a"]):
        np.testing.assert_array_equal(found[row], store.read(name))
    with h5py.File(tmp_path / "p.h5") as file:
        assert h5py.check_string_dtype(file["ids"].dtype).length == len("Ätna".encode())


def test_nothing_usable_is_an_error_that_leaves_no_file(tmp_path: Path) -> None:
    store = open_features(write_folder(tmp_path / "f", {"a": np.ones((5, WIDTH), np.float32)}))
    with pytest.raises(StaleError, match="nothing to pack.*equal snippets"):
        pack(store, tmp_path / "p.h5", T)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_the_command_reports_and_exits_by_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path / "f", {"a": some(), "b": some()})
    database = {name: {"subset": "Test", "duration": 4.0, "annotations": []} for name in ("a", "b", "c")}
    write_json(tmp_path / "annotations.json", {"database": database})
    arguments = [str(folder), str(tmp_path / "p.h5"), "--snippets", "8", "--fps", "5"]
    command.main([*arguments, "--full"])
    assert "2 videos x 8 snippets x 6, float32" in capsys.readouterr().out
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--annotations", str(tmp_path / "annotations.json"), "--report", str(report)])
    assert stop.value.code == 1
    assert "1 missing, left out: c" in capsys.readouterr().out
    assert json.loads(report.read_text())["problems"] == [{"video": "c", "kind": "missing", "detail": ""}]


@pytest.mark.parametrize("bad", [["--snippets", "1"], ["--fps", "0"], ["--subset", "test"]])
def test_impossible_options_are_refused(tmp_path: Path, bad: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        command.parse_arguments(["f", "p.h5", *bad])
    assert stop.value.code == 2
    assert "--" in capsys.readouterr().err
