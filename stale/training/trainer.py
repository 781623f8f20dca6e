"""The training loop: epochs, checkpoints, the choice of the best one on seen classes, exact resumption."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stale.build import TrainingData, build_model, choose_device, load_tower, load_training_data, phrases
from stale.checkpoint import git_revision, load_checkpoint, save_checkpoint
from stale.config import Config, LossConfig, TrainConfig, differing_keys, load_config, save_config
from stale.detection.detector import detect
from stale.errors import StaleError, name_some
from stale.evaluation import default_tious, evaluate_results
from stale.files import write_json, write_text
from stale.model.stale import Stale
from stale.run import RunFolder, log_into, start_logging
from stale.training.losses import Criterion
from stale.training.targets import build_targets

_log = logging.getLogger(__name__)


def train(config: Config, output: str | Path, resume: bool = False) -> RunFolder:
    """Train STALE on the seen classes into the run folder ``output``.

    Args:
        resume: go on where the run in ``output`` stopped; it ends exactly as if it had not stopped.

    Raises:
        StaleError: bad configuration or data, an occupied folder, a run that does not match, a loss not finite.
    """
    run = RunFolder(Path(output))
    last = run.checkpoint("last")
    if not resume and run.config.exists():
        raise StaleError(f"{run.path} already holds a run: continue it with --resume, or choose another --output")
    if resume and run.config.exists():
        _check_same(config, load_config([run.config]), run.path)
    state = load_checkpoint(last) if resume and last.exists() else None

    kept = start_logging()
    device = choose_device(config.train.device)
    torch.manual_seed(config.train.seed)
    data = load_training_data(config)
    model = build_model(config.model, config.data.num_snippets, data.feature_width, load_tower(config.model))
    save_config(config, run.config)  # only now is there something worth a folder
    log_into(run.log, kept)
    _write_split(run, data)
    _forget_epochs_after(state["epoch"] if state else 0, run.history)
    trainer = Trainer(config, model.to(device), data, run)
    if state is not None:
        trainer.restore(state)
    try:
        with logging_redirect_tqdm([logging.getLogger("stale")]):
            trainer.fit()
    except KeyboardInterrupt:
        _log.info("interrupted; the same command with --resume continues after epoch %d", trainer.epoch)
        raise
    return run


class Trainer:
    """Everything that changes while training, and the steps that change it."""

    def __init__(self, config: Config, model: Stale, data: TrainingData, run: RunFolder) -> None:
        self.config, self.model, self.run = config, model, run
        self.device = model.background.device
        self.split = data.split
        self.input = {"feature_width": data.feature_width, "features": data.tower.as_dict()}  # for the checkpoints
        self.train_data, self.held_out = data.train.to(self.device), data.held_out
        self.prompts = model.text.tokenize(phrases(data.split.seen)).to(self.device)
        self.criterion = build_criterion(config.loss)
        self.optimizer = build_optimizer(model, config.train)
        self.precision = choose_precision(config.train.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.epoch = 0  # epochs finished
        self.best = {"epoch": 0, "mAP": -1.0}
        self.board = _tensorboard(run.path)

    def fit(self) -> None:
        """Train the epochs that are left, saving after each."""
        options = self.config.train
        size = f"{len(self.train_data)} training videos, {len(self.held_out)} held out, {len(self.split.seen)} classes"
        _log.info("%s on %s, %s", size, self.device, str(self.precision).removeprefix("torch."))
        batches = math.ceil(len(self.train_data) / options.batch_size)
        total, done = options.epochs * batches, self.epoch * batches
        with tqdm(total=total, initial=done, desc="train", unit="step", dynamic_ncols=True) as bar:
            while self.epoch < options.epochs:
                self._train_epoch(bar)
                self._check_weights()
                self.epoch += 1
                if self.epoch % options.validate_every == 0 or self.epoch == options.epochs:
                    self._validate()
                save_checkpoint(self.run.checkpoint("last"), self.state())
        _log.info("best epoch %(epoch)d, held-out mAP %(mAP).4f on seen classes", self.best)

    def _train_epoch(self, bar: tqdm) -> None:
        options = self.config.train
        # The order is a function of seed and epoch alone, so a resumed run sees the batches it would have seen.
        generator = torch.Generator().manual_seed(options.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.train_data), generator=generator).to(self.device)
        self.model.train()
        since: list[dict[str, Tensor]] = []
        started = time.perf_counter()
        batches = order.split(options.batch_size)
        for number, indices in enumerate(batches, start=1):
            since.append(self._step(indices))
            bar.update()
            if number % options.log_interval == 0 or number == len(batches):
                step, seconds = self.epoch * len(batches) + number, time.perf_counter() - started
                self._log_interval(step, since, seconds, bar)  # the one place that waits for a GPU
                since, started = [], time.perf_counter()

    def _step(self, indices: Tensor) -> dict[str, Tensor]:
        batch = self.train_data.batch(indices)
        num_classes, num_snippets = len(self.prompts.tokens), batch.features.shape[1]
        targets = build_targets(batch.segments, batch.labels, num_classes, num_snippets)
        with self._autocast():
            outputs = self.model(batch.features, self.model.text(self.prompts))
        total, losses = self.criterion(outputs, targets)
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {"total": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}

    def _autocast(self) -> AbstractContextManager:
        enabled = self.precision is not torch.float32
        return torch.autocast(self.device.type, self.precision if enabled else torch.bfloat16, enabled=enabled)

    def _log_interval(self, step: int, since: list[dict[str, Tensor]], seconds: float, bar: tqdm) -> None:
        means = {name: float(torch.stack([losses[name] for losses in since]).mean()) for name in since[0]}
        if not all(map(math.isfinite, means.values())):
            raise StaleError(
                f"the loss is not finite in epoch {self.epoch + 1} ({_show(means)}); the checkpoints of the epochs "
                "before are kept; lower train.learning_rate or use train.precision=float32"
            )
        bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()}, refresh=False)
        record = {"epoch": self.epoch + 1, "step": step, **means, "seconds_a_step": seconds / len(since)}
        self._record(record, {f"loss/{name}": value for name, value in means.items()})

    def _check_weights(self) -> None:
        """A finite loss can have a gradient that is not; weights spoilt by it must not replace the last checkpoint."""
        spoilt = [name for name, weights in self.model.named_parameters() if not weights.isfinite().all()]
        if spoilt:
            raise StaleError(
                f"weights are not finite after epoch {self.epoch + 1} ({name_some(spoilt)}); the checkpoints of the "
                "epochs before are kept; lower train.learning_rate or use train.precision=float32"
            )

    def _validate(self) -> None:
        """Detect the seen classes in the held-out seen videos; the best mAP so far makes the best checkpoint."""
        seen = self.split.seen
        options = self.config.detection
        with self._autocast():
            held_out = self.held_out
            results = detect(
                self.model, held_out.videos, held_out.features, seen, phrases(seen), options, progress=False
            )
        figure = evaluate_results(held_out.videos, results, seen, default_tious(self.config.data.dataset)).average
        if figure > self.best["mAP"]:
            self.best = {"epoch": self.epoch, "mAP": figure}
            content = {"model": self.model.state_dict(), **self.input, "best": self.best}
            save_checkpoint(self.run.checkpoint("best"), {**content, "epoch": self.epoch})
        self._record({"epoch": self.epoch, "held_out_mAP": figure}, {"held-out seen mAP": figure})
        _log.info("epoch %d: held-out seen mAP %.4f (best %.4f)", self.epoch, figure, self.best["mAP"])

    def _record(self, record: dict[str, Any], scalars: dict[str, float]) -> None:
        with self.run.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, record.get("step", record["epoch"]))

    def state(self) -> dict[str, Any]:
        """All that a continued run needs."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            **self.input,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "random": random,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the ``state`` of an earlier process."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best = state["epoch"], state["best"]
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        _log.info("continuing after epoch %d", self.epoch)


