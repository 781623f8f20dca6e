"""Whole pipelines: detection with its evaluation, and a training epoch, each from the features' file on.

T snippets, D feature width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.benchmarks.decode import plain_decode
from scripts.benchmarks.evaluation import loop_form
from scripts.benchmarks.models import (
    Size,
    comparable,
    random_features,
    random_model,
    random_phrases,
    random_videos,
    write_packed,
)
from scripts.benchmarks.nms import plain_soft_nms
from scripts.benchmarks.pack import plain_batch
from scripts.benchmarks.rows import Row, clock_of, require_equal, timed
from scripts.benchmarks.step import PlainTraining
from scripts.benchmarks.text import pad_prompts, plain_text
from stale.build import build_model, load_tower, load_training_data
from stale.config import Config, DetectionConfig, load_config
from stale.data.annotations import Video
from stale.data.dataset import Batch, VideoDataset, load_features
from stale.data.features import open_features
from stale.data.synthetic import Recipe, write_synthetic
from stale.detection.detector import Results, describe_classes, detect
from stale.evaluation import detections, evaluate_results, ground_truth
from stale.model.stale import Stale
from stale.run import RunFolder
from stale.training.trainer import Trainer

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
TIOUS = np.linspace(0.5, 0.95, 10)


def bench(scale: float, device: torch.device) -> Iterator[Row]:
    """1,200 videos of the 50 unseen classes of ActivityNet 75/25, and the demo's training data."""
    with TemporaryDirectory() as name:
        yield from _detection(Path(name), scale, device)
    with TemporaryDirectory() as name:
        yield _epoch(Path(name), scale, device)


# Detection and evaluation


def _detection(folder: Path, scale: float, device: torch.device, measured: int = 2) -> Iterator[Row]:
    size, options, clock = Size.scaled(scale, classes=50), DetectionConfig(), clock_of(device)
    labels = random_phrases(size.classes)
    videos = random_videos(max(int(1200 * scale), 4), labels)
    features = random_features(len(videos), size)
    write_packed(folder / "features.h5", videos, features)
    for video, its in zip(videos[:measured], features, strict=False):
        np.save(folder / f"{video.id}.npy", its.numpy())
    model = random_model(size).to(device).eval()
    padded = pad_prompts(model.text, model.text.tokenize(labels)).to(device)

    seconds, (results, metrics) = timed(lambda: _detect_and_evaluate(model, videos, folder, labels, options), clock)
    truth = ground_truth(videos, labels)
    loop_seconds, expected = timed(lambda: loop_form(truth, detections(results, truth), TIOUS), clock)
    require_equal("pipeline: AP", np.nan_to_num(metrics.ap), np.nan_to_num(expected), 1e-9)
    found = sum(map(len, results.values()))
    of = f"{len(videos):,} videos (plain detection: {measured}, scaled up), {found:,} detections, {size}"

    def plain(text_of: Callable[[], Tensor]) -> float:
        detected_in, plain = timed(
            lambda: [plain_detect(model, video, folder, text_of, labels, options) for video in videos[:measured]],
            clock,
        )
        _require_same_detections(results, videos, plain)
        return detected_in * len(videos) / measured + loop_seconds

    yield Row("pipeline: detect and evaluate", plain(lambda: plain_text(model.text, padded)), seconds, of)
    text = describe_classes(model, labels)
    once = "pipeline: detect and evaluate, the plain one's text read once too"
    yield Row(once, plain(lambda: text), seconds, of)


def _detect_and_evaluate(
    model: Stale, videos: Sequence[Video], folder: Path, labels: Sequence[str], options: DetectionConfig
) -> tuple[Results, Any]:
    store = open_features(folder / "features.h5")
    features = load_features([video.id for video in videos], store, model.localizer.num_snippets)
    results = detect(model, videos, features, labels, labels, options, progress=False)
    return results, evaluate_results(videos, results, labels, TIOUS)


