"""The point head: its points, its independence of padding and of how a long video is cut into windows."""

import pytest
import torch
from torch import Tensor

from stale.config import PointsConfig, load_config
from stale.detection.windows import forward_in_windows
from stale.model.points import PointGrid, PointHead
from stale.model.stale import Outputs, Stale, build_model
from tests.helpers import tiny_text_transformer

C, K = 64, 3
NAMES = ["diving", "high jump", "shot put"]
LENGTHS = (37, 5, 1, 20)


def make_model(*assignments: str, longest: int = 2304, width: int | tuple[int, int] = C) -> Stale:
    """A small model at the native rate in evaluation mode."""
    torch.manual_seed(0)
    small = ["points.enabled=true", "points.hidden=16", "points.levels=4", "masking.blocks=2", "masking.hidden=8"]
    settings = [f"model.{item}" for item in ("localizer.kind=none", *small, "text.prompt=template", *assignments)]
    config = load_config([], [*settings, "detection.proposals=points"]).model
    model = build_model(config, longest, width, tiny_text_transformer(layers=1)).eval()
    for block in model.temporal:
        if hasattr(block, "attention"):
            torch.nn.init.normal_(block.attention.out_proj.weight, std=0.1)  # as training would; it starts at zero
    for name, parameter in model.named_parameters():
        if "norm" in name and name.startswith("masking"):
            torch.nn.init.normal_(parameter)
    return model


def features_of(length: int, width: int = C) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(length))


def of_length(outputs: Outputs, row: int, length: int) -> dict[str, Tensor]:
    """What a batch says of one video: per snippet, and per point by position and stride."""
    found = {"visual": outputs.visual[row, :length], "language": outputs.language[row]}
    found["classes"] = outputs.class_logits[row, :, :length]
    if outputs.foreground_logits is not None:
        found["foreground"] = outputs.foreground_logits[row, :length]
    points, inside = outputs.points, outputs.points.grid.positions < length
    for name in ("actionness", "distances", "tiou"):
        found[name] = getattr(points, name)[row, inside]
    return found


@pytest.mark.parametrize("masking", ["maskformer", "conv1d", "none"])
@pytest.mark.parametrize("temporal", ["transformer", "conv", "none"])
@torch.no_grad()
def test_padding_influences_nothing(temporal: str, masking: str) -> None:
    """A batch of videos of different lengths gives what each gives alone."""
    changes = [f"temporal.kind={temporal}", f"masking.kind={masking}", "masking.gradient=soft", "adaptation.alpha=1"]
    model = make_model(*changes)
    text = model.text(model.text.tokenize(NAMES))
    padded, valid = torch.zeros(len(LENGTHS), max(LENGTHS), C), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=bool)
    for row, length in enumerate(LENGTHS):
        padded[row, :length], valid[row, :length] = features_of(length), True
    padded[~valid] = 100.0
    together = model(padded, text, valid=valid)
    for row, length in enumerate(LENGTHS):
        alone = of_length(model(features_of(length)[None], text), 0, length)
        for name, tensor in of_length(together, row, length).items():
            torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_windows_give_what_the_whole_video_gives() -> None:
    """Every output of this model depends on few snippets around it, fewer than a quarter of a window."""
    changes = ["temporal.kind=conv", "masking.kind=conv1d", "adaptation.enabled=false", "points.layers=1"]
    whole, cut = make_model(*changes), make_model(*changes, longest=256)
    text = whole.text(whole.text.tokenize(NAMES))
    for length in (256, 257, 700):
        features = features_of(length)[None]
        expected, found = whole(features, text), forward_in_windows(cut, features, text, None)
        for name in ("visual", "class_logits", "foreground_logits", "mask", "classifier_features", "language"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
        in_order = []
        for points in (found.points, expected.points):
            key = points.grid.positions + 10_000 * points.grid.strides
            assert len(key.unique()) == len(key)
            in_order.append([value[:, key.argsort()] for value in (points.actionness, points.distances, points.tiou)])
        torch.testing.assert_close(*in_order, atol=1e-5, rtol=1e-5)


def test_points_lie_at_the_centers_of_snippets_and_inside_their_segments() -> None:
    grid = PointGrid.of(5, 3)
    assert grid.positions.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 0.5, 2.5, 4.5, 0.5, 4.5]
    assert grid.strides.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 4, 4]
    points = PointHead(C, PointsConfig(levels=3, hidden=8))(torch.randn(2, 5, C))
    assert torch.equal(points.grid.positions, grid.positions)
    segments = points.segments()
    assert (segments[..., 0] < grid.positions).all()
    assert (segments[..., 1] > grid.positions).all()


def test_the_point_head_alone_takes_the_localizers_features() -> None:
    model = make_model("temporal.kind=none", "masking.kind=none", "adaptation.enabled=false", width=(C + 20, 20))
    text, features = model.text(model.text.tokenize(NAMES)), torch.randn(2, 30, C + 20)
    features.requires_grad_()
    outputs = model(features, text)
    (gradient,) = torch.autograd.grad(outputs.points.actionness.sum(), features, retain_graph=True)
    assert gradient[..., :C].abs().sum() == 0
    assert gradient[..., C:].abs().sum() > 0
    (gradient,) = torch.autograd.grad(outputs.class_logits.sum(), features)
    assert gradient[..., :C].abs().sum() > 0
    assert gradient[..., C:].abs().sum() == 0
