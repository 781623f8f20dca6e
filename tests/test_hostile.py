"""Files from strangers: every reader meets CASES damaged or malicious ones, and only StaleError comes out.

Nothing from them is run, leaves its folder, reaches a page unescaped, or takes memory that its bytes do not justify.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import UNSEEN, WIDTH, make_data_set, text_tower_weights, tiny_config

import stale
from stale.build import restore_model
from stale.checkpoint import load_checkpoint, save_checkpoint
from stale.config import load_config
from stale.data.annotations import Instance, Video, all_labels, in_subset, read_annotations, repair
from stale.data.dataset import load_features
from stale.data.features import open_features, read_sidecar
from stale.data.hdf5 import as_ids
from stale.data.splits import load_split, read_class_list
from stale.data.vocabulary import read_classes
from stale.detection.explain import VideoDetections
from stale.detection.formats import srt_text, table, vtt_text
from stale.detection.inference import infer
from stale.detection.own import Writing, write_detections
from stale.detection.visualize import visualize
from stale.errors import StaleError, printable
from stale.evaluation import align, evaluate, ground_truth, read_results
from stale.evaluation.browse import browse_page
from stale.evaluation.video_scores import read_video_scores
from stale.files import file_name, read_json, write_json
from stale.model.text import load_text_weights
from stale.run import RunFolder
from stale.training.trainer import train

CASES = 300  # of every reader of text
BINARY_CASES = 150  # of every reader of features and weights
MEGABYTE = 1 << 20

fuzz = settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
fuzz_binary = settings(fuzz, max_examples=BINARY_CASES)

EVIL_NAMES = (
    "../../evil",
    "/evil",
    "..",
    "a/b",
    "C:\\evil",
    "nul\0",
    "x" * 300,
    '<img src=x onerror="evil()">',
    "$\\evil$",
)
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the file of each case."""
    return tmp_path_factory.mktemp("cases")


# Fuzzing


ENTRY = {"subset": "test", "duration": 10.0, "annotations": [{"segment": [1, 2.5], "label": "Diving", "label_id": 3}]}
ANNOTATIONS = {"version": "1", "database": {"a": ENTRY, "v_b": {**ENTRY, "subset": "training"}}}


@given(content=damaged_json(ANNOTATIONS))
@fuzz
def test_annotations(place: Path, content: bytes) -> None:
    (place / "a.json").write_bytes(content)

    def use() -> None:
        videos = read_annotations(place / "a.json").values()
        truth = ground_truth(in_subset(repair(videos)[0], "test"), None)
        write_json(place / "again.json", {"labels": all_labels(videos), "truth": truth.videos})
        load_split(all_labels(videos), "50_50", 0)

    only_stale_errors(use)


DETECTION = {"segment": [0.0, 5.0], "label": "Diving", "score": 0.9}
RESULTS = {"version": "1", "external_data": {}, "protocol": {"dataset": "a"}, "results": {"a": [DETECTION, DETECTION]}}
COLUMNS = {"video-id": ["a", "b"], "t-start": [0, 1], "t-end": [5, 6], "label": [0, "Diving"], "score": [0.9, 0.8]}


HUGE = json.dumps({"results": {"a": [{**DETECTION, "score": 10**400}]}}).encode()  # no float holds it


@given(content=st.one_of(damaged_json(RESULTS), damaged_json(COLUMNS)))
@example(content=HUGE)
@fuzz
def test_detections(place: Path, content: bytes) -> None:
    truth = ground_truth([Video("a", "test", 10.0, (Instance(0, 5, "Diving"),))], ["Diving"])
    (place / "r.json").write_bytes(content)

    def use() -> None:
        found, _ = align(read_results(place / "r.json", lambda: {0: "Diving"}), truth)
        with np.errstate(all="ignore"):
            assert 0 <= evaluate(truth, found, [0.5]).average <= 1

    only_stale_errors(use)


@given(
    content=st.one_of(
        damaged_json({"a": ["Diving", 0.5]}), damaged_json({"classes": ["Diving"], "results": {"a": [1]}})
    )
)
@example(content=json.dumps({"a": ["Diving", 10**400]}).encode())
@example(content=json.dumps({"classes": ["Diving"], "results": {"a": [10**400]}}).encode())
@fuzz
def test_video_scores(place: Path, content: bytes) -> None:
    truth = ground_truth([Video("a", "test", 10.0, (Instance(0, 5, "Diving"),))], ["Diving"])
    (place / "s.json").write_bytes(content)
    only_stale_errors(lambda: read_video_scores(place / "s.json", truth, True))


