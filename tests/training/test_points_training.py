"""What the point head is trained for: targets and loss against loops, moving average, schedule, resumed runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.api import infer, load
from stale.config import LossConfig, PointsConfig
from stale.data.dataset import IGNORED, PADDING
from stale.data.features import open_features
from stale.data.selection import load_test_data
from stale.io import read_json
from stale.model.points import PointGrid, Points
from stale.model.stale import Outputs
from stale.run_folder import BASELINES
from stale.training.losses import LossNormalizers, points_loss
from stale.training.targets import Targets, build_targets
from stale.training.trainer import Trainer, train
from tests.helpers import assert_same_runs, tiny_config, write_folder

T, LEVELS, RADIUS = 64, 4, 1.5
CONFIG = PointsConfig(levels=LEVELS, radius=RADIUS)
NATIVE = [
    "data.sampling=native",
    "data.max_snippets=64",
    "model.localizer.kind=none",
    "model.points.enabled=true",
    "model.points.hidden=8",
    "model.points.levels=3",
    "train.ema=0.9",
    "train.schedule=cosine",
    "train.warmup=0.3",
    "detection.proposals=[foreground,points]",
]


def targets_of(rows: list[tuple[float, float, int]], valid: int = T, config: PointsConfig = CONFIG) -> Targets:
    """Targets of one video of ``valid`` snippets, padded to T, without masks."""
    table = torch.tensor(rows or [(0.0, 0.0, PADDING)], dtype=torch.float32)
    inside = (torch.arange(T) < valid)[None]
    return build_targets(table[None, :, :2], table[None, :, 2].long(), 3, T, valid=inside, masks=False, points=config)


def own_instance(position: float, level: int, rows: list[tuple[float, float, int]]) -> tuple[float, float] | None:
    """The instance (start, end) that a point is positive for, by the rules one after the other."""
    found, stride = [], 2**level
    for start, end, label in rows:
        center, half = (start + end) / 2, max((end - start) / 2, 0.5)
        farther = max(position - (center - half), center + half - position)
        low = 0 if level == 0 else 2 * stride
        high = math.inf if level == LEVELS - 1 else 4 * stride
        inside = center - half <= position <= center + half and abs(position - center) <= RADIUS * stride
        if label >= 0 and inside and low <= farther < high:
            found.append((half, center - half, center + half))
    return min(found)[1:] if found else None


@st.composite
def instances(draw: st.DrawFn) -> list[tuple[float, float, int]]:
    time = st.integers(0, 4 * T).map(lambda quarters: quarters / 4)
    pairs = st.tuples(time, time).map(sorted)
    row = st.tuples(pairs, st.sampled_from([IGNORED, 0, 1, 2])).map(lambda item: (*item[0], item[1]))
    return draw(st.lists(row, max_size=5))


@given(instances(), st.integers(1, T))
@settings(max_examples=100, deadline=None)
def test_targets_equal_the_rules(rows: list[tuple[float, float, int]], valid: int) -> None:
    rows = [(min(start, valid), min(end, valid), label) for start, end, label in rows]
    lengths = [max(end - start, 1) for start, end, _ in rows]
    rows = [row for number, row in enumerate(rows) if lengths.index(lengths[number]) == number]  # no ties
    targets = targets_of(rows, valid)
    points, grid = targets.points, PointGrid.of(T, LEVELS)
    for number, (position, stride) in enumerate(zip(grid.positions.tolist(), grid.strides.tolist(), strict=True)):
        snippet = int(position)
        assert points.valid[0, number] == targets.valid[0, snippet]
        own = own_instance(position, int(math.log2(stride)), rows)
        assert points.positive[0, number] == (own is not None and bool(targets.valid[0, snippet]))
        if points.positive[0, number]:
            assert points.distances[0, number].tolist() == [position - own[0], own[1] - position]


@given(st.floats(0, T), st.floats(0, T))
@settings(max_examples=200, deadline=None)
def test_every_instance_has_a_positive_point(first: float, second: float) -> None:
    targets = targets_of([(min(first, second), max(first, second), 1)])
    assert targets.points.positive.any()


def random_points(seed: int = 0) -> Points:
    generator, grid = torch.Generator().manual_seed(seed), PointGrid.of(T, LEVELS)
    size = (1, len(grid.positions))
    values = [torch.randn(size, generator=generator) for _ in range(2)]
    distances = 10 * torch.rand(*size, 2, generator=generator) + 0.1
    return Points(values[0], distances, values[1], grid)


def loss_of(points: Points, targets: Targets) -> torch.Tensor:
    outputs = Outputs(torch.zeros(1), torch.zeros(1), None, None, points=points)
    return points_loss(outputs, targets, LossNormalizers.of(targets), LossConfig())


def test_the_loss_equals_its_definition() -> None:
    rows = [(3.0, 9.0, 0), (20.0, 44.0, 1), (50.0, 53.0, IGNORED), (55.0, 56.0, 2)]
    targets, points = targets_of(rows, valid=60), random_points()
    goal = targets.points
    total = 0.0
    for n in range(len(points.grid.positions)):
        if not goal.valid[0, n]:
            continue
        p = float(points.actionness[0, n].sigmoid())
        total -= 0.25 * (1 - p) ** 2 * math.log(p) if goal.positive[0, n] else 0.75 * p**2 * math.log(1 - p)
        if goal.positive[0, n]:
            x = float(points.grid.positions[n])
            (a, b), (c, d) = points.distances[0, n].tolist(), goal.distances[0, n].tolist()
            start, end, true_start, true_end = x - a, x + b, x - c, x + d
            inter = max(0.0, min(end, true_end) - max(start, true_start))
            tiou = inter / (end - start + true_end - true_start - inter)
            hull = max(end, true_end) - min(start, true_start)
            shift = (start + end - true_start - true_end) / 2
            q = float(points.tiou[0, n].sigmoid())
            total += 1 - tiou + (shift / hull) ** 2 - tiou * math.log(q) - (1 - tiou) * math.log(1 - q)
    assert float(loss_of(points, targets)) == pytest.approx(total / int(goal.positive.sum()), rel=1e-4)


def test_the_loss_of_a_perfect_prediction_is_zero_and_without_positives_finite() -> None:
    targets, points = targets_of([(3.0, 9.0, 0), (20.0, 44.0, 1)]), random_points()
    goal = targets.points
    sure = torch.where(goal.positive, 30.0, -30.0)
    exact = Points(sure, torch.where(goal.positive.unsqueeze(2), goal.distances, points.distances), sure, points.grid)
    assert float(loss_of(exact, targets)) == pytest.approx(0, abs=1e-4)
    empty = loss_of(points, targets_of([]))
    assert empty.isfinite()
    assert empty > 0


def test_a_stopped_run_at_the_native_rate_ends_as_one_never_stopped(data: Path, tmp_path: Path) -> None:
    """With random crops, the moving average of the weights and a schedule of the learning rate."""
    config = tiny_config(data, *NATIVE)
    whole = train(config, tmp_path / "whole")

    def save_and_stop(trainer: Trainer, epoch: int) -> None:
        save(trainer, epoch)
        raise KeyboardInterrupt

    save = Trainer.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save", save_and_stop)
        train(config, tmp_path / "stopped")
    assert_same_runs(whole, train(config, tmp_path / "stopped", resume=True))


def test_features_of_another_rate_and_width_locate(data: Path, tmp_path: Path) -> None:
    """From training to detection: I3D, say, beside CLIP."""
    store, rng = open_features(tiny_config(data).data.features), np.random.default_rng(0)
    others = {name: rng.standard_normal((3 * len(store.read(name)), 5), dtype=np.float32) for name in store.ids}
    folder = write_folder(tmp_path / "others", others)
    run = train(tiny_config(data, *NATIVE, "train.epochs=1", f"data.localizer_features={folder}"), tmp_path / "run")
    infer(run)
    assert all(run.baselines(name, "unseen").exists() for name in BASELINES)
    found = read_json(run.detections("unseen"), "detections")["results"]
    assert len(found) == len(load_test_data(run.load_config(), "unseen").videos)
    detector, name = load(run.path), next(iter(found))
    assert detector.detect_annotated(name).detections == found[name]
    assert detector.model.points.embed[0].conv.in_channels == 5
