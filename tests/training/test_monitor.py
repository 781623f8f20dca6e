"""The warnings of training: one for each part that does nothing, none for a model that learns."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stale.config import load_config
from stale.model.stale import Outputs, Stale, build_model
from stale.training.losses import LossNormalizers, total_loss
from stale.training.monitor import copied_weights, part_statistics, relative_changes, warnings
from stale.training.targets import build_targets
from stale.training.trainer import train
from tests.helpers import tiny_config, tiny_text_transformer

B, T, C, K = 4, 16, 64, 3
PARTS = ("text", "text.context", "temporal", "masking", "adaptation", "localizer", "background")
TARGETS = build_targets(torch.tensor([[[2.0, 6.0], [9.0, 13.0]]]).repeat(B, 1, 1), torch.tensor([[0, 2]] * B), K, T)


@pytest.fixture(scope="module")
def model() -> Stale:
    torch.manual_seed(0)
    settings = [f"model.{x}" for x in ("localizer.hidden=8", "masking.queries=3", "masking.layers=1")]
    return build_model(load_config((), settings).model, T, C, tiny_text_transformer(num_tokens=8, layers=1))


def learning() -> Outputs:
    """Outputs of a model at work: scores and masks that vary, and are above and below all thresholds."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    classes = 3 * TARGETS.classes + random(B, K + 1, T)
    return Outputs(random(B, T, C), classes, 2 * random(B, T, T), 2 * random(B, T))


def warnings_of(model: Stale, outputs: Outputs, *settings: str, still: tuple[str, ...] = ()) -> list[str]:
    """The warnings of an epoch with these outputs, in which the weights of all parts but ``still`` have moved."""
    config, normalizers = load_config((), settings), LossNormalizers.of(TARGETS)
    losses = total_loss(outputs, TARGETS, normalizers, config.loss)[1]
    losses |= part_statistics(outputs, TARGETS, normalizers, config.model.masking.threshold)
    before = copied_weights(model)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            part = name if name == "text.context" else name.split(".")[0]
            weights += 0 if part in still else 1e-3
    means = {name: float(value) for name, value in losses.items()}
    return list(warnings(config, K, means, relative_changes(before, copied_weights(model))))


GUESSING = "the classification loss is that of guessing, ln(K+1) = 1.386"


def flat(logits: Tensor) -> Tensor:
    """Constant in each video, above the threshold in every other one."""
    return torch.tensor([2.0, -2.0] * (B // 2)).unsqueeze(1).expand_as(logits)


@pytest.mark.parametrize(
    ("change", "settings", "start"),
    [
        ({"foreground_logits": lambda x: -x.abs() - 1}, (), "the representation mask passes nothing: lower"),
        ({"foreground_logits": lambda x: x.abs() + 1}, (), "the representation mask passes everything: raise"),
        ({"foreground_logits": flat}, (), "the representation mask is constant over time"),
        ({"class_logits": torch.zeros_like}, ("loss.consistency_threshold=0.2",), GUESSING),
        ({}, ("loss.consistency_threshold=1",), "the consistency loss is constant"),
        ({}, ("loss.consistency_threshold=1", "loss.consistency_centered=false"), "the consistency loss is constant"),
    ],
    ids=["nothing passes", "everything passes", "flat L", "guessing", "no score, centered", "no score"],
)
def test_a_part_that_does_nothing_is_named(
    model: Stale, change: dict[str, Callable[[Tensor], Tensor]], settings: tuple[str, ...], start: str
) -> None:
    outputs = learning()
    assert warnings_of(model, outputs) == []
    changed = {name: function(getattr(outputs, name)) for name, function in change.items()}
    (found,) = warnings_of(model, replace(outputs, **changed), *settings)
    assert found.startswith(start)
    softened = warnings_of(model, replace(outputs, **changed), *settings, "model.masking.gradient=soft")
    assert not [line for line in softened if "masking.threshold" in line]  # which has no effect then


@pytest.mark.parametrize("part", PARTS)
def test_a_part_whose_weights_stay_is_named(model: Stale, part: str) -> None:
    (found,) = warnings_of(model, learning(), still=(part,))
    assert found.startswith(f"the weights of {part} have not moved")


def test_the_log_of_a_training_names_the_parts_that_stay_but_not_the_frozen(data: Path, tmp_path: Path) -> None:
    rates = {"": 0, "text_": 1e-3, "prompt_": 1e-3, "localizer_": 0}  # a rate of its own that is 0 freezes a part
    settings = [f"train.{part}learning_rate={rate}" for part, rate in rates.items()]
    run = train(tiny_config(data, *settings, "train.epochs=1"), tmp_path / "run")
    found = re.findall("epoch 1: the weights of (.+) have not moved", run.log.read_text(encoding="utf-8"))
    assert sorted(found) == ["adaptation", "background", "masking"]


def test_l_of_a_single_snippet_does_not_deviate_and_padding_does_not_count() -> None:
    valid = torch.tensor([[True, False]])
    targets = build_targets(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0]]), K, 2, valid=valid)
    outputs = Outputs(torch.ones(1, 2, C), torch.zeros(1, K + 1, 2), None, torch.tensor([[0.0, 3.0]]))
    assert part_statistics(outputs, targets, LossNormalizers.of(targets), 0.3)["foreground_deviation"] == 0
