"""The training step: as a whole, its data, its targets, and beside what its arithmetic must take.

B videos, T snippets, D feature width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from scripts.benchmarks.floor import GB, count_flops, describe, largest_batch, peak_memory
from scripts.benchmarks.models import Size, comparable, random_features, random_phrases, random_videos, write_packed
from scripts.benchmarks.rows import Row, best_of, clock_of, require_equal
from scripts.benchmarks.targets import Row as Instance
from scripts.benchmarks.targets import plain_targets
from scripts.benchmarks.text import pad_prompts, plain_text
from stale.build import TrainingData, build_model, phrases
from stale.config import Config
from stale.data.dataset import PADDING, Batch, VideoDataset
from stale.data.features import open_features
from stale.data.splits import ClassSplit
from stale.data.synthetic import random_tower
from stale.data.tower import Tower
from stale.model.stale import Stale
from stale.model.text import Prompts, TextTower
from stale.run import RunFolder
from stale.training.losses import Criterion, Sizes
from stale.training.optimisation import build_optimizer
from stale.training.targets import Targets, build_targets
from stale.training.trainer import Trainer

SMALL_CARD = 8 * GB


def bench(scale: float, device: torch.device) -> Iterator[Row | str]:
    """On a GPU ActivityNet 75/25 with a trained ViT-B/16 text tower; on a CPU a third of its classes and batch."""
    on_gpu = device.type == "cuda"
    size = Size.scaled(scale, classes=150 if on_gpu else 50)
    B = max(int((100 if on_gpu else 32) * scale), 4)
    with TemporaryDirectory() as name:
        trainer = random_trainer(Path(name), size, B, device)
        exact = trainer
        if trainer.precision is not torch.float32:
            exact = random_trainer(Path(name) / "exact", size, B, device, "float32")
        require_same_step(exact)
        plain, batched = plain_seconds(exact, B), plain_seconds(exact, B, B, together=True)
        del exact
        batch = torch.arange(B, device=trainer.train_data.index_device)
        seconds = step_seconds(trainer, batch)
        of = f"{B} videos, {size}"
        yield Row("step: a training step", plain, seconds, f"{of} (plain: 1 video, scaled up)")
        yield Row("step: a training step, the plain one's videos in one batch too", batched, seconds, of)
        data = best_of(lambda: trainer.train_data.batch(batch), 10, clock_of(device))
        yield Row("step: resident data against 5 % of the step", 0.05 * seconds, data, of)
        yield _targets(trainer.train_data.batch(batch), size)
        flops = count_flops(lambda: trainer._step(batch))
        floor, line = describe(flops, seconds, device, trainer.precision)
        yield Row("step: against the arithmetic floor", floor, seconds, of)
        yield line
        if on_gpu:
            yield _memory(trainer, batch)


def random_trainer(folder: Path, size: Size, count: int, device: torch.device, precision: str = "auto") -> Trainer:
    """A trainer of ``count`` random videos, their features packed and resident, with a random model."""
    folder.mkdir(exist_ok=True)
    config = Config()
    config.train.batch_size, config.train.precision = count, precision
    comparable(config.model)
    labels = tuple(random_phrases(size.classes))
    videos = random_videos(count, labels)
    write_packed(folder / "features.h5", videos, random_features(count, size))
    data = VideoDataset(videos, open_features(folder / "features.h5"), labels, size.snippets, "always", device)
    tower = TextTower.from_weights(random_tower(0, size.width, size.layers, size.width))
    torch.manual_seed(0)
    model = build_model(config.model, size.snippets, size.width, tower).to(device).train()
    split = ClassSplit(labels, labels, "bench")
    return Trainer(config, model, TrainingData(data, data, split, size.width, Tower()), RunFolder(folder))


def require_same_step(trainer: Trainer, count: int = 2) -> None:
    """Stop unless loss and gradients of the first videos are those of the plain step, whose sums have another order."""
    chosen = torch.arange(count, device=trainer.train_data.index_device)
    plain = PlainTraining(trainer)
    loss = plain.add_up(trainer.train_data.batch(chosen))
    plain.update()  # clips
    require_equal("step: loss", float(trainer._step(chosen)["total"]), loss, 1e-4)
    gradients = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for model in (trainer.model, plain.model)
    )
    require_equal("step: gradients", *(gradient.cpu() for gradient in gradients), 1e-3)


class PlainTraining:
    """Training as first written: a video at a time, each with the text encoder at 77 tokens and targets from loops."""

    def __init__(self, trainer: Trainer) -> None:
        """Starts from a copy of the trainer's weights."""
        self.model: Stale = copy.deepcopy(trainer.model)
        self.criterion: Criterion = trainer.criterion
        self.classes, self.options = len(trainer.split.seen), trainer.config.train
        prompts = self.model.text.tokenize(phrases(trainer.split.seen))
        self.prompts: Prompts = pad_prompts(self.model.text, prompts).to(trainer.device)
        groups = build_optimizer(self.model, self.options).param_groups
        kept = [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups]
        self.optimizer = torch.optim.AdamW(kept, foreach=False, fused=False)

    def add_up(self, batch: Batch, together: bool = False) -> float:
        """The loss of the batch, whose gradients are summed up a video at a time, or computed ``together``."""
        features = batch.features.to(self.model.background.device)
        T, device = features.shape[1], features.device
        targets = [plain_targets(rows, self.classes, T) for rows in rows_of(batch)]
        sizes = Sizes.of(stack(targets, device))
        self.optimizer.zero_grad()
        total = 0.0
        parts = [slice(None)] if together else [slice(video, video + 1) for video in range(len(targets))]
        for part in parts:
            outputs = self.model(features[part], plain_text(self.model.text, self.prompts))
            loss, _ = self.criterion(outputs, stack(targets[part], device), sizes)
            loss.backward()
            total += loss.item()
        return total

    def update(self) -> None:
        """The optimizer's step along the clipped gradients."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()


def plain_seconds(trainer: Trainer, B: int, measured: int = 1, together: bool = False) -> float:
    """Seconds of a plain step on ``B`` videos, of which some are ``measured``."""
    plain, clock = PlainTraining(trainer), clock_of(trainer.device)
    batch = trainer.train_data.batch(torch.arange(measured, device=trainer.train_data.index_device))
    return best_of(lambda: plain.add_up(batch, together), 1, clock) * B / measured + best_of(plain.update, 2, clock)


def step_seconds(trainer: Trainer, batch: Tensor) -> float:
    """Seconds of one of our steps; on a GPU, which works behind, of ten in a row."""
    steps = 10 if trainer.device.type == "cuda" else 1
    return best_of(lambda: [trainer._step(batch) for _ in range(steps)], 3, clock_of(trainer.device)) / steps


def rows_of(batch: Batch) -> list[list[Instance]]:
    """The instances of each video."""
    videos = zip(batch.segments.tolist(), batch.labels.tolist(), strict=True)
    return [[(*segment, label) for segment, label in zip(*video, strict=True) if label != PADDING] for video in videos]


def stack(targets: Sequence[Targets], device: torch.device) -> Targets:
    """Targets of videos as those of a batch."""
    names = vars(targets[0])
    return Targets(**{name: torch.stack([getattr(one, name) for one in targets]).to(device) for name in names})


def _targets(batch: Batch, size: Size) -> Row:
    """Targets of the batch, against those of its first videos."""
    rows, clock = rows_of(batch), clock_of(batch.features.device)
    count = min(len(rows), 8)

    def plain() -> list[Targets]:
        return [plain_targets(of_video, size.classes, size.snippets) for of_video in rows[:count]]

    def ours() -> Targets:
        return build_targets(batch.segments, batch.labels, size.classes, size.snippets)

    expected, found = stack(plain(), torch.device("cpu")), ours()
    for name in vars(expected):
        require_equal(f"step: target {name}", getattr(found, name)[:count].cpu(), getattr(expected, name), 1e-6)
    reference = best_of(plain, 2, clock) / count * len(rows)
    of = f"{len(rows)} videos (plain: {count}, scaled up), {size.snippets} snippets, {size.classes} classes"
    return Row("step: target building", reference, best_of(ours, 10, clock), of)


def _memory(trainer: Trainer, batch: Tensor) -> str:
    """What a step takes of the GPU's memory, and which batch a small card could train with."""
    used = peak_memory(lambda: trainer._step(batch))

    def memory_of(count: int) -> int:
        again = torch.arange(count, device=batch.device) % len(batch)
        return peak_memory(lambda: trainer._step(again))

    fits = largest_batch(memory_of, SMALL_CARD)
    return (
        f"Memory of the step: {used / GB:.2f} GB at its peak with a batch of {len(batch)}; within "
        f"{SMALL_CARD / GB:.0f} GB fits a batch of {fits}."
    )
