"""The training loop: epochs, checkpoints, the choice of the best one on seen classes, exact resumption."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stale.build import TrainingData, build_model, choose_device, load_tower, load_training_data, phrases
from stale.checkpoint import git_revision, load_checkpoint, save_checkpoint
from stale.config import Config, LossConfig, TrainConfig, differing_keys, load_config, save_config
from stale.data.dataset import VideoDataset
from stale.data.tower import Tower, require_same_tower
from stale.detection.detector import detect
from stale.errors import StaleError, name_some
from stale.evaluation import default_tious, evaluate_results
from stale.files import append_text, read_json, read_text, remove_leftovers, write_json, write_text
from stale.memory import names_knob
from stale.model.stale import Stale
from stale.run import RunFolder, log_into, start_logging
from stale.training.interruption import Interruption
from stale.training.losses import Criterion
from stale.training.targets import Targets, build_targets

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
    state = _take_folder(config, run, resume, overwrite)
    kept = start_logging()
    with _determinism(config.train.deterministic), logging_redirect_tqdm([logging.getLogger("stale")]):
        with names_knob("data.num_snippets", config.data.num_snippets, " or use features of half precision"):
            trainer = _prepare(config, run, state, kept, overwrite)
        try:
            trainer.fit()
        except KeyboardInterrupt:
            _log.info("interrupted; the same command with --resume continues %s", _place(*trainer.saved_at))
            raise
    return run


def _take_folder(config: Config, run: RunFolder, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Stop where the folder is another's; the state to go on from, None for a new run."""
    taken = run.own_files()
    if taken and not run.config.is_file():
        raise StaleError(
            f"{run.path} holds {taken[0].name} but no config.yaml: no run of ours; choose another --output"
        )
    if taken and not (resume or overwrite):
        raise StaleError(
            f"{run.path} already holds a run: continue it with --resume, replace it with --overwrite, or choose "
            "another --output"
        )
    if not resume or not taken:
        return None
    _check_same(config, load_config([run.config]), run.path)
    last = run.checkpoint("last")
    return load_checkpoint(last) if last.exists() else None


def _prepare(
    config: Config, run: RunFolder, state: dict[str, Any] | None, kept: MemoryHandler, overwrite: bool
) -> Trainer:
    """Everything loaded and checked, then the folder made, then the state taken up."""
    device = choose_device(config.train.device)
    torch.manual_seed(config.train.seed)
    data = load_training_data(config)
    model = build_model(
        config.model, config.data.num_snippets, data.feature_width, load_tower(config.model), phrases(data.split.seen)
    ).to(device)
    model.text.tokenize(phrases(data.split.seen))  # a name too long must not cost the run that is there
    if state is not None:
        _check_same_data(state, data, run)
    if overwrite:
        run.clear()
    for name in ("last", "best"):
        remove_leftovers(run.checkpoint(name))
    save_config(config, run.config)  # only now is there something worth a folder
    log_into(run.log, kept)
    _write_split(run, data)
    trainer = Trainer(config, model, data, run)
    if state is not None:
        trainer.restore(state)
    _forget_records_after(trainer.epoch, trainer.epoch * trainer.batches + trainer.step, run.history)
    return trainer


