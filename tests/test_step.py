"""A training step asks the device for nothing: no operation in it makes the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import assert_same
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from stale.errors import StaleError
from stale.run import RunFolder, start_logging
from stale.training import trainer
from stale.training.objective import Objective
from stale.training.trainer import Trainer

# What copies a number, or how many there are, from the device to the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave")

SETTINGS = [
    (),
    ("loss.classification_form=pooled", "loss.foreground_form=dice_bce", "train.clip_norm=0"),
    ("loss.classification_form=focal", "loss.consistency_gradient=visual", "model.masking.kind=gt"),
    ("model.text.encoder=none", "model.masking.gradient=straight_through", "model.localizer.kind=plain"),
    ("model.text.encoder=frozen", "model.text.prompt=template", "model.temporal.kind=conv"),
]


class Waits(TorchDispatchMode):
    """Notes the operations inside that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        by_mask = name.startswith(("aten::index", "aten::_index")) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in args[1:2]
            for index in (argument if isinstance(argument, (list, tuple)) else [argument])
        )
        if by_mask or name.split("::")[1].startswith(WAITING):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def prepared(data: Path, output: Path, *settings: str) -> Trainer:
    """A trainer before its first step."""
    return trainer._prepare(tiny_config(data, *settings), RunFolder(output), None, start_logging(), False)


def test_the_listener_hears_what_waits() -> None:
    with Waits() as waits:
        x = torch.arange(4.0)
        float(x.sum())
        x[x > 1]
        bool((x > 1).any())
        x[x > 1] = 0
        x.nonzero()
    assert len(waits.found) == 5


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_no_operation_of_a_step_waits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """On the CPU, where operations can be listened to; the optimiser is the one a GPU has."""
    adam = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: adam(groups, fused=True))
    ready = prepared(data, tmp_path / "run", *settings)
    with Waits() as waits:
        for _ in range(2):
            ready._step(torch.arange(5))
    assert not waits.found


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_no_step_on_a_gpu_waits_for_it(data: Path, tmp_path: Path, settings: tuple[str, ...], precision: str) -> None:
    ready = prepared(data, tmp_path / "run", "train.device=cuda", f"train.precision={precision}", *settings)
    batches = torch.arange(15, device="cuda").split(5)
    ready._step(batches[0])  # which sets up libraries and the optimiser's state
    with waiting_forbidden():
        for indices in batches:
            ready._step(indices)


@pytest.mark.slow
def test_a_compiled_step_is_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile as a single graph, whose operations are then run as they are.

    What it makes of them for a processor takes a compiler, and on two cores minutes.
    """
    traced = partialmethod(torch.nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(Objective, "compile", traced)
    losses, weights = [], []
    for name in ("false", "true"):
        ready = prepared(data, tmp_path / name, f"train.compile={name}")
        losses.append(ready._step(torch.arange(5)))
        weights.append(dict(ready.model.state_dict()))
    assert_same(*losses)
    assert_same(*weights)


def test_what_cannot_be_compiled_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(Objective, "compile", partialmethod(torch.nn.Module.compile, backend=no_compiler))
    ready = prepared(data, tmp_path / "run", "train.compile=true")
    with pytest.raises(StaleError, match="train.compile=true.*no C.. compiler found.*set it false") as error:
        ready._step(torch.arange(5))
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_compiled_step_on_a_gpu_is_near(data: Path, tmp_path: Path) -> None:
    """In float32 to a thousandth, as the CPU's is: sums have another order."""
    still = [f"model.{name}.dropout=0" for name in ("temporal", "masking", "adaptation")]
    settings = ["train.device=cuda", "train.precision=float32", *still]
    eager, compiled = (
        prepared(data, tmp_path / name, f"train.compile={name}", *settings) for name in ("false", "true")
    )
    indices = torch.arange(5, device="cuda")
    found = compiled._step(indices)
    for name, loss in eager._step(indices).items():
        torch.testing.assert_close(found[name], loss, rtol=1e-3, atol=1e-3, msg=name)


def test_fixed_text_is_encoded_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither prompt nor tower is trained."""
    calls: list[int] = []
    for name, count in (("frozen", 1), ("finetune", 2)):
        ready = prepared(data, tmp_path / name, f"model.text.encoder={name}", "model.text.prompt=template")
        forward = type(ready.model.text).forward
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                type(ready.model.text),
                "forward",
                lambda self, prompts, f=forward: (calls.append(1), f(self, prompts))[1],
            )
            for _ in range(2):
                ready._step(torch.arange(5))
        assert len(calls) == count


def test_the_objective_leaves_the_models_names_alone(data: Path, tmp_path: Path) -> None:
    ready = prepared(data, tmp_path / "run")
    assert isinstance(ready.objective, Objective)
    assert {f"model.{name}" for name in ready.model.state_dict()} == set(ready.objective.state_dict())
