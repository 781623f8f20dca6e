"""Constants and fixtures that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from stale.data.annotations import Video, read_annotations
from stale.run import RunFolder

REPOSITORY = Path(__file__).resolve().parents[1]
# Reference data beside the checkout; the tests that use it skip where it is absent.
SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no reference data beside the checkout")


@pytest.fixture(scope="session")
def activitynet() -> dict[str, Video]:
    """The complete ActivityNet-1.3 annotations, as written."""
    return _reference_annotations("activity_net.v1-3.json")


@pytest.fixture(scope="session")
def thumos14() -> dict[str, Video]:
    """The complete THUMOS14 annotations, as written."""
    return _reference_annotations("thumos14.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny data set."""
    from tiny import make_data_set

    return make_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of an epoch on it, with detections."""
    from tiny import tiny_config

    from stale.detection.inference import infer
    from stale.training.trainer import train

    finished = train(tiny_config(data, "train.epochs=1"), tmp_path_factory.mktemp("runs") / "run")
    infer(finished)
    return finished


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained in a second whose weights hold both of CLIP's towers."""
    from stale.training.trainer import train
    from tests.clips import make_clip_data_set
    from tests.tiny import tiny_config

    folder = tmp_path_factory.mktemp("clip_run")
    return train(tiny_config(make_clip_data_set(folder / "data"), "train.epochs=1"), folder / "run").path


def _reference_annotations(name: str) -> dict[str, Video]:
    if not SHARED.is_dir():
        pytest.skip("no reference data beside the checkout")
    return read_annotations(SHARED / "data" / "annotations" / name)
