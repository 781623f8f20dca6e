"""Class embeddings from a file, in every layout, and a run that has them in place of a text encoder."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import eval
import inference
import stale
from stale.api import infer
from stale.config import TrainConfig, load_config
from stale.data.classes import phrase
from stale.data.embeddings import read_embeddings
from stale.data.features import open_features
from stale.data.selection import open_inputs
from stale.errors import StaleError
from stale.io import read_json, write_json
from stale.model.stale import load_text, training_free_text
from stale.model.text import TextEncoder
from stale.run_folder import RunFolder
from stale.training.trainer import build_optimizer, train
from tests.helpers import SEEN, SHARED, UNSEEN, WIDTH, needs_shared, tiny_config

FILE = ("model.text.weights=nowhere.pt", "train.epochs=1")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def write_table(path: Path, vectors: np.ndarray, names: list[str]) -> Path:
    """``vectors`` (templates, K, C) in the layout of the suffix."""
    rows = {name: vectors[:, row] for row, name in enumerate(names)}
    if path.suffix == ".json":
        write_json(path, {name: part.tolist() for name, part in rows.items()})
    elif path.suffix == ".npz":
        np.savez(path, embeddings=vectors, classes=np.array(names))
    else:
        with h5py.File(path, "w") as file:
            file.update({"embeddings": vectors, "classes": names} if path.suffix == ".hdf5" else rows)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".json", ".h5", ".hdf5"])
def test_every_layout_gives_the_mean_of_unit_vectors(tmp_path: Path, suffix: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 2, 8))
    table = read_embeddings(write_table(tmp_path / f"a{suffix}", vectors, ["HammerThrow", "Baking cookies"]))
    expected = unit(vectors).mean(0)
    np.testing.assert_allclose(table.vectors[table.find(["hammer throw", "Baking  cookies"])], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "no class"),
        ([1.0, 2.0], "name → vector"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "class 'b': a vector 2 wide"),
        *(({"a": value}, "class 'a': a vector of finite") for value in ([], "x", None, [0.0, 0.0], [float("nan")])),
        ({"HighJump": [1.0], "high jump": [2.0]}, "one class under two names: HighJump"),
        ({"embeddings": [[1.0]], "classes": ["a", "b"]}, "shape .1, 1. and 2 classes"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, classes: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(classes))
    with pytest.raises(StaleError, match=f"class embeddings {tmp_path}/a.json.*{message}"):
        read_embeddings(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.npz", "none.npz", "pickle.npz"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "pickle.npz", embeddings=np.array([{}]), classes=["a"])
    with pytest.raises(StaleError, match=f"class embeddings {tmp_path}/{name}"):
        read_embeddings(tmp_path / name)


@needs_shared
def test_published_embeddings_are_loaded() -> None:
    thumos = read_embeddings(SHARED / "data" / "clip" / "thumos14_clip_vitb16_9templates.npz")
    assert thumos.vectors.shape == (20, 512)
    assert thumos.find(["BaseballPitch", "volleyball spiking"]) == [0, 19]
    assert read_embeddings(SHARED / "data" / "clip" / "activitynet200_clip_vitl14.npz").vectors.shape == (200, 768)


@pytest.fixture(scope="module")
def table_file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of the data set's classes and of a further one by its text encoder."""
    config = tiny_config(data, "model.text.prompt=template").model
    encoder = TextEncoder(load_text(config), config.text)
    names = [*SEEN, *UNSEEN, "Yoga"]
    with torch.no_grad():
        vectors = encoder(encoder.tokenize([phrase(name) for name in names])).numpy()
    return write_table(tmp_path_factory.mktemp("table") / "table.npz", vectors[None], names)