@given(content=st.one_of(st.binary(max_size=60), damaged_bytes("Diving\r\nHigh jump\n\nτ\n".encode())))
@fuzz
def test_split_lists(place: Path, content: bytes) -> None:
    (place / "s.list").write_bytes(content)
    only_stale_errors(lambda: read_class_list(place / "s.list"))


@given(content=st.one_of(damaged_json(["a", "b | c"]), damaged_json({"a": ["b"], "c": "d"}), st.binary(max_size=40)))
@fuzz
def test_class_files(place: Path, content: bytes) -> None:
    for name in ("c.json", "c.txt"):
        (place / name).write_bytes(content)
        only_stale_errors(lambda name=name: read_classes(place / name))


SECTIONS = {
    "data": {"features": ["a", "b"], "holdout": "0.1", "num_snippets": "9"},
    "train": {"epochs": "3", "learning_rate": "1e-4"},
    "detection": {"thresholds": ["0.1"]},
}


@given(content=st.one_of(damaged_json(SECTIONS), st.text(max_size=60).map(lambda text: text.encode(errors="replace"))))
@fuzz
def test_configurations(place: Path, content: bytes) -> None:
    (place / "c.yaml").write_bytes(content)
    only_stale_errors(lambda: load_config([place / "c.yaml"]))


@given(content=damaged_json({"fps": 5.0, "duration": 3, "backbone": "ViT-B/16"}))
@fuzz
def test_records_of_features(place: Path, content: bytes) -> None:
    folder = place / "npy"
    folder.mkdir(exist_ok=True)
    np.save(folder / "clip.npy", np.ones((3, 4), np.float32))
    (folder / "clip.json").write_bytes(content)
    only_stale_errors(lambda: read_sidecar(folder / "clip.npy"))
    only_stale_errors(lambda: (open_features(folder).attributes("clip"), open_features(folder).extents("clip")))


def hdf5_bytes(**items: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, value in items.items():
            file.create_dataset(name, data=value, compression="gzip" if np.ndim(value) > 1 else None)
    return buffer.getvalue()


FEATURES = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)


def as_packed() -> bytes:
    """What scripts/pack_features.py writes: read where it lies in the file."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("features", data=FEATURES, chunks=(1, 4, 5))
        file["ids"] = as_ids(["a", "b", "c"])
    return buffer.getvalue()


SOUND = {
    "hdf5": hdf5_bytes(a=FEATURES[0], b=FEATURES[1]),
    "compressed block": hdf5_bytes(features=FEATURES, ids=["a", "b", "c"]),
    "packed block": as_packed(),
}


@pytest.mark.parametrize("form", SOUND)
def test_hdf5_features(place: Path, form: str) -> None:
    """In a process of its own: a fault in libhdf5 would end it."""
    script = f"import sys; sys.path[:0] = {[str(REPOSITORY), str(REPOSITORY / 'tests')]!r}\n"
    script += f"import test_hostile; test_hostile.fuzz_hdf5({str(place)!r}, {form!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == f"{BINARY_CASES}\n"


def fuzz_hdf5(place: str, form: str) -> None:
    """BINARY_CASES damaged HDF5 files."""
    sound = SOUND[form]
    rng = np.random.default_rng(0)
    for _ in range(BINARY_CASES):
        content = bytearray(sound)
        for place_ in rng.integers(0, len(content), rng.integers(1, 6)):
            content[place_] = rng.integers(256)
        path = Path(place) / f"{form}.h5"
        path.write_bytes(content[: rng.integers(len(content))] if rng.random() < 0.2 else content)

        def use(path: Path = path) -> None:
            store = open_features(path)
            for video in sorted(store.ids)[:3]:
                assert np.isfinite(store.read(video)).all()
                store.attributes(video)
                store.extents(video)
            store.tower()
            assert load_features(sorted(store.ids)[:3], store, 4).isfinite().all()

        only_stale_errors(use)
    print(BINARY_CASES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A trained run."""
    data = make_data_set(tmp_path_factory.mktemp("data"))
    return train(tiny_config(data, "train.epochs=1"), tmp_path_factory.mktemp("run") / "run")


