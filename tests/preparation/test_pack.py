"""Packing features into a folder, and the report of what is wrong with them."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data_preparation.pack import pack
from scripts import pack_features as command
from stale.data.annotations import Video
from stale.data.dataset import load_features, rescale
from stale.data.features import Backbone, duration_mismatch, open_features
from stale.errors import StaleError
from stale.io import read_json, write_json
from tests.helpers import write_folder

WIDTH, T = 6, 8


def some(snippets: int = 20, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((snippets, width)).astype(np.float32)


def annotated(**durations: float) -> dict[str, Video]:
    return {name: Video(name, "test", duration, ()) for name, duration in durations.items()}


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("num_snippets", [T, None])
def test_packed_features_are_those_of_the_source(tmp_path: Path, num_snippets: int | None, precision: str) -> None:
    arrays = {"a": some(20), "b": some(3, 1), "Ätna": some(1, 2)}
    source = tmp_path / "f.h5"
    with h5py.File(source, "w") as file:
        file.update(arrays)
    assert pack(open_features(source), tmp_path / "p", num_snippets=num_snippets, precision=precision) == ({}, {})
    store = open_features(tmp_path / "p")
    assert store.rescaled is bool(num_snippets)
    for name, array in arrays.items():
        packed = store.read(name)
        assert packed.dtype == precision
        expected = rescale(torch.from_numpy(array), num_snippets).numpy() if num_snippets else array
        np.testing.assert_array_equal(packed, expected.astype(precision))
    pack(store, tmp_path / "again", precision=precision)
    again = open_features(tmp_path / "again")
    assert (again.rescaled, again.read("b").tolist()) == (store.rescaled, store.read("b").tolist())
    loaded = load_features(list(arrays), store, T)
    expected = load_features(list(arrays), open_features(source), T)
    torch.testing.assert_close(loaded.float(), expected, atol=2e-3 if precision == "float16" else 0, rtol=0)


def test_every_problem_is_reported_with_its_video(tmp_path: Path) -> None:
    damaged = some()
    damaged[3, 2] = np.nan
    arrays = {
        "good": some(),
        "constant": np.ones((20, WIDTH), np.float32),
        "flat": some()[0],
        "large": some() * 1e6,
        "long": some(90),
        "nan": damaged,
        "wide": some(width=WIDTH + 1),
    }
    path = write_folder(tmp_path / "f", {"bad_rate": some(), "recorded": some(), **arrays})
    write_json(path / "bad_rate.json", {"fps": "fast"})
    write_json(path / "recorded.json", {"duration": 9.0})
    videos = annotated(**dict.fromkeys([*arrays, "bad_rate", "recorded", "nowhere"], 4.0))
    left_out, doubtful = pack(open_features(path), tmp_path / "p", videos=videos, fps=5)
    expected = {
        "bad_rate": "'fps' is 'fast'",
        "constant": "20 equal snippets",
        "flat": r"shape \(6,\)",
        "large": "too large for half precision",
        "nan": "NaN",
        "nowhere": "missing",
        "wide": "width 7",
    }
    assert left_out.keys() == expected.keys()
    for video, message in expected.items():
        assert re.search(f"features of video '{video}' .*{message}", left_out[video])
    mismatches = {"recorded": "9.0", "long": "18.0"}
    assert doubtful == {name: f"{path} ({extent} s, annotated 4.0 s)" for name, extent in mismatches.items()}
    assert set(open_features(tmp_path / "p").ids) == {"good", "long", "recorded"}
    _, doubtful = pack(open_features(path), tmp_path / "p", videos=annotated(good=4.0))
    assert doubtful == {"good": "duration not checked, the rate is unknown"}


def test_only_annotated_videos_are_packed_in_their_order(tmp_path: Path) -> None:
    store = open_features(write_folder(tmp_path / "f", {"a": some(), "b": some(), "v_c": some()}))
    pack(store, tmp_path / "p", videos=annotated(c=4.0, a=4.0), fps=5)
    index = read_json(tmp_path / "p/index.json", "index")
    assert index == {
        "snippets": None,
        "videos": [
            {"id": "c", "first": 0, "count": 20, "fps": 5, "duration": 4.0},
            {"id": "a", "first": 20, "count": 20, "fps": 5, "duration": 4.0},
        ],
    }


def test_the_record_is_packed(tmp_path: Path) -> None:
    record = {"fps": 5, "duration": 4.0, "backbone": "ViT-B/16", "weights_sha256": "ab", "sampling": "5 a second"}
    store = open_features(write_folder(tmp_path / "f", {"a": some(), "b": some()}, **record))
    pack(store, tmp_path / "native")
    assert open_features(tmp_path / "native").attributes("a") == record
    pack(store, tmp_path / "p", num_snippets=T)
    packed = open_features(tmp_path / "p")
    assert packed.attributes("a") == {name: value for name, value in record.items() if name != "fps"}
    assert duration_mismatch(packed, annotated(a=4.0)["a"], fps=5) == "", "rescaled features have no rate"
    assert duration_mismatch(packed, annotated(a=9.0)["a"]) == f"{tmp_path / 'p'} (4.0 s, annotated 9.0 s)"
    write_json(tmp_path / "f/b.json", {**record, "weights_sha256": "cd"})
    pack(store, tmp_path / "p", num_snippets=T)
    assert open_features(tmp_path / "p").backbone() == Backbone("ViT-B/16", "")


def test_a_failure_leaves_nothing_or_what_was_there(tmp_path: Path) -> None:
    store = open_features(write_folder(tmp_path / "f", {"a": np.ones((5, WIDTH), np.float32)}))
    with pytest.raises(StaleError, match="nothing to pack.*equal snippets"):
        pack(store, tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    with pytest.raises(StaleError, match="something else is there"):
        pack(store, tmp_path / "f")
    np.save(tmp_path / "f/a.npy", some())
    pack(store, tmp_path / "p")
    np.save(tmp_path / "f/a.npy", np.ones((5, WIDTH), np.float32))
    with pytest.raises(StaleError, match="nothing to pack"):
        pack(store, tmp_path / "p")
    assert open_features(tmp_path / "p").read("a").shape == (20, WIDTH)


def test_the_command_exits_by_what_it_left_out_or_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path / "f", {"a": some(), "b": some()})
    database = {name: {"subset": "Test", "duration": 4.0, "annotations": []} for name in ("a", "b", "c")}
    write_json(tmp_path / "annotations.json", {"database": database})
    arguments = [str(folder), str(tmp_path / "p"), "--snippets", "8", "--fps", "5"]
    command.main([*arguments, "--precision", "float32"])
    assert capsys.readouterr().out == f"{tmp_path / 'p'}: 2 videos, 6 wide, float32\n"
    with pytest.raises(SystemExit, match="^1$"):
        command.main([*arguments, "--annotations", str(tmp_path / "annotations.json"), "--subset", "test"])
    assert f"left out: c: features of video 'c' are missing in {folder}" in capsys.readouterr().out
    for bad in (["--snippets", "1"], ["--subset", "test"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(["f", "p", *bad])
    with pytest.raises(StaleError, match="^--fps: 'fps' is 0.0; a number from 0.00001 to 1000 is expected"):
        command.main(["f", "p", "--fps", "0"])