class Trainer:
    """Everything that changes while training, and the steps that change it."""

    def __init__(self, config: Config, model: Stale, data: TrainingData, run: RunFolder) -> None:
        self.config, self.model, self.run = config, model, run
        self.device = model.background.device
        self.split = data.split
        self.input = {"feature_width": data.feature_width, "features": data.tower.as_dict()}  # for the checkpoints
        self.train_data, self.held_out = data.train.to(self.device), data.held_out
        self.test_data = None if data.test is None else data.test.to(self.device)  # by train.choose_on=unseen_loss
        self.prompts = model.text.tokenize(phrases(data.split.seen)).to(self.device)
        self.criterion = build_criterion(config.loss)
        self.optimizer = build_optimizer(model, config.train)
        self.precision = choose_precision(config.train.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.batches = math.ceil(len(self.train_data) / config.train.batch_size)  # an epoch
        self.epoch = 0  # epochs finished
        self.step = 0  # and steps of the next
        self.since: list[dict[str, Tensor]] = []  # losses not yet logged
        self.best = {"epoch": 0, "mAP": -1.0}
        self.stop = Interruption()
        self.saved_at, self.saved = (0, 0), time.monotonic()
        self.board = _tensorboard(run.path)

    def fit(self) -> None:
        """Train the epochs that are left, saving after each, in long ones now and then, and when interrupted."""
        options = self.config.train
        size = f"{len(self.train_data)} training videos, {len(self.held_out)} held out, {len(self.split.seen)} classes"
        _log.info("%s on %s, %s", size, self.device, str(self.precision).removeprefix("torch."))
        total, done = options.epochs * self.batches, self.epoch * self.batches + self.step
        bar = tqdm(total=total, initial=done, desc="train", unit="step", dynamic_ncols=True)
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
        order = torch.randperm(len(self.train_data), generator=generator).to(self.device)
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
        if self.stop.noted or (minutes and time.monotonic() - self.saved > 60 * minutes):
            self._check_weights()
            self._save()
        self.stop.raise_if_noted()

    def _end_epoch(self) -> None:
        """Validate, then save the finished epoch; an interruption of the validation saves what comes before it."""
        self._check_weights()
        finished, options = self.epoch + 1, self.config.train
        if finished % options.validate_every == 0 or finished == options.epochs:
            try:
                with self.stop.at_once():
                    self._validate(finished)
            except KeyboardInterrupt:
                self._save()
                raise
        self.epoch, self.step = finished, 0
        self._save()
        self.stop.raise_if_noted()

    def _save(self) -> None:
        save_checkpoint(self.run.checkpoint("last"), self.state())
        self.saved_at, self.saved = (self.epoch, self.step), time.monotonic()

    def _step(self, indices: Tensor) -> dict[str, Tensor]:
        batch = self.train_data.batch(indices)
        num_classes, num_snippets = len(self.prompts.tokens), batch.features.shape[1]
        targets = build_targets(batch.segments, batch.labels, num_classes, num_snippets)
        with self._autocast():
            outputs = self.model(batch.features, self.model.text(self.prompts), self._given_mask(targets))
        total, losses = self.criterion(outputs, targets)
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {"total": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}

    def _given_mask(self, targets: Targets) -> Tensor | None:
        """The seen classes' foreground, where the configuration has it stand in for the mask."""
        return targets.foreground.float() if self.model.mask_given else None

    def _autocast(self) -> AbstractContextManager:
        enabled = self.precision is not torch.float32
        return torch.autocast(self.device.type, self.precision if enabled else torch.bfloat16, enabled=enabled)

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
        self._record(record, {f"loss/{name}": value for name, value in means.items()})

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
        seen = self.split.seen
        options = replace(self.config.detection, oracle="none")  # which is a question to the test alone
        with self._autocast():
            held_out = self.held_out
            results = detect(
                self.model, held_out.videos, held_out.features, seen, phrases(seen), options, progress=False
            )
        figure = evaluate_results(held_out.videos, results, seen, default_tious(self.config.data.dataset)).average
        candidate = {"epoch": epoch, "mAP": figure}
        if self.test_data is not None:
            candidate["unseen_loss"] = self._unseen_loss(self.test_data)
        if _is_better(candidate, self.best):
            content = {"model": self.model.state_dict(), **self.input, "best": candidate, "epoch": epoch}
            save_checkpoint(self.run.checkpoint("best"), content)
            self.best = candidate  # once it is on disk: broken off in between, the validation is repeated
        self._record({"epoch": epoch, "held_out_mAP": figure}, {"held-out seen mAP": figure})
        _log.info("epoch %d: held-out seen mAP %.4f (best %.4f)", epoch, figure, self.best["mAP"])

    @torch.no_grad()
    def _unseen_loss(self, data: VideoDataset) -> float:
        """The loss on the unseen test classes, which zero-shot training must not know (released code)."""
        prompts = self.model.text.tokenize(phrases(self.split.unseen)).to(self.device)
        self.model.eval()
        total = 0.0
        for indices in torch.arange(len(data), device=self.device).split(self.config.train.batch_size):
            batch = data.batch(indices)
            targets = build_targets(batch.segments, batch.labels, len(prompts.tokens), batch.features.shape[1])
            with self._autocast():
                outputs = self.model(batch.features, self.model.text(prompts), self._given_mask(targets))
            total += float(self.criterion(outputs, targets)[0]) * len(indices)
        return total / len(data)

    def _record(self, record: dict[str, Any], scalars: dict[str, float]) -> None:
        append_text(self.run.history, json.dumps(record) + "\n")
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
            "step": self.step,
            "since": _stack(self.since),
            "best": self.best,
            "random": random,
        }

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
            torch.set_rng_state(state["random"]["cpu"])
            if "cuda" in state["random"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
            losses = {name: values.to(self.device).unbind() for name, values in state.get("since", {}).items()}
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            where = self.run.checkpoint("last")
            raise StaleError(f"{where} is of another model or of no training, it cannot go on: {reason}") from error
        self.since = [dict(zip(losses, step, strict=True)) for step in zip(*losses.values(), strict=True)]
        self.saved_at = (self.epoch, self.step)
        _log.info("continuing %s", _place(self.epoch, self.step))


def build_criterion(config: LossConfig) -> Criterion:
    """The losses with their configured weights."""
    names = ("classification", "localization", "foreground", "consistency")
    weights = {name: getattr(config, name) for name in names}
    return Criterion(
        weights,
        config.dice,
        config.foreground_form,
        config.consistency_snippets,
        config.consistency_threshold,
        config.consistency_gradient,
        config.classification_form,
    )


def build_optimizer(model: Stale, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay on matrices; the text encoder may have a learning rate of its own.

    Decoupled, because Adam would rescale a decay inside the gradient to full steps wherever the loss says nothing.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learned_name = name in ("text.context", "text.embedding")  # a vector a token or class, not a matrix
            in_text = name.startswith("text.") and name != "text.embedding"  # which starts from nothing
            key = (in_text, parameter.ndim >= 2 and not learned_name)
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


def _is_better(candidate: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """By the loss on unseen classes where that was asked for, else by the held-out mAP; the first of equals stays."""
    if "unseen_loss" in candidate:
        return candidate["unseen_loss"] < best.get("unseen_loss", math.inf)
    return candidate["mAP"] > best["mAP"]


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a GPU, float32 elsewhere; otherwise as named."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _check_same(config: Config, earlier: Config, path: Path) -> None:
    """A resumed run must be the same run; only how far it goes, and where, may change."""
    free = {"train.epochs", "train.device", "train.log_interval", "train.save_minutes", "detection.batch_size"}
    changed = [key for key in differing_keys(config, earlier) if key not in free]
    if changed:
        raise StaleError(f"{path} holds a run with another {name_some(changed)}; use its value, or another --output")


def _check_same_data(state: Mapping[str, Any], data: TrainingData, run: RunFolder) -> None:
    """Features and annotations may have changed behind unchanged paths: then it would be another run."""
    require_same_tower(Tower.of(state.get("features", {})), data.tower, "the features now")
    if state["feature_width"] != data.feature_width:
        raise StaleError(
            f"features are {data.feature_width} wide, but {run.checkpoint('last')} was trained on features "
            f"{state['feature_width']} wide: use those, or another --output"
        )
    earlier = read_json(run.split, "split of the run") if run.split.exists() else {}
    changed = [name for name, value in _split_record(data).items() if earlier and earlier.get(name) != value]
    if changed:
        raise StaleError(
            f"{run.split}: the data have changed since the run began ({name_some(changed)} differ): restore them, or "
            "choose another --output"
        )


def _write_split(run: RunFolder, data: TrainingData) -> None:
    write_json(run.split, {**_split_record(data), "revision": git_revision()}, indent=1)


def _split_record(data: TrainingData) -> dict[str, Any]:
    held_out = [video.id for video in data.held_out.videos]
    split = data.split
    return {"source": split.source, "seen": list(split.seen), "unseen": list(split.unseen), "held_out": held_out}


def _forget_records_after(epoch: int, step: int, history: Path) -> None:
    """Drop the records of what was broken off, and a line half written: it is trained again."""

    def belongs(line: str) -> bool:
        try:
            record = json.loads(line)
            return record["step"] <= step if "step" in record else record["epoch"] <= epoch
        except (json.JSONDecodeError, KeyError, TypeError):
            return False

    if history.exists():
        lines = read_text(history, "history").splitlines(keepends=True)
        write_text(history, "".join(filter(belongs, lines)))


def _place(epoch: int, step: int) -> str:
    """Where a run goes on, in words."""
    if step:
        return f"in epoch {epoch + 1}, after step {step}"
    return f"after epoch {epoch}" if epoch else "from the start"


def _stack(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name → losses of the steps (S)."""
    return {name: torch.stack([step[name] for step in losses]) for name in (losses[0] if losses else ())}


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Inside, the same to the bit on a GPU too, if ``wanted``; cuBLAS asks for its setting before its first use."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    former = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        raise StaleError(f"train.deterministic=true cannot be kept on this device ({reason}): set it false") from error
    finally:
        torch.use_deterministic_algorithms(former)


def _tensorboard(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path / "tensorboard"))


def _show(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())