@pytest.fixture(scope="module")
def run(data: Path, table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = (*FILE, f"model.text.embeddings={table_file}", "model.text.adapter=linear")
    return train(tiny_config(data, *settings), tmp_path_factory.mktemp("run") / "run")


def test_a_run_detects_and_its_baselines_are_those_of_the_text_encoder(
    data: Path, run: RunFolder, tmp_path: Path
) -> None:
    infer(run)
    frozen = ("model.text.prompt=template", "model.text.encoder=frozen", "train.epochs=1")
    other = train(tiny_config(data, *frozen), tmp_path / "run")
    infer(other)
    for name in ("whole_video", "snippets_all_classes"):
        ours, theirs = (read_json(folder.baselines(name, "unseen"), "")["results"] for folder in (run, other))
        for video, found in ours.items():
            best = [{**item, "score": pytest.approx(item["score"], abs=1e-4)} for item in found[:3]]
            assert best == theirs[video][:3]


def test_the_adapter_starts_at_the_identity_and_learns(run: RunFolder) -> None:
    model = stale.load(run.path).model
    assert model.text.adapter.weight.abs().max() > 0
    text = model.text(model.text.tokenize(list(UNSEEN)))
    assert not torch.equal(text, training_free_text(model, UNSEEN))
    groups = build_optimizer(model, TrainConfig(prompt_learning_rate=0.25, text_learning_rate=0.5)).param_groups
    assert [group["lr"] for group in groups if any(p is model.text.adapter.weight for p in group["params"])] == [0.25]
    fresh = load_text(run.load_config().model)
    assert torch.equal(fresh(fresh.tokenize(list(UNSEEN))), fresh.vectors[fresh.table().find(UNSEEN)])


def test_pseudo_unseen_classes_and_the_same_run_resumed(data: Path, table_file: Path, tmp_path: Path) -> None:
    settings = (*FILE, f"model.text.embeddings={table_file}", "data.setting=seen_cv", "data.cv_setting=75_25")
    run = train(tiny_config(data, *settings), tmp_path / "run")
    infer(train(tiny_config(data, *settings, "train.epochs=2"), run.path, resume=True))
    protocol = read_json(run.detections("unseen"), "")["protocol"]
    assert (len(protocol["classes"]), protocol["setting"], protocol["subset"]) == (2, "seen_cv", "validation")
    assert "3 folds of the seen classes of split 0" in protocol["split_source"]
    eval.main(["--run", str(run.path)])
    assert read_json(run.path / "metrics.json", "metrics")["protocol"]["setting"] == "seen_cv"


def test_own_video_and_own_words_with_a_file(data: Path, run: RunFolder, tmp_path: Path) -> None:
    store = open_features(data.parent / "features.h5")
    np.save(tmp_path / "clip.npy", store.read("video_000"))
    own = write_table(tmp_path / "own.json", np.random.default_rng(0).standard_normal((2, 2, WIDTH)), ["jump", "run"])
    source = ["--features", f"{tmp_path}/clip.npy", "--duration", "30", "--classes-embeddings", str(own)]
    inference.main(["--run", str(run.path), *source, "--output", f"{tmp_path}/o.json"])
    found = read_json(tmp_path / "o.json", "")["results"]["clip"]
    assert {item["label"] for item in found} == {"jump", "run"}
    assert 15 < max(item["segment"][1] for item in found) <= 30
    detector = stale.load(run.path)
    again = detector.detect(store.read("video_000"), len(store.read("video_000")) / 30, embeddings=own)
    assert [item["score"] for item in again] == pytest.approx([item["score"] for item in found])
    assert detector.detect(store.read("video_000"), 2, ["Yoga"]).classes == ["Yoga"], "the run has its file's classes"
    with pytest.raises(StaleError, match="no embedding of 'golfing' .near: golf swing"):
        detector.detect(store.read("video_000"), 2, ["golfing"])
    with pytest.raises(StaleError, match="templates need a text encoder"):
        detector.detect(store.read("video_000"), 2, ["Yoga"], templates=["a {}"])
    with pytest.raises(StaleError, match="2 wide, but the run was trained with text 64 wide"):
        detector.detect(store.read("video_000"), 2, embeddings={"jump": [1.0, 2.0]})


def test_a_run_with_learned_prompts_refuses_a_file(clip_run: Path, table_file: Path) -> None:
    with pytest.raises(StaleError, match="learned prompts or a trained text encoder, which embeddings of a file would"):
        infer(RunFolder(clip_run), embeddings=table_file)


def test_embeddings_of_another_model_than_the_features_are_refused(clip_run: Path, tmp_path: Path) -> None:
    model = {"backbone": "ViT-L/14", "weights_sha256": 64 * "a"}
    np.savez(tmp_path / "a.npz", embeddings=np.ones((8, WIDTH)), classes=[*SEEN, *UNSEEN], **model)
    settings = [f"model.text.embeddings={tmp_path}/a.npz", "model.text.prompt=template", "model.text.encoder=frozen"]
    config = load_config([RunFolder(clip_run).config], settings)
    message = r"a.npz come from ViT-L/14 \(weights aaaaaaaa\), but the features are of ViT width 64.*quick_gelu\)"
    for use in (lambda: infer(RunFolder(clip_run), embeddings=tmp_path / "a.npz"), lambda: open_inputs(config)):
        with pytest.raises(StaleError, match=message):
            use()


@pytest.mark.parametrize(
    ("names", "width", "message"),
    [
        ([*SEEN, "PoleVaults"], WIDTH, r"no embedding of 'GolfSwing'.*'PoleVault' .near: pole vaults\); embed"),
        ([*SEEN, *UNSEEN], 8, "64 wide"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_the_features_are_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], width: int, message: str
) -> None:
    monkeypatch.setattr("stale.data.selection.VideoDataset", None)
    write_table(tmp_path / "a.json", np.ones((1, len(names), width)), names)
    with pytest.raises(StaleError, match=message):
        train(tiny_config(data, *FILE, f"model.text.embeddings={tmp_path}/a.json"), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.text.prompt=learned",), "no text encoder that could be fine-tuned or take learned prompts"),
        (("model.text.encoder=finetune",), "model.text.adapter=linear learns"),
        (("model.text.context_init=a video",), "model.text.context_init is for a prompt"),
    ],
)
def test_settings_of_a_text_encoder_are_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(StaleError, match=message):
        load_config((), ("model.text.embeddings=a.npz", *settings))


def test_a_run_is_tested_on_another_data_set(data: Path, run: RunFolder, table_file: Path, tmp_path: Path) -> None:
    """The other one has a class that was seen under another spelling, and one that no list of this one names."""
    names = {"Diving": "diving", "GolfSwing": "Yoga"}
    text = (data.parent / "annotations.json").read_text()
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    (tmp_path / "other.json").write_text(text)
    settings = {"dataset": "other", "annotations": f"{tmp_path}/other.json", "features": f"{data.parent}/features.h5"}
    write_json(tmp_path / "other.yaml", {"data": settings | {"test_subset": "test", "num_snippets": 50}})
    inference.main(["--run", str(run.path), "--test-config", str(tmp_path / "other.yaml")])
    content = read_json(run.path / "detections_other.json", "")
    assert content["protocol"]["classes"] == ["PoleVault", "Yoga"]
    assert "6 of 8 classes were seen" in content["protocol"]["split_source"]
    assert {item["label"] for found in content["results"].values() for item in found} <= {"PoleVault", "Yoga"}
    assert read_json(run.path / "baselines/snippets_other.json", "")["results"]
    eval.main(["--predictions", str(run.path / "detections_other.json"), "--annotations", f"{tmp_path}/other.json"])
