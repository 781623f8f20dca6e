"""The training loop: epochs, checkpoints, the choice of the best one on seen classes, exact resumption.

**Several processes** (``torchrun``) take each batch's videos, and the classes whose names are read, by turns:
``train.batch_size`` is that of all together, and losses and gradients are those that one process would have, save for
the order of sums. Exchanged at a step are

* the gradients, 4 bytes a trained parameter (220 MB with ViT-B/16's text tower), while further ones are computed;
* the classes' text features and, on the way back, their gradients, 4 bytes a number (0.3 MB for 150 classes);
* what the losses are means of (six counts), and the losses (five numbers), on the GPUs;
* whether to stop or to save (two numbers), on the CPUs, while the GPUs work.

None of it grows with the batch or the videos, and every part of the work is divided: a step takes about as much less
time as there are processes, until the gradients take longer to send than to compute.

The first process alone writes. A checkpoint is the same whatever the number of processes, and can be gone on from with
any other: to the bit the same run with the same number; with another, sums have another order and dropout draws others.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stale import parallel
from stale.build import (
    TrainingData,
    build_model,
    choose_device,
    load_tower,
    load_training_data,
    phrases,
    untrained_text,
)
from stale.checkpoint import save_checkpoint
from stale.config import Config, save_config
from stale.errors import StaleError, interruption, name_some
from stale.files import remove_leftovers
from stale.memory import names_knob
from stale.model.stale import Stale
from stale.run import RunFolder, log_into, start_logging
from stale.training.interruption import Interruption
from stale.training.losses import Sizes
from stale.training.objective import Objective, compile_step, distribute, names_compiler
from stale.training.optimisation import build_criterion, build_optimizer, choose_precision, determinism
from stale.training.records import Records
from stale.training.resumption import check_same_data, take_folder, write_split
from stale.training.targets import build_targets
from stale.training.validation import held_out_map, is_better, unseen_loss

_log = logging.getLogger(__name__)


def train(config: Config, output: str | Path, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Train STALE on the seen classes into the run folder ``output``.

    Args:
        resume: go on where the run in ``output`` stopped; it ends exactly as if it had not stopped.
        overwrite: replace the run in ``output``; files that no command of this project wrote there stay.

    Raises:
        StaleError: bad configuration or data, an occupied folder, a run that does not match, a loss not finite, no
            memory or no disk space left.
    """
    run = RunFolder(Path(output))
    state = take_folder(config, run, resume, overwrite)
    kept = start_logging()
    parallel.hush_others()
    with determinism(config.train.deterministic), logging_redirect_tqdm([logging.getLogger("stale")]):
        with names_knob("data.num_snippets", config.data.num_snippets, " or use features of half precision"):
            trainer = _prepare(config, run, state, kept, overwrite)
        try:
            trainer.fit()
        except KeyboardInterrupt:
            _log.info("interrupted; the same command with --resume continues %s", _place(*trainer.saved_at))
            raise
    return run


def _prepare(
    config: Config, run: RunFolder, state: dict[str, Any] | None, kept: MemoryHandler, overwrite: bool
) -> Trainer:
    """Everything loaded and checked, then the folder made, then the state taken up."""
    device = parallel.own_device(choose_device(config.train.device), "train.device")
    torch.manual_seed(config.train.seed)
    data = load_training_data(config)
    tower = parallel.after_first(lambda: load_tower(config.model))
    seen = phrases(data.split.seen)
    model = build_model(config.model, config.data.num_snippets, data.feature_width, tower, seen).to(device)
    model.text.tokenize(seen)  # a name too long must not cost the run that is there
    if state is not None:
        check_same_data(state, data, run)
    parallel.wait_for_all()  # before the folder that all have looked at is changed
    if parallel.is_first():
        _make_folder(config, run, data, kept, overwrite)
    if parallel.rank():  # the same weights everywhere, and then dropout of its own
        torch.manual_seed(config.train.seed + parallel.rank())
    trainer = Trainer(config, model, data, run)
    if state is not None:
        trainer.restore(state)
    trainer.records.forget_after(trainer.epoch, trainer.epoch * trainer.batches + trainer.step)
    return trainer


def _make_folder(config: Config, run: RunFolder, data: TrainingData, kept: MemoryHandler, overwrite: bool) -> None:
    if overwrite:
        run.clear()
    for name in ("last", "best"):
        remove_leftovers(run.checkpoint(name))
    save_config(config, run.config)  # only now is there something worth a folder
    log_into(run.log, kept)
    write_split(run, data)


