"""Numbers stay finite in every precision on extreme features, and the same seed gives the same ones."""

import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stale.api import infer
from stale.checkpoint import load_checkpoint
from stale.io import read_json
from stale.model.stale import restore_model
from stale.run_folder import RunFolder
from stale.training.trainer import train
from tests.helpers import SEEN, UNSEEN, assert_same_runs, history, on_a_gpu, tiny_config

PRECISIONS = ("float32", "bfloat16", "float16")
LARGEST = float(np.finfo(np.float16).max)


def one_outlier(array: np.ndarray) -> np.ndarray:
    array[0, 0] = LARGEST
    return array


# The whole data set's features (snippets, D) float32, made extreme.
EXTREME: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "all but one zero": lambda x: np.where(np.arange(len(x))[:, None], 0, x),
    "all the largest half": lambda x: np.full_like(x, LARGEST),
    "beyond half precision": lambda x: 1e8 * x,
    "near the end of float32": lambda x: np.sign(x) * 1e38,
    "subnormal": lambda x: 1e-40 * np.sign(x),
    "one outlier": one_outlier,
    "half of the snippets zero": lambda x: np.where(np.arange(len(x))[:, None] % 2, x, 0),
}


def with_features(data: Path, folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> str:
    """The data set's features changed, as an assignment."""
    path = folder / "features.h5"
    with h5py.File(data.parent / "features.h5") as source, h5py.File(path, "w") as file:
        for name in source:
            file[name] = change(source[name][()].astype(np.float32)).astype(np.float32)
    return f"data.features={path}"


@pytest.mark.parametrize("row", EXTREME)
@pytest.mark.parametrize(
    "precision", [*(pytest.param(name, marks=pytest.mark.slow) for name in PRECISIONS[:2]), "float16"]
)
def test_training_stays_finite(data: Path, tmp_path: Path, row: str, precision: str) -> None:
    features = with_features(data, tmp_path, EXTREME[row])
    run = train(tiny_config(data, features, f"train.precision={precision}", "train.epochs=1"), tmp_path / "run")
    for record in history(run):
        assert all(math.isfinite(value) for value in record.values()), record
    for name in ("last", "best"):
        weights = load_checkpoint(run.checkpoint(name))["model"]
        assert all(tensor.isfinite().all() for tensor in weights.values())
    infer(run)
    found = read_json(run.detections("unseen"), "detections")["results"]
    assert all(math.isfinite(item["score"]) for items in found.values() for item in items)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_repeats_itself_to_the_bit(data: Path, tmp_path: Path, precision: str) -> None:
    """In every precision, whatever random numbers were drawn before; so do its detections."""
    config = tiny_config(data, f"train.precision={precision}", "train.epochs=1")
    one = train(config, tmp_path / "one")
    torch.rand(7)
    np.random.rand(7)
    assert_same_runs(one, train(config, tmp_path / "other"))
    found = []
    for _ in range(2):
        infer(one, vocabulary="all")
        found.append(read_json(one.detections("all"), "detections"))
    assert found[0] == found[1]


# On a GPU


def outputs(run: RunFolder, device: str) -> dict[str, torch.Tensor]:
    """What a trained model predicts for fixed features, in float32."""
    model = restore_model(run.load_config(), load_checkpoint(run.checkpoint("last"))).to(device).eval()
    features = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        found = model(features, model.text(model.text.tokenize([*SEEN, *UNSEEN]).to(device)))
    return {name: getattr(found, name).float().cpu() for name in ("class_logits", "mask_logits", "foreground")}


@on_a_gpu
def test_cpu_and_gpu_predict_and_train_the_same(data: Path, tmp_path: Path) -> None:
    """In float32 to a thousandth: sums are in another order, and the cosine is divided by τ = 0.01."""
    run = train(tiny_config(data), tmp_path / "run")
    on_cpu, on_gpu = outputs(run, "cpu"), outputs(run, "cuda")
    for name, expected in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], expected, rtol=1e-3, atol=1e-3, msg=name)
    no_dropout = [f"model.{name}.dropout=0" for name in ("temporal", "masking", "adaptation")]  # random numbers differ
    settings = (*no_dropout, "train.epochs=1", "train.precision=float32")
    first = [
        history(train(tiny_config(data, *settings, f"train.device={device}"), tmp_path / device))[0]["total"]
        for device in ("cpu", "cuda")
    ]
    assert first[1] == pytest.approx(first[0], rel=1e-3)