@torch.inference_mode()
def plain_detect(
    model: Stale,
    video: Video,
    folder: Path,
    text_of: Callable[[], Tensor],
    labels: Sequence[str],
    options: DetectionConfig,
) -> list[dict[str, Any]]:
    """Detections of one video: its file, its text, its outputs, its candidates, its SoftNMS."""
    T, text = model.localizer.num_snippets, text_of()
    outputs = model(plain_batch(folder, [video.id], T).to(text.device), text)
    scores = outputs.class_logits[0].softmax(0)[:-1] * outputs.foreground[0]
    masks = outputs.mask_logits[0].sigmoid()
    candidates = plain_decode(
        scores.cpu().numpy(), masks.cpu().numpy(), options.top_snippets, options.thresholds, options.candidates
    )
    picked = plain_soft_nms(candidates.reset_index(drop=True), options.nms_sigma, options.max_detections)
    return [
        {
            "segment": [round(place * video.duration / T, 3) for place in (row["start"], row["end"])],
            "label": labels[int(row["label"])],
            "score": row["score"],
        }
        for _, row in picked.iterrows()
        if row["score"] > 0
    ]


def _require_same_detections(results: Results, videos: Sequence[Video], plain: list[list[dict[str, Any]]]) -> None:
    """Scores to 1e-3, as a hundred times a cosine of float32 allows; the best ten's segments and classes as well."""
    for video, expected in zip(videos, plain, strict=False):
        ours = results[video.id]
        require_equal("pipeline: scores", *([row["score"] for row in rows] for rows in (ours, expected)), 1e-3)
        best, its_best = ({(row["label"], *row["segment"]) for row in rows[:10]} for rows in (ours, expected))
        if best != its_best:
            raise AssertionError(f"pipeline: the best detections of {video.id} differ: {best ^ its_best}")


# A training epoch


def _epoch(folder: Path, scale: float, device: torch.device, measured: int = 3) -> Row:
    videos_a_class, clock = max(int(16 * scale), 2), clock_of(device)
    _, paths = write_synthetic(folder, Recipe(training_videos=videos_a_class, validation_videos=1))
    config = load_config([DEMO])
    config.data.annotations, config.data.features = str(paths["annotations"]), str(paths["features"])
    config.model.text.weights = str(paths["text_tower"])
    config.train.device, config.train.precision = str(device), "float32"
    comparable(config.model)
    trainer, plain = _demo_trainers(config, folder)
    order = torch.randperm(len(trainer.train_data), generator=torch.Generator().manual_seed(0))
    batches = order.split(config.train.batch_size)

    def train_epoch() -> list[float]:
        load_training_data(config)  # the trainer has them already: for the time they take
        losses = [trainer._step(batch.to(trainer.train_data.index_device))["total"] for batch in batches]
        return torch.stack(losses).tolist()

    plain_seconds, expected = timed(
        lambda: [_plain_step(plain, trainer.train_data, paths["features"], of) for of in batches[:measured]], clock
    )
    seconds, losses = timed(train_epoch, clock)
    require_equal("pipeline: losses", losses[: len(expected)], expected, 1e-3)
    seen = sum(map(len, batches[:measured]))
    of = f"{len(order)} videos of the demo (plain: {seen}, scaled up), {len(batches)} steps, features in HDF5 a video"
    return Row("pipeline: train epoch", plain_seconds * len(order) / seen, seconds, of)


def _demo_trainers(config: Config, folder: Path) -> tuple[Trainer, PlainTraining]:
    """Ours and the plain one, which begin with the same weights."""
    data, device = load_training_data(config), torch.device(config.train.device)
    torch.manual_seed(0)
    model = build_model(config.model, config.data.num_snippets, data.feature_width, load_tower(config.model))
    trainer = Trainer(config, model.to(device).train(), data, RunFolder(folder))
    return trainer, PlainTraining(trainer)


def _plain_step(plain: PlainTraining, data: VideoDataset, path: Path, indices: Tensor) -> float:
    """A plain step whose features are read from their file for it."""
    rows = []
    with h5py.File(path) as file:
        for index in indices.tolist():
            features = torch.from_numpy(file[data.videos[index].id][()]).float()
            rows.append(F.interpolate(features.T[None], data.num_snippets, mode="linear", align_corners=False)[0].T)
    loss = plain.add_up(Batch(torch.stack(rows), data.segments[indices], data.labels[indices]))
    plain.update()
    return loss
