"""Untrusted files: every loader meets CASES damaged or malicious ones and raises nothing but StaleError.

Nothing from them is run, leaves its folder, is interpreted by a page or a terminal, or takes memory beyond its size.
"""

import copy
import gzip
import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stale.checkpoint import load_checkpoint
from stale.config import load_config
from stale.data.annotations import Instance, Video, all_labels, in_subset, read_annotations, repair
from stale.data.classes import read_classes
from stale.data.features import duration_mismatch, open_features
from stale.data.splits import load_split, read_class_list
from stale.detection.run import VideoDetections
from stale.detection.writers import OutputFiles, table, write_detections
from stale.errors import StaleError, printable
from stale.evaluation import align, evaluate, ground_truth, read_results
from stale.evaluation.results import read_video_scores
from stale.io import file_name, read_json, write_json
from stale.model.clip import load_text_weights
from stale.model.stale import restore_model
from stale.run_folder import RunFolder
from tests.helpers import random_text_encoder_weights

CASES = 100  # of every loader; less where one takes long
MEGABYTE = 1 << 20

fuzz = settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

EVIL_NAMES = ("../../evil", "/evil", "..", "C:\\evil", "nul\0", "x" * 300, '<img src=x onerror="evil()">', "$\\evil$")
NUMBERS = st.one_of(
    st.integers(-(10**400), 10**400), st.floats(), st.sampled_from([0, -1, 1e308, 2**63, 10**400, float("nan")])
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from([*EVIL_NAMES, "\ud800", "\x1b[2J"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)


def paths_in(value: Any) -> list[tuple]:
    """Where there is something inside a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key in keys for rest in paths_in(value[key]))]


@st.composite
def damaged_json(draw: st.DrawFn, sound: Any) -> bytes:
    """``sound`` with parts replaced by anything, as JSON; sometimes with bytes changed, cut, or packed too."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from(paths_in(value)[1:] or [(None,)]))
        if last is None:
            break
        part = value
        for key in path:
            part = part[key]
        part[last] = draw(VALUES)
    return draw(damaged_bytes(json.dumps(value, default=str).encode()))


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """``sound`` as it is in half of all cases; else overwritten in places, cut, gzipped."""
    content = bytearray(sound)
    if draw(st.booleans()):
        for _ in range(draw(st.integers(0, 3))):
            place, patch = draw(st.integers(0, max(len(content) - 1, 0))), draw(st.binary(min_size=1, max_size=8))
            content[place : place + len(patch)] = patch
        content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    return gzip.compress(bytes(content)) if draw(st.integers(0, 9)) == 0 else bytes(content)


def only_stale_errors(use: Callable[[], Any]) -> None:
    """Run ``use``: it succeeds, or fails in one clear line."""
    try:
        use()
    except StaleError as error:
        line = printable(f"error: {error}")
        assert "\n" not in line
        line.encode()


ENTRY = {"subset": "test", "duration": 10.0, "annotations": [{"segment": [1, 2.5], "label": "Diving", "label_id": 3}]}
ANNOTATIONS = {"version": "1", "database": {"a": ENTRY, "v_b": {**ENTRY, "subset": "training"}}}
DETECTION = {"segment": [0.0, 5.0], "label": "Diving", "score": 0.9}
RESULTS = {"version": "1", "external_data": {}, "protocol": {"dataset": "a"}, "results": {"a": [DETECTION, DETECTION]}}
CONFIGURATION = {
    "data": {"features": ["a", "b"], "holdout": "0.1", "num_snippets": "9"},
    "train": {"epochs": "3", "learning_rate": "1e-4"},
    "detection": {"thresholds": ["0.1"]},
}
TRUTH = ground_truth([Video("a", "test", 10.0, (Instance(0, 5, "Diving"),))], ["Diving"])


def use_annotations(path: Path) -> None:
    videos = read_annotations(path).values()
    truth = ground_truth(in_subset(repair(videos)[0], "test"), None)
    write_json(path.with_name("again.json"), {"labels": all_labels(videos), "truth": truth.videos})
    load_split(all_labels(videos), "50_50", 0)


def use_results(path: Path) -> None:
    found, _ = align(read_results(path), TRUTH)
    with np.errstate(all="ignore"):
        assert 0 <= evaluate(TRUTH, found, [0.5]).average <= 1


def use_features(path: Path) -> None:
    """The array and the record beside it."""
    only_stale_errors(lambda: open_features(path.parent).read("clip"))
    only_stale_errors(lambda: open_features(path.parent).attributes("clip"))
    only_stale_errors(lambda: duration_mismatch(open_features(path.parent), Video("clip", "test", 9.0, ())))


def saved(save: Callable[[Any, Any], Any], content: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, content)
    return buffer.getvalue()


def checkpoint_bytes(**changes: Any) -> bytes:
    content = {"kind": "stale checkpoint", "model": {"a": torch.ones(2)}, "feature_width": 3, "epoch": 1, "best": {}}
    return saved(lambda buffer, value: torch.save(value, buffer), {**content, **changes})


ARRAY = saved(np.save, np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
WEIGHTS = saved(lambda buffer, value: torch.save(value, buffer), random_text_encoder_weights(num_tokens=5, layers=1))
# File → its loader, damaged contents, number of cases.
LOADERS: dict[str, tuple[Callable[[Path], Any], st.SearchStrategy[bytes], int]] = {
    "annotations.json": (use_annotations, damaged_json(ANNOTATIONS), CASES),
    "results.json": (use_results, damaged_json(RESULTS), CASES),
    "scores.json": (
        lambda path: read_video_scores(path, TRUTH),
        damaged_json({"class": ["Diving"], "results": {"a": [1]}}),
        CASES,
    ),
    "split.list": (read_class_list, damaged_bytes("Diving\r\nHigh jump\n\nτ\n".encode()), CASES),
    "classes.txt": (read_classes, damaged_bytes(b"# a comment\nDiving | jump\n"), CASES),
    "config.yaml": (lambda path: load_config([path]), damaged_json(CONFIGURATION), CASES),
    "npy/clip.npy": (use_features, damaged_bytes(ARRAY), CASES),
    "npy/clip.json": (use_features, damaged_json({"fps": 5.0, "duration": 3, "backbone": "ViT-B/16"}), CASES),
    "checkpoint.pt": (load_checkpoint, damaged_bytes(checkpoint_bytes()), CASES // 2),
    "weights.pt": (load_text_weights, damaged_bytes(WEIGHTS), CASES // 4),  # damaged archives go through TorchScript
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", LOADERS)
def test_loaders_raise_nothing_but_stale_errors(tmp_path: Path, name: str) -> None:
    load, damaged, cases = LOADERS[name]
    anything = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace"))
    (tmp_path / "npy").mkdir()
    (tmp_path / "npy" / "clip.npy").write_bytes(ARRAY)

    @settings(fuzz, max_examples=cases)
    @given(content=damaged | anything)
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        only_stale_errors(lambda: load(tmp_path / name))

    check()


def write_bomb(path: Path) -> None:
    """A decompression bomb, or a header that claims as much: hundreds of megabytes or more, in some kilobytes."""
    if path.suffix == ".json":
        path.write_bytes(gzip.compress(b"[" + b" " * (200 * MEGABYTE), compresslevel=1))
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, compression in (("sparse", None), ("compressed", "gzip")):
                options = {"chunks": (1024, 5), "compression": compression}
                file.create_dataset(name, (1 << 30, 5), np.float32, **options)[:1024] = 0
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", checkpoint_bytes())
            archive.writestr("archive/data/0", b"\0" * (100 * MEGABYTE))


@pytest.mark.parametrize(
    ("name", "load", "message", "limit"),
    [
        ("a.json", lambda path: read_json(path, "annotation file"), "refused|cannot be read", 200),
        ("a.h5", lambda path: open_features(path).read("sparse"), "refused|cannot be read", 1),
        ("a.h5", lambda path: open_features(path).read("compressed"), "refused|cannot be read", 1),
        ("c.pt", load_checkpoint, r"c\.pt unpacks from .* refused", 1),
        ("c.pt", load_text_weights, r"c\.pt unpacks from .* refused", 1),
    ],
)
def test_bombs_take_no_memory(tmp_path: Path, name: str, load: Callable, message: str, limit: int) -> None:
    """``limit`` in megabytes of Python and numpy."""
    write_bomb(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(StaleError, match=message):
            load(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] / MEGABYTE < limit
    finally:
        tracemalloc.stop()


NO_TENSORS = ({"a": torch.ones(1).expand(1 << 40)}, {"a": 3}, {3: torch.ones(1)}, {"a": torch.eye(2).to_sparse()})
INCOMPLETE = ({"model": None}, {"feature_width": 10**12}, {"feature_width": -1}, {"epoch": "1"}, {"best": []})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": model}, "no tensor as this project saves them: refused") for model in NO_TENSORS]
    + [(changes, r"incomplete or damaged \({} should be .*\): train again".format(*changes)) for changes in INCOMPLETE],
)
def test_a_checkpoint_with_wrong_content(tmp_path: Path, changes: dict, message: str) -> None:
    (tmp_path / "c.pt").write_bytes(checkpoint_bytes(**changes))
    with pytest.raises(StaleError, match=message):
        load_checkpoint(tmp_path / "c.pt")


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_in_any_file_are_never_run(tmp_path: Path) -> None:
    evil, trace = Evil(tmp_path / "trace"), tmp_path / "trace"
    torch.save({"kind": "stale checkpoint", "model": evil}, tmp_path / "c.pt")
    torch.save({"token_embedding.weight": evil}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(evil))
    (tmp_path / "p.json").write_bytes(pickle.dumps(evil))
    np.save(tmp_path / "q.npy", np.array([[evil]], dtype=object))
    for use in (
        lambda: load_checkpoint(tmp_path / "c.pt"),
        lambda: load_text_weights(tmp_path / "w.pt"),
        lambda: read_results(tmp_path / "p.pkl"),
        lambda: read_json(tmp_path / "p.json", "file"),
        lambda: open_features(tmp_path / "p.pkl"),
        lambda: open_features(tmp_path).read("q"),
    ):
        with pytest.raises(StaleError):
            use()
    assert not trace.exists()


# Names from files


@given(one=st.text(max_size=20), other=st.text(max_size=6))
@fuzz
def test_every_video_id_names_its_own_file_in_the_folder(one: str, other: str) -> None:
    encoded = file_name(one)
    assert (Path("/folder") / f"{encoded}.png").parent == Path("/folder")
    assert not encoded.startswith(".")
    assert "\0" not in encoded
    encoded.encode()
    assert (encoded == file_name(other)) is (one == other)
    for name in ("video_test_0000004", "v_-abc_DEF", "clip one (2)", "Ätna", "a.b"):
        assert file_name(name) == name


def test_a_video_id_reads_no_file_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    for path in ("secret.npy", "features/clip.npy", ".npy", "...npy"):
        np.save(tmp_path / path, np.ones((3, 4), np.float32))
    store = open_features(tmp_path / "features")
    for name in ("../secret", "a/../../secret", "..", "", "."):
        assert store.find(name) is None
        with pytest.raises(StaleError, match="are missing in"):
            store.read(name)


@pytest.mark.parametrize("name", [name for name in EVIL_NAMES if len(name) < 200])
def test_outputs_of_a_hostile_id_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    folder, label = tmp_path / "deep" / "out", f"{name} & <script>evil()</script></script>"
    files = OutputFiles(folder / "all.json", folder / "all.csv", folder, folder)
    video = Video(name, "test", 10.0, (Instance(1, 3, label),))
    found = [{"segment": [1.0, 2.0], "label": label, "score": 0.9}]
    detected = VideoDetections(video, [label], found, np.full((1, 8), 0.5), np.full(8, 0.5), 0.5)
    write_detections([(name, detected)], files, {}, print)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder]
    assert not outside
    assert len(list(folder.iterdir())) == 4


def test_a_terminal_obeys_no_name() -> None:
    evil = "\x1b[2J\x1b]0;evil\x07\n0:00.0 fake line"
    shown = table(evil, [{"segment": [0.0, 1.0], "label": evil, "score": 0.5}])
    assert "\x1b" not in shown
    assert shown.count("\n") == 2
    assert printable("\ud800 é 漢字\t") == "\\ud800 é 漢字\\t"


def test_a_checkpoint_of_another_network_is_refused(run: RunFolder) -> None:
    state = load_checkpoint(run.checkpoint("last"))
    name = next(iter(state["model"]))
    for model in ({}, {name: torch.ones(3)}, {**state["model"], name: torch.ones(3, 4, 5)}, {"other": torch.ones(3)}):
        with pytest.raises(StaleError, match="does not fit this run's configuration"):
            restore_model(run.load_config(), {**state, "model": model})