def build_criterion(config: LossConfig) -> Criterion:
    """The losses with their configured weights."""
    names = ("classification", "localization", "foreground", "consistency")
    weights = {name: getattr(config, name) for name in names}
    return Criterion(
        weights, config.dice, config.foreground_form, config.consistency_snippets, config.consistency_threshold
    )


def build_optimizer(model: Stale, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay on matrices; the text encoder may have a learning rate of its own.

    Decoupled, because Adam would rescale a decay inside the gradient to full steps wherever the loss says nothing.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("text."), parameter.ndim >= 2 and name != "text.context")
            groups.setdefault(key, []).append(parameter)
    text_rate = config.learning_rate if config.text_learning_rate is None else config.text_learning_rate
    settings = [
        {
            "params": parameters,
            "lr": text_rate if in_text else config.learning_rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (in_text, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, fused=next(model.parameters()).is_cuda)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a GPU, float32 elsewhere; otherwise as named."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _check_same(config: Config, earlier: Config, path: Path) -> None:
    """A resumed run must be the same run; only how far it goes, and where, may change."""
    free = {"train.epochs", "train.device", "train.log_interval"}
    changed = [key for key in differing_keys(config, earlier) if key not in free]
    if changed:
        raise StaleError(f"{path} holds a run with another {name_some(changed)}; use its value, or another --output")


def _write_split(run: RunFolder, data: TrainingData) -> None:
    held_out = [video.id for video in data.held_out.videos]
    record = {"source": data.split.source, "seen": data.split.seen, "unseen": data.split.unseen, "held_out": held_out}
    write_json(run.split, {**record, "revision": git_revision()}, indent=1)


def _forget_epochs_after(epoch: int, history: Path) -> None:
    """Drop the records of epochs that were broken off, and a line half written: they are trained again."""

    def belongs(line: str) -> bool:
        try:
            return json.loads(line)["epoch"] <= epoch
        except json.JSONDecodeError:
            return False

    if history.exists():
        write_text(history, "".join(filter(belongs, history.read_text(encoding="utf-8").splitlines(keepends=True))))


def _tensorboard(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path / "tensorboard"))


def _show(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())
