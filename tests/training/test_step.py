"""The training step: no operation in it makes the host wait for a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stale.training.trainer import Trainer, train
from tests.helpers import on_a_gpu, tiny_config

# Operations that copy a number, or a size, from the device to the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave")

SETTINGS = [
    (),
    ("loss.classification_form=pooled", "loss.foreground_form=dice_bce", "train.clip_norm=0"),
    ("loss.classification_form=focal", "loss.consistency_gradient=visual", "model.masking.kind=gt"),
    ("loss.classification_form=sigmoid",),
    ("model.text.encoder=none", "model.masking.gradient=straight_through", "model.localizer.kind=plain"),
    ("model.text.encoder=frozen", "model.text.prompt=template", "model.temporal.kind=conv"),
    ("loss.classification_form=batch_focal", "loss.classification_video=1", "model.clamp=1e-4")
    + ("model.masking.applied=false", "model.masking.crop=localizer", "model.adaptation.residual=false"),
]


class Waits(TorchDispatchMode):
    """Records the operations inside that would wait for a GPU."""

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
    made: list[Trainer] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self: made.append(self))
        train(tiny_config(data, *settings), output)
    return made[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_no_operation_of_a_step_waits(data: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """On the CPU, where operations can be recorded."""
    ready = prepared(data, tmp_path / "run", *settings)
    with Waits() as waits:
        for _ in range(2):
            ready.step(torch.arange(5))
    assert not waits.found


@on_a_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_no_step_on_a_gpu_waits_for_it(data: Path, tmp_path: Path, settings: tuple[str, ...], precision: str) -> None:
    ready = prepared(data, tmp_path / "run", "train.device=cuda", f"train.precision={precision}", *settings)
    batches = torch.arange(15, device="cuda").split(5)
    ready.step(batches[0])  # sets up libraries and the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for indices in batches:
            ready.step(indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("encoder", "count"), [("frozen", 1), ("finetune", 2)])
def test_fixed_text_is_encoded_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, count: int
) -> None:
    """Where neither prompt nor text encoder is trained."""
    ready = prepared(data, tmp_path / "run", f"model.text.encoder={encoder}", "model.text.prompt=template")
    calls, kind, forward = [], type(ready.model.text), type(ready.model.text).forward
    monkeypatch.setattr(kind, "forward", lambda self, prompts: (calls.append(1), forward(self, prompts))[1])
    for _ in range(2):
        ready.step(torch.arange(5))
    assert len(calls) == count
