"""Class weights fitted to the seen classes."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.data.annotations import Instance, Video
from stale.data.dataset import VideoDataset, segment_lists
from stale.detection.calibration import calibrate
from stale.detection.run import class_features
from stale.model.stale import build_model
from tests.helpers import make_data_set, tiny_config, tiny_text_transformer
from tests.reference.detection import plain_regions

LABELS = ["high jump", "pole vault", "shot put"]
T, C = 12, 64


@torch.no_grad()
def test_calibration_by_loops(tmp_path: Path) -> None:
    """No other weights may raise a plain computation of the likelihood; scales are sums over segments and classes."""
    torch.manual_seed(0)
    config = tiny_config(make_data_set(tmp_path), "model.temporal.kind=none").model
    model = build_model(config, T, C, tiny_text_transformer(num_tokens=49408, layers=1), LABELS).eval()
    classes = class_features(model, LABELS)
    text = F.normalize(classes.text, dim=-1)
    videos, rows = [], []
    for number in range(9):
        label = number % 3
        start = float(number % 4)
        instances = (Instance(start, start + 4, LABELS[label]), Instance(7, 9, "another"))
        videos.append(Video(str(number), "training", float(T), instances))
        x = F.normalize(torch.randn(T, C), dim=-1)
        x[int(start) : int(start) + 4] += 0.5 * text[label] + 0.4 * text[(number // 3) % 3]
        rows.append(x)
    data = object.__new__(VideoDataset)
    data.videos, data.features = videos, torch.stack(rows)
    data.segments, data.labels = segment_lists(videos, LABELS, T)

    def similarities(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """With the video and with snippets ``first`` to ``last``: 2 × K."""
        unit = F.normalize(x, dim=-1)
        return torch.stack([F.normalize(part.mean(0), dim=-1) @ text.T for part in (unit, unit[first:last])])

    def loss(weights: list[float]) -> float:
        total = 0.0
        for video, x in zip(videos, rows, strict=True):
            first, label = int(video.instances[0].start), LABELS.index(video.instances[0].label)
            logits = torch.tensor(weights) @ similarities(x, first, first + 4)
            total += float(-logits.log_softmax(0)[label])
        return total / len(videos)

    options = DetectionConfig(proposals=["foreground"], classify_by="calibrated")
    calibrate(model, data, classes, options)
    found = model.class_weights.tolist()
    assert min(found) >= 0
    hits = squares = 0.0
    for video, x in zip(videos, rows, strict=True):
        L = model(x[None], classes.text).foreground[0]
        curve = (L / L.max()).tolist()
        quality = {}
        for threshold in torch.tensor(options.thresholds).tolist():
            for start, end in plain_regions(curve, threshold):
                quality[start, end] = max(curve[start:end])
        first, label = video.instances[0].start, video.instances[0].label
        for (start, end), value in quality.items():
            probabilities = (0.2 * torch.tensor(found) @ similarities(x, start, end)).softmax(0)
            overlap = max(min(end, first + 4) - max(start, first), 0)
            near = overlap / (end - start + 4 - overlap) >= 0.5
            for name, probability in zip(LABELS, probabilities.tolist(), strict=True):
                hits += value * probability * (near and name == label)
                squares += (value * probability) ** 2
    assert hits > 0
    assert float(model.quality_scales[1]) == pytest.approx(hits / squares, rel=1e-4)
    assert (model.quality_scales != 1).tolist() == [True, True, False, True], "all sources but points, which it lacks"
    data.segments = data.segments / 100  # no proposal is an instance
    calibrate(model, data, classes, options)
    assert model.quality_scales.min() > 0, "proposals keep their order"

    least = loss(found)
    assert least < loss([0.0, 0.0]) - 0.05
    for factors in ((0.8, 1.0), (1.25, 1.0), (1.0, 0.8), (1.0, 1.25), (0.9, 1.1)):
        assert least <= loss([weight * factor for weight, factor in zip(found, factors, strict=True)]) + 1e-4