class Trainer:
    """Everything that changes while training, and the steps that change it."""

    def __init__(self, config: Config, model: Stale, data: TrainingData, run: RunFolder) -> None:
        self.config, self.model, self.run = config, model, run
        self.device = model.background.device
        self.split = data.split
        self.input = {"feature_width": data.feature_width, "features": data.tower.as_dict()}  # for the checkpoints
        self.train_data, self.held_out = data.train.to(self.device), data.held_out
        self.test_data = None if data.test is None else data.test.to(self.device)  # by train.choose_on=unseen_loss
        self.precision = choose_precision(config.train.precision, self.device)
        seen = phrases(data.split.seen)
        anchor = untrained_text(config.model, seen).to(self.device) if config.loss.anchor else None
        self.criterion = build_criterion(config.loss, anchor)
        prompts = model.text.tokenize(seen).to(self.device)
        objective = Objective(model, self.criterion, prompts, self.precision)
        if config.train.compile:
            compile_step(objective)
        self.objective = distribute(objective)
        self.optimizer = build_optimizer(model, config.train)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.batches = math.ceil(len(self.train_data) / config.train.batch_size)  # an epoch
        self.epoch = 0  # epochs finished
        self.step = 0  # and steps of the next
        self.since: list[dict[str, Tensor]] = []  # losses not yet logged
        self.best = {"epoch": 0, "mAP": -1.0}
        self.stop = Interruption()
        self.saved_at, self.saved = (0, 0), time.monotonic()
        self.records = Records(run)

    def fit(self) -> None:
        """Train the epochs that are left, saving after each, in long ones now and then, and when interrupted."""
        options = self.config.train
        size = f"{len(self.train_data)} training videos, {len(self.held_out)} held out, {len(self.split.seen)} classes"
        where = f"{self.device}, {str(self.precision).removeprefix('torch.')}"
        several = f"; {parallel.size()} processes" if parallel.size() > 1 else ""
        _log.info("%s on %s%s", size, where, several)
        total, done = options.epochs * self.batches, self.epoch * self.batches + self.step
        bar = tqdm(
            total=total,
            initial=done,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not parallel.is_first(),
        )
        with bar, self.stop:
            while self.epoch < options.epochs:
                with names_knob("train.batch_size", options.batch_size, "; it changes the run: begin it anew"):
                    self._train_epoch(bar)
                self._end_epoch()
        _log.info("best epoch %(epoch)d, held-out mAP %(mAP).4f on seen classes", self.best)

    def _train_epoch(self, bar: tqdm) -> None:
        options = self.config.train
        # The order is a function of seed and epoch alone, so a resumed run sees the batches it would have seen.
        generator = torch.Generator().manual_seed(options.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.train_data), generator=generator).to(self.train_data.index_device)
        self.model.train()
        started = time.perf_counter()
        for indices in order.split(options.batch_size)[self.step :]:
            self.since.append(self._step(indices))
            self.step += 1
            bar.update()
            if self.step % options.log_interval == 0 or self.step == self.batches:
                self._log_interval(time.perf_counter() - started, bar)  # the one place that waits for a GPU
                self.since, started = [], time.perf_counter()
            self._save_between_steps()

    def _save_between_steps(self) -> None:
        """Where the state is whole: save for who interrupts, and what a long epoch has done so far."""
        minutes = self.config.train.save_minutes
        due = minutes > 0 and time.monotonic() - self.saved > 60 * minutes
        signal, due = parallel.highest(self.stop.noted or 0, due)  # who stops alone leaves the others waiting
        if signal or due:
            self._check_weights()
            self._save()
        if signal:
            raise interruption(signal)

    def _end_epoch(self) -> None:
        """Validate, then save the finished epoch; an interruption of the validation saves what comes before it."""
        self._check_weights()
        finished, options = self.epoch + 1, self.config.train
        if finished % options.validate_every == 0 or finished == options.epochs:
            try:
                # Several processes cannot break off, each somewhere else: a signal waits for the end.
                with self.stop.at_once() if parallel.size() == 1 else nullcontext():
                    self._validate(finished)
            except KeyboardInterrupt:
                self._save()
                raise
        self.epoch, self.step = finished, 0
        self._save()
        (signal,) = parallel.highest(self.stop.noted or 0)
        if signal:
            raise interruption(signal)

    def _save(self) -> None:
        """By the first process; the others give it what is their own."""
        random = parallel.gather(self._random_state())
        if parallel.is_first():
            save_checkpoint(self.run.checkpoint("last"), self.state(random))
        self.saved_at, self.saved = (self.epoch, self.step), time.monotonic()

    def _step(self, indices: Tensor) -> dict[str, Tensor]:
        """A step on the batch ``indices`` (B,), of which this process takes its share; the losses of all of it."""
        share = indices[parallel.rank() :: parallel.size()]
        weight = 1.0 if len(share) else 0.0  # a batch of less videos than processes: some train on one for nothing
        batch = self.train_data.batch(share if len(share) else indices[:1])
        targets = build_targets(
            batch.segments, batch.labels, len(self.split.seen), batch.features.shape[1], self.config.loss.center
        )
        sizes = Sizes.of(targets).over_processes(weight)
        with names_compiler():
            total, losses = self.objective(batch.features, targets, sizes)
            self.optimizer.zero_grad()
            self.scaler.scale(total * (weight * parallel.size())).backward()  # of the gradients the mean is taken
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        values = torch.stack([total, *losses.values()]).detach()
        return dict(zip(("total", *losses), parallel.total(weight * values).unbind(), strict=True))

    def _log_interval(self, seconds: float, bar: tqdm) -> None:
        means = {name: float(losses.mean()) for name, losses in _stack(self.since).items()}
        if not all(map(math.isfinite, means.values())):
            raise StaleError(
                f"the loss is not finite in epoch {self.epoch + 1} ({_show(means)}); the last good checkpoint "
                "is kept; lower train.learning_rate or use train.precision=float32"
            )
        bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()}, refresh=False)
        step = self.epoch * self.batches + self.step
        record = {"epoch": self.epoch + 1, "step": step, **means, "seconds_a_step": seconds / len(self.since)}
        self.records.add(record, {f"loss/{name}": value for name, value in means.items()})

    def _check_weights(self) -> None:
        """A finite loss can have a gradient that is not; weights spoilt by it must not replace the last checkpoint."""
        spoilt = [name for name, weights in self.model.named_parameters() if not weights.isfinite().all()]
        if spoilt:
            raise StaleError(
                f"weights are not finite after epoch {self.epoch + 1} ({name_some(spoilt)}); the checkpoints of the "
                "epochs before are kept; lower train.learning_rate or use train.precision=float32"
            )

    def _validate(self, epoch: int) -> None:
        """Detect the seen classes in the held-out seen videos; the best mAP so far makes the best checkpoint."""
        figure = held_out_map(self.model, self.held_out, self.split.seen, self.config, self.precision)
        candidate = {"epoch": epoch, "mAP": figure}
        if self.test_data is not None:
            candidate["unseen_loss"] = unseen_loss(
                self.model,
                self.criterion,
                self.test_data,
                self.split.unseen,
                self.config.train.batch_size,
                self.precision,
            )
        if is_better(candidate, self.best):
            if parallel.is_first():
                content = {"model": self.model.state_dict(), **self.input, "best": candidate, "epoch": epoch}
                save_checkpoint(self.run.checkpoint("best"), content)
            self.best = candidate  # once it is on disk: broken off in between, the validation is repeated
        self.records.add({"epoch": epoch, "held_out_mAP": figure}, {"held-out seen mAP": figure})
        _log.info("epoch %d: held-out seen mAP %.4f (best %.4f)", epoch, figure, self.best["mAP"])

    def state(self, random: list[dict[str, Tensor]]) -> dict[str, Any]:
        """All that a continued run needs.

        Args:
            random: the state of every process's random numbers.
        """
        return {
            "model": self.model.state_dict(),
            **self.input,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "since": _stack(self.since),
            "best": self.best,
            "random": random[0],
            "random_of_others": random[1:],
        }

    def _random_state(self) -> dict[str, Tensor]:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return random

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the ``state`` of an earlier process.

        Raises:
            StaleError: it is of another model, or lacks something.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.best, self.step = state["epoch"], state["best"], state.get("step", 0)
            self._restore_random([state["random"], *state.get("random_of_others", [])])
            losses = {name: values.to(self.device).unbind() for name, values in state.get("since", {}).items()}
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            where = self.run.checkpoint("last")
            raise StaleError(f"{where} is of another model or of no training, it cannot go on: {reason}") from error
        self.since = [dict(zip(losses, step, strict=True)) for step in zip(*losses.values(), strict=True)]
        self.saved_at = (self.epoch, self.step)
        _log.info("continuing %s", _place(self.epoch, self.step))

    def _restore_random(self, random: list[dict[str, Tensor]]) -> None:
        """A process's own; one that is more than there were keeps its fresh numbers."""
        if parallel.rank() < len(random):
            own = random[parallel.rank()]
            torch.set_rng_state(own["cpu"])
            if "cuda" in own and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"], self.device)


def _place(epoch: int, step: int) -> str:
    """Where a run goes on, in words."""
    if step:
        return f"in epoch {epoch + 1}, after step {step}"
    return f"after epoch {epoch}" if epoch else "from the start"


def _stack(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name → losses of the steps (S)."""
    return {name: torch.stack([step[name] for step in losses]) for name in (losses[0] if losses else ())}


def _show(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())
