"""Constants and fixtures that the tests share."""

import logging
import signal
from pathlib import Path
from shutil import copytree

import pytest
import torch

from stale.data.annotations import Video, read_annotations
from stale.run_folder import RunFolder
from stale.video.image_encoder import ImageEncoder
from tests.helpers import SHARED, make_clip_data_set, make_data_set, random_image_encoder_weights, tiny_config

# A shell that runs the tests in the background lets them, and hence their commands, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def activitynet() -> dict[str, Video]:
    """The complete ActivityNet-1.3 annotations, as written."""
    return _reference_annotations("activity_net.v1-3.json")


@pytest.fixture(scope="session")
def thumos14() -> dict[str, Video]:
    """The complete THUMOS14 annotations, as written."""
    return _reference_annotations("thumos14.json")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny data set, which no test changes."""
    return make_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of two epochs on it, with detections of the unseen classes."""
    from stale.api import infer
    from stale.training.trainer import train

    finished = train(tiny_config(data), tmp_path_factory.mktemp("runs") / "run")
    infer(finished)
    return finished


@pytest.fixture(scope="module")
def run(trained: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A copy of it, which the tests of a module may detect in and evaluate."""
    return RunFolder(copytree(trained.path, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained in a second whose weights hold both of CLIP's encoders."""
    from stale.training.trainer import train

    folder = tmp_path_factory.mktemp("clip_run")
    return train(tiny_config(make_clip_data_set(folder / "data"), "train.epochs=1"), folder / "run").path


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("stale"), "propagate", True)  # the commands' log turns it off
    caplog.set_level(logging.INFO, "stale")
    return caplog


@pytest.fixture(scope="session")
def encoder() -> ImageEncoder:
    """A small image encoder with random weights."""
    return ImageEncoder(random_image_encoder_weights(), torch.device("cpu"))


def _reference_annotations(name: str) -> dict[str, Video]:
    if not SHARED.is_dir():
        pytest.skip("no reference data beside the checkout")
    return read_annotations(SHARED / "data" / "annotations" / name)
