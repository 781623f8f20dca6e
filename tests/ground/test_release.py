"""Packages of a release: what is packed comes back checked, and any damage to it is an error."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import stale
from scripts import pack_release, prepare_data
from stale.data.features import open_features
from stale.errors import StaleError
from stale.release import MANIFEST, unpack
from stale.run_folder import RunFolder
from tests.helpers import WIDTH


@pytest.fixture(scope="module")
def package(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "package.zip"
    pack_release.main([str(run.path), str(path)])
    return path


def test_a_package_holds_what_its_manifest_says(run: RunFolder, package: Path, tmp_path: Path) -> None:
    prepare_data.main(["captions", "--root", str(tmp_path), "--from", str(package)])
    folder = tmp_path / "package"
    config = RunFolder(folder / "run").load_config()
    assert config.data.features == str(folder / "features.h5")
    assert config.model.text.weights == str(folder / "text_encoder.pt")
    first, second = open_features(run.load_config().data.features), open_features(config.data.features)
    videos = json.loads(zipfile.ZipFile(package).read(MANIFEST))["videos"]
    assert {video["id"]: video["snippets"] for video in videos} == {name: len(first.read(name)) for name in first.ids}
    assert all(np.array_equal(first.read(name), second.read(name)) for name in first.ids)
    shutil.rmtree(folder / "run")  # as if unpacking had been interrupted
    prepare_data.main(["captions", "--root", str(tmp_path), "--from", str(package)])
    (folder / "annotations.json").touch()
    with pytest.raises(StaleError, match="package holds other data"):
        prepare_data.main(["captions", "--root", str(tmp_path), "--from", str(package)])


@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "package", "unpacked run"])
def test_load_takes_a_run_a_checkpoint_and_a_package(run: RunFolder, package: Path, tmp_path: Path, kind: str) -> None:
    unpack(package, tmp_path)
    sources = {"run folder": run.path, "checkpoint": run.checkpoint("best"), "package": package}
    features = np.random.default_rng(0).standard_normal((20, WIDTH)).astype(np.float32)
    model, expected = stale.load(sources.get(kind, tmp_path / "run")), stale.load(run.path)
    assert model.chosen_on == expected.chosen_on
    classes = {"fps": 2.0, "classes": ["Diving", "GolfSwing"]}
    assert model.detect(features, **classes).detections == expected.detect(features, **classes).detections


def change(package: Path, target: Path, name: str, content: bytes) -> Path:
    """A copy of the package in which one file has another content."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(target, "w") as archive:
        for member in {*source.namelist(), name}:
            archive.writestr(member, content if member == name else source.read(member))
    return target


def test_damage_and_foreign_files_are_refused(run: RunFolder, package: Path, tmp_path: Path) -> None:
    manifest = json.loads(zipfile.ZipFile(package).read(MANIFEST))
    foreign = {**manifest, "files": {**manifest["files"], "../evil": "0"}}
    for name, content, message in (
        ("run/split.json", b"{}", "run/split.json is damaged"),
        (MANIFEST, json.dumps(foreign).encode(), "no file of a package: ../evil"),
        (MANIFEST, b"[]", "is damaged"),
    ):
        with pytest.raises(StaleError, match=message):
            unpack(change(package, tmp_path / "other.zip", name, content), tmp_path / "folder")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "folder/run/split.json").exists()
    shutil.copytree(run.path, tmp_path / "half", ignore=shutil.ignore_patterns("best.pt"))
    with pytest.raises(StaleError, match="no .*half/checkpoints/best.pt: train"):
        pack_release.main([str(tmp_path / "half"), str(tmp_path / "p.zip")])
    with pytest.raises(StaleError, match="is not a package"):
        unpack(tmp_path / "absent.zip", tmp_path)