def checkpoint_bytes(**changes: Any) -> bytes:
    buffer = io.BytesIO()
    content = {"kind": "stale checkpoint", "model": {"a": torch.ones(2)}, "feature_width": 3, "epoch": 1, "best": {}}
    torch.save({**content, **changes}, buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(content=damaged_bytes(checkpoint_bytes()))
@fuzz_binary
def test_checkpoints(place: Path, content: bytes) -> None:
    (place / "c.pt").write_bytes(content)
    only_stale_errors(lambda: load_checkpoint(place / "c.pt"))


def small_weights() -> bytes:
    buffer = io.BytesIO()
    torch.save(text_tower_weights(num_tokens=5, layers=1), buffer)
    return buffer.getvalue()


@given(content=damaged_bytes(small_weights()))
@settings(fuzz_binary, max_examples=BINARY_CASES // 3)  # those that are no archive go through TorchScript, slowly
def test_text_weights(place: Path, content: bytes) -> None:
    (place / "w.pt").write_bytes(content)
    only_stale_errors(lambda: load_text_weights(place / "w.pt"))


# Bombs: refused before they take memory


def peak_megabytes(use: Callable[[], Any]) -> float:
    """Python's and numpy's memory while ``use`` is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(StaleError, match="refused|cannot be read"):
            use()
        return tracemalloc.get_traced_memory()[1] / MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb(tmp_path: Path) -> None:
    """200 kB that would be 200 MB: what is unpacked before it is noticed stays below the harmless size."""
    (tmp_path / "a.json").write_bytes(gzip.compress(b"[" + b" " * (200 * MEGABYTE), compresslevel=1))
    assert peak_megabytes(lambda: read_json(tmp_path / "a.json", "annotation file")) < 200


def test_honest_gzip_is_read(tmp_path: Path) -> None:
    values = [round(value, 3) for value in np.random.default_rng(0).uniform(0, 100, 50_000).tolist()]
    (tmp_path / "a.json").write_bytes(gzip.compress(json.dumps(values).encode()) + gzip.compress(b" \n"))
    assert read_json(tmp_path / "a.json", "file") == values


@pytest.mark.parametrize("shape", ["(500000000000, 5)", "(4, 500000000000)", "(-1, 5)", "(4611686018427387904, 4)"])
def test_an_absurd_npy_header(tmp_path: Path, shape: str) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (4, 5)})
    header = buffer.getvalue().replace(b"(4, 5), }" + b" " * (len(shape) - 6), f"{shape}, }}".encode())
    assert len(header) == len(buffer.getvalue())
    np.save(tmp_path / "a.npy", np.ones((4, 5), np.float32))
    (tmp_path / "clip.npy").write_bytes(header + b"\0" * 80)
    store = open_features(tmp_path)
    assert peak_megabytes(lambda: store.read("clip")) < 1


def test_a_huge_sparse_npy(tmp_path: Path) -> None:
    """The file really is as long as its header says, and takes no room on the disk."""
    np.save(tmp_path / "a.npy", np.ones((4, 5), np.float32))
    sparse = np.lib.format.open_memmap(tmp_path / "clip.npy", "w+", np.float32, (1 << 31, 5))
    del sparse
    assert peak_megabytes(lambda: open_features(tmp_path).read("clip")) < 1


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1 << 40, 5), {"chunks": (1024, 5)}),
        ((1 << 25, 5), {"chunks": (1024, 5), "compression": "gzip"}),
        ((100, 5), {"chunks": (1 << 20, 5), "maxshape": (None, 5)}),
    ],
    ids=["nothing stored", "packed", "one huge chunk"],
)
def test_an_absurd_hdf5_dataset(tmp_path: Path, shape: tuple, options: dict) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("clip", shape, np.float32, **options)
        if options.get("chunks") == (1024, 5):
            data[:1024] = 0
    store = open_features(tmp_path / "a.h5")
    if options.get("maxshape"):  # 20 MB: harmless
        assert store.read("clip").shape == shape
    else:
        assert peak_megabytes(lambda: store.read("clip")) < 1


def test_hdf5_that_reads_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 80)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("clip", (4, 5), np.float32, external=[(str(tmp_path / "secret"), 0, 80)])
    with pytest.raises(StaleError, match="lies outside the file, in .*secret.*refused"):
        open_features(tmp_path / "a.h5").read("clip")


def test_a_checkpoint_that_unpacks_to_more(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", checkpoint_bytes())
        archive.writestr("archive/data/0", b"\0" * (100 * MEGABYTE))
    for read in (load_checkpoint, load_text_weights):
        with pytest.raises(StaleError, match=r"c\.pt unpacks from .* refused"):
            read(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "model", [{"a": torch.ones(1).expand(1 << 40)}, {"a": 3}, {3: torch.ones(1)}, {"a": torch.eye(2).to_sparse()}]
)
def test_a_checkpoint_of_no_plain_tensors(tmp_path: Path, model: dict) -> None:
    (tmp_path / "c.pt").write_bytes(checkpoint_bytes(model=model))
    with pytest.raises(StaleError, match="no tensor as this project saves them: refused"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "changes",
    [{"model": None}, {"feature_width": 10**12}, {"feature_width": -1}, {"epoch": "1"}, {"best": []}],
    ids=str,
)
def test_an_incomplete_checkpoint(tmp_path: Path, changes: dict) -> None:
    (tmp_path / "c.pt").write_bytes(checkpoint_bytes(**changes))
    with pytest.raises(StaleError, match=rf"c\.pt is incomplete or damaged \({next(iter(changes))}\): train again"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "text", ["a: &a [x]\nb: [*a, *a]", "a: &a {b: c}\ntrain: *a", "data: {features: &f x, splits: *f}"]
)
def test_yaml_aliases(tmp_path: Path, text: str) -> None:
    levels = ["l0: &l0 [x, x]"] + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    for content in (text, "\n".join(levels)):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(StaleError, match="aliases.*are not read here"):
            load_config([tmp_path / "c.yaml"])


@pytest.mark.parametrize("text", ["[" * 50_000, "{a: " * 50_000, "- " * 50_000])
def test_yaml_without_bottom(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(StaleError, match="not valid YAML"):
        load_config([tmp_path / "c.yaml"])


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{annotations: !!python/object/apply:os.mkdir ['{tmp_path}/evil']}}")
    only_stale_errors(lambda: load_config([tmp_path / "c.yaml"]))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "setting", ["data.num_snippets", "train.epochs", "model.localizer.hidden", "detection.candidates"]
)
def test_an_absurd_setting(setting: str) -> None:
    with pytest.raises(StaleError, match="the most is 1000000"):
        load_config([], [f"{setting}=1000000000000"])


# No pickle


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_in_any_file_are_never_run(tmp_path: Path, run: RunFolder) -> None:
    evil, trace = Evil(tmp_path / "trace"), tmp_path / "trace"
    torch.save({"kind": "stale checkpoint", "model": evil}, tmp_path / "c.pt")
    torch.save({"token_embedding.weight": evil}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(evil))
    (tmp_path / "p.json").write_bytes(pickle.dumps(evil))
    for use in (
        lambda: load_checkpoint(tmp_path / "c.pt"),
        lambda: infer(run, str(tmp_path / "c.pt")),
        lambda: load_text_weights(tmp_path / "c.pt"),
        lambda: load_text_weights(tmp_path / "w.pt"),
        lambda: load_checkpoint(tmp_path / "p.pkl"),
        lambda: read_results(tmp_path / "p.pkl"),
        lambda: read_json(tmp_path / "p.json", "file"),
        lambda: open_features(tmp_path / "p.pkl"),
    ):
        with pytest.raises(StaleError):
            use()
    assert not trace.exists()


def test_no_source_file_opens_pickles_or_runs_text() -> None:
    forbidden = re.compile(
        r"import pickle|allow_pickle=True|weights_only=False|yaml\.(full_|unsafe_)?load\(\w+\)"
        r"|(?<![.\w])(eval|exec)\(|shell=True|torch\.load\((?!.*weights_only=True)"
    )
    sources = [*(REPOSITORY / "stale").rglob("*.py"), *(REPOSITORY / "scripts").glob("*.py"), *REPOSITORY.glob("*.py")]
    found = [
        f"{path.relative_to(REPOSITORY)}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if forbidden.search(line) or ("yaml.load(" in line and "_Loader" not in line)
    ]
    assert not found


# Names from files


def hostile_video(name: str) -> VideoDetections:
    label = f"{name} & <script>evil()</script></script>"
    video = Video(name, "test", 10.0, (Instance(1, 3, label),))
    found = [{"segment": [1.0, 2.0], "label": label, "score": 0.9}]
    return VideoDetections(video, [label], found, np.full((1, 8), 0.5), np.full(8, 0.5), 0.5)


@given(name=st.text(max_size=20))
@fuzz
def test_a_video_id_names_a_file_in_its_folder(name: str) -> None:
    spelt = file_name(name)
    assert (Path("/folder") / f"{spelt}.png").parent == Path("/folder")
    assert not spelt.startswith(".")
    assert "\0" not in spelt
    spelt.encode()


@given(one=st.text(max_size=6), other=st.text(max_size=6))
@fuzz
def test_two_videos_never_share_a_file(one: str, other: str) -> None:
    assert (file_name(one) == file_name(other)) is (one == other)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "..", "", "."])
def test_a_video_id_reads_no_file_outside_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "features").mkdir()
    for path in ("secret.npy", "features/clip.npy", ".npy", "...npy"):
        np.save(tmp_path / path, np.ones((3, 4), np.float32))
    store = open_features(tmp_path / "features")
    assert store.find(name) is None
    with pytest.raises(StaleError, match="are missing in"):
        store.read(name)


def test_usual_ids_are_their_files_names() -> None:
    for name in ("video_test_0000004", "v_-abc_DEF", "clip one (2)", "Ätna", "a.b"):
        assert file_name(name) == name


@pytest.mark.parametrize("name", [name for name in EVIL_NAMES if len(name) < 200])
def test_outputs_of_a_hostile_id_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "out"
    writing = Writing(folder / "all.json", folder / "all.csv", folder, folder)
    write_detections([(name, hostile_video(name))], writing, False, {}, lambda text: None)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder]
    assert not outside
    assert len(list(folder.iterdir())) == 4


def test_pictures_of_a_hostile_id_stay_in_their_folder(run: RunFolder, tmp_path: Path) -> None:
    """Ids of annotations and features alike, through the whole of scripts/visualize.py."""
    content = read_json(run.load_config().data.annotations, "annotations")
    ids = [name for name, entry in content["database"].items() if entry["subset"] == "Test"]
    ids = [name for name in ids if any(item["label"] in UNSEEN for item in content["database"][name]["annotations"])]
    evil = "../../../evil"
    content["database"] = {evil if name == ids[0] else name: entry for name, entry in content["database"].items()}
    write_json(tmp_path / "annotations.json", content)
    with h5py.File(run.load_config().data.features) as file, h5py.File(tmp_path / "packed.h5", "w") as packed:
        packed["features"] = np.stack([file[name][:16] for name in file])
        packed["ids"] = [evil if name == ids[0] else name for name in file]
    config = run.load_config()
    config.data.annotations, config.data.features = str(tmp_path / "annotations.json"), str(tmp_path / "packed.h5")
    detector = stale.load(run.path)
    detector.config = config
    folder = tmp_path / "a" / "b" / "c" / "pictures"
    visualize(detector, folder)
    assert not list(tmp_path.rglob("evil*"))
    assert (folder / "%2E.%2F..%2F..%2Fevil.png").is_file()


@pytest.mark.filterwarnings("ignore:Glyph 0")
@pytest.mark.parametrize("name", EVIL_NAMES)
def test_hostile_names_are_text_on_pages_in_pictures_and_subtitles(tmp_path: Path, name: str) -> None:
    seen = hostile_video(name)
    page = browse_page(name, name, [seen], [0.5])
    assert "<script>evil" not in page
    assert "<img src=x" not in page
    stale.plot(seen, tmp_path / "a.png", title=name)
    assert "<script>" not in vtt_text(seen.detections)
    assert not re.search("<(?!\u2060)", srt_text(seen.detections))


def test_a_terminal_obeys_no_name() -> None:
    evil = "\x1b[2J\x1b]0;evil\x07\n0:00.0 fake line"
    shown = table(evil, [{"segment": [0.0, 1.0], "label": evil, "score": 0.5}])
    assert "\x1b" not in shown
    assert shown.count("\n") == 2
    assert printable("\ud800 é 漢字\t") == "\\ud800 é 漢字\\t"


def test_a_checkpoint_of_another_network_is_refused(run: RunFolder) -> None:
    state = load_checkpoint(run.checkpoint("last"))
    for model in ({}, {"text.tower.token_embedding": torch.ones(3)}, {"text.tower.text_projection": torch.ones(3, 4)}):
        with pytest.raises(StaleError, match="does not fit this run's configuration"):
            restore_model(run.load_config(), {**state, "model": model})
    with pytest.raises(StaleError, match=f"features are {WIDTH + 1} wide but the text tower's embedding is {WIDTH}"):
        restore_model(run.load_config(), {**state, "feature_width": WIDTH + 1})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """The limits are none to honest checkpoints: views, halves, empty and shared tensors."""
    weights = torch.arange(12.0).view(3, 4)
    model = {
        "view": weights[:, 1],
        "half": weights.half(),
        "empty": torch.empty(0),
        "same": weights,
        "scalar": torch.tensor(1),
    }
    save_checkpoint(tmp_path / "c.pt", {"model": model, "feature_width": 4, "epoch": 1, "best": {}})
    loaded = load_checkpoint(tmp_path / "c.pt")["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())
