"""Training: data, model, loss, optimizer, loop, in this order in :func:`train` and :class:`Trainer`.

A checkpoint is written after each epoch. The order of the batches depends on seed and epoch only, and ``last.pt`` holds
the states of the optimizer and the random number generators: a resumed run ends with the weights of one never stopped.

Several processes (``torchrun``) share the videos of each batch and the class names. Losses and gradients are those of
one process, up to the order of sums. A run can be resumed with another number of processes, but with other dropout.
"""

import json
import logging
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stale import distributed
from stale.checkpoint import git_revision, load_checkpoint, save_checkpoint
from stale.config import WITHOUT_EFFECT, Config, LossConfig, TrainConfig, differing_keys, flat, load_config, save_config
from stale.data.dataset import Batch, VideoDataset
from stale.data.datasets import facts
from stale.data.features import Backbone, require_same_backbone, require_same_width
from stale.data.selection import TrainingData, load_training_data, phrases
from stale.detection.calibration import calibrate
from stale.detection.run import class_features, detect
from stale.device import (
    autocast,
    choose_device,
    choose_precision,
    determinism,
    out_of_memory_hint,
    peak_memory,
    versions,
)
from stale.errors import StaleError, name_some
from stale.evaluation import evaluate_results
from stale.evaluation.model_card import write_model_card
from stale.io import append_text, remove_leftovers, write_json, write_text
from stale.model.stale import Stale, initial_model
from stale.model.text import Prompts
from stale.progress import progress_bar
from stale.run_folder import RunFolder, command_line, log_into, start_logging
from stale.training.losses import LossNormalizers, total_loss
from stale.training.monitor import components, copied_weights, part_statistics, relative_changes, warnings
from stale.training.targets import Targets, build_targets, count_unowned
from stale.version import __version__
from stale.video.image_encoder import require_text_of

# Settings that a resumed run may change.
_FREE = {"train.epochs", *WITHOUT_EFFECT}
_NOT_FINITE = "earlier checkpoints are kept; lower train.learning_rate or use train.precision=float32"

_log = logging.getLogger(__name__)


def train(config: Config, output: str | Path, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Train STALE on the seen classes into the run folder ``output``.

    ``resume`` continues the run there after its last checkpoint, or starts one if there is none. ``overwrite`` replaces
    it when the new run has its first checkpoint; files that no command of this project wrote there stay.

    Raises:
        StaleError: bad configuration or data, an occupied folder, a run that does not match, a loss that is not finite.
    """
    run = RunFolder(Path(output))
    log = start_logging()
    _settle(run)  # where an earlier command was killed
    distributed.gather(None)
    state = _saved_state(config, run, resume, overwrite)
    device = distributed.local_device(choose_device(config.train.device), "train.device")
    with determinism(config.train.deterministic), logging_redirect_tqdm([logging.getLogger("stale")]):
        with out_of_memory_hint("data.num_snippets", config.data.num_snippets, " or use features of half precision"):
            # Data
            data = load_training_data(config)
            # Model
            widths = data.feature_width, data.localizer_width
            model = initial_model(config, widths, phrases(data.split.seen)).to(device)
            require_text_of(data.backbone, config.model)
            if distributed.rank():  # the same weights in every process, but other dropout
                torch.manual_seed(config.train.seed + distributed.rank())
            # Loss and optimizer
            trainer = Trainer(config, model, data, run)
        if state is not None:
            _check_same_data(state, data, run)
            trainer.restore(state)
        distributed.gather(None)  # all processes have looked at the run folder
        try:
            if distributed.is_main_process():
                if overwrite:
                    run.set_aside()
                for path in (run.curves, run.card, *map(run.checkpoint, ("last", "best"))):
                    remove_leftovers(path)
                save_config(config, run.config)
                log_into(run.log, log)
                _log.info("command: %s", command_line())
                revision = git_revision()
                _log.info("stale %s (revision %s), %s", __version__, revision or "unknown", versions(device))
                write_json(run.split, {**_split_record(data), "revision": revision}, indent=1)
                # Later records are of epochs that are trained again; a last line may be incomplete.
                kept = [record for record in run.read_history() if record["epoch"] <= trainer.epoch]
                write_text(run.history, "".join(f"{json.dumps(record)}\n" for record in kept))
            trainer.fit()
        except BaseException:
            _settle(run)
            raise
    return run


def build_optimizer(model: Stale, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with learning rates by component: what is pretrained takes smaller steps.

    A component whose rate is 0 is frozen. Parameters of one axis have no decay. It is decoupled because Adam would
    rescale a decay inside the gradient to a full step wherever the loss has no gradient. ``coupled_decay`` does that,
    on all weights [C].
    """
    rates = {
        "text.embedding": None,  # learned from scratch, in place of a text encoder
        "text.context": config.prompt_learning_rate,
        "text.adapter": config.prompt_learning_rate,  # in place of prompts
        "text.": config.text_learning_rate,
        "temporal.": config.temporal_learning_rate,
        "localizer.": config.localizer_learning_rate,
        "log_temperature": config.temperature_learning_rate,
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), None)
        parameter.requires_grad_(parameter.requires_grad and rate != 0)
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name not in ("text.context", "text.embedding")  # lists of vectors
            decay = config.weight_decay if is_matrix or config.coupled_decay else 0.0
            groups.setdefault((config.learning_rate if rate is None else rate, decay), []).append(parameter)
    settings = [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]
    optimizer = torch.optim.Adam if config.coupled_decay else torch.optim.AdamW
    return optimizer(settings, fused=True)


class Trainer:
    """A model in training, with its data, losses, optimizer and progress."""

    def __init__(self, config: Config, model: Stale, data: TrainingData, run: RunFolder) -> None:
        self.config, self.model, self.run, self.split = config, model, run, data.split
        self.device = model.background.device
        self.precision = choose_precision(config.train.precision, self.device)
        # Data
        self.train_data, self.held_out = data.train.to(self.device), data.held_out
        self.test_data = None if data.test is None else data.test.to(self.device)  # for train.choose_on=unseen_loss
        if model.points is not None:
            with torch.no_grad():
                means = [model.points_input(x.float()[None])[0].mean(0) for x in self.train_data.features]
            model.points.mean.copy_(torch.stack(means).mean(0))
        # Optimizer, before the loss because it freezes parameters
        self.optimizer = build_optimizer(model, config.train)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # at the schedule's factor 1
        average = get_ema_multi_avg_fn(config.train.ema)
        self.average = AveragedModel(model, multi_avg_fn=average) if config.train.ema else None
        position = {id(p): n for n, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        self.group_of = {name: position[id(own[0])] for name, own in components(model).items()}
        # Loss
        self.train_step: nn.Module = TrainStep(model, config.loss, data.split.seen, self.precision)
        if distributed.world_size() > 1:  # static: every step trains the same parameters, with some settings not all
            parallel = DistributedDataParallel(self.train_step, static_graph=True, gradient_as_bucket_view=True)
            parallel.broadcast_buffers = False  # they are the same in all processes
            self.train_step = parallel
        # Progress
        self.epoch = 0  # of the last checkpoint
        self.best: dict[str, Any] = {"epoch": 0, "mAP": -1.0}
        self._features: dict[str, Any] = {"feature_width": data.feature_width, "features": data.backbone.as_dict()}
        if data.localizer_width:
            self._features["localizer_width"] = data.localizer_width
        self._board: Any = None

    def fit(self) -> None:
        """Train the remaining epochs, each followed by validation and a checkpoint."""
        options = self.config.train
        sizes = f"{len(self.train_data)} training videos, {len(self.held_out)} held out, {len(self.split.seen)} classes"
        where = f"{self.device}, {str(self.precision).removeprefix('torch.')}, processes: {distributed.world_size()}"
        _log.info("%s; %s%s", sizes, where, f"; resumed after epoch {self.epoch}" if self.epoch else "")
        counts = {name: sum(p.numel() for p in own) for name, own in components(self.model).items()}
        _log.info("trained parameters: %s", _listed({"all": sum(counts.values()), **counts}, ","))
        if self.model.localizer is not None:
            unowned = count_unowned(self.train_data.segments, self.train_data.labels, self.config.data.num_snippets)
            _log.info("training instances without a snippet of their own, hence without a mask target: %d", unowned)
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run.path / "tensorboard")) if distributed.is_main_process() else None
        first, began = self.epoch + 1, time.perf_counter()
        try:
            for epoch in range(first, options.epochs + 1):
                started = time.perf_counter()
                watched = epoch == first or self._board is not None
                before = copied_weights(self.model) if watched else {}
                with out_of_memory_hint("train.batch_size", options.batch_size, " in a new run"):
                    losses = self.train_epoch(epoch)
                # A finite loss can have a gradient that is not; such weights must not replace the last checkpoint.
                faulty = [name for name, weights in self.model.named_parameters() if not weights.isfinite().all()]
                if faulty:
                    raise StaleError(f"weights are not finite after epoch {epoch} ({name_some(faulty)}); {_NOT_FINITE}")
                report = f"epoch {epoch}/{options.epochs}: {_listed(losses)}"
                if validated := epoch % options.validate_every == 0 or epoch == options.epochs:
                    score = self.validate(epoch)
                    if len(self.held_out):
                        report += f"; held-out seen mAP {100 * score:.2f} % (best {100 * self.best['mAP']:.2f} %)"
                self.save(epoch)
                now = time.perf_counter()
                left = tqdm.format_interval((now - began) / (epoch + 1 - first) * (options.epochs - epoch))
                memory = peak_memory(self.device) / 2**30
                _log.info("%s; %.1f s, peak memory %.1f GiB, time left %s", report, now - started, memory, left)
                moved = relative_changes(before, copied_weights(self.model)) if watched else {}
                for warning in warnings(self.config, len(self.split.seen), losses, moved if epoch == first else {}):
                    _log.warning("epoch %d: %s", epoch, warning)
                rates = {name: self.optimizer.param_groups[n]["lr"] for name, n in self.group_of.items()}
                self._show("learning_rate/", rates, epoch)
                self._show("weights_moved/", moved, epoch)
                if validated and distributed.is_main_process():
                    from stale.plots import draw_curves, save_figure  # matplotlib, which takes long to import

                    save_figure(draw_curves(self.run.read_history()), self.run.curves)
            if first > options.epochs and not self.best["epoch"]:  # resumed with fewer epochs, before a validation
                self.validate(self.epoch)
                self.save(self.epoch)
        except KeyboardInterrupt:
            kept = f"epoch {self.epoch} is kept" if self.epoch else "no epoch is kept"
            _log.info("interrupted in epoch %d; %s: the same command with --resume continues", self.epoch + 1, kept)
            raise
        if self._board is not None:
            settings = {key: str(value) for key, value in flat(self.config).items()}
            self._board.add_hparams(settings, {"held_out_mAP": self.best.get("mAP", math.nan)}, run_name=".")
            self._board.close()
        if distributed.is_main_process() and self.run.checkpoint("best").is_file():
            write_model_card(self.run, self._features["features"])
        if len(self.held_out):
            epoch, score = self.best["epoch"], 100 * self.best["mAP"]
            _log.info("best epoch %d, held-out mAP %.2f %% on seen classes", epoch, score)
        elif self.test_data is None:
            _log.info("no video was held out (data.holdout=0): best.pt is the last checkpoint, epoch %d", self.epoch)
        _log.info("next: python inference.py --run %s", shlex.quote(str(self.run.path)))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train on every video once. Returns the mean of each loss."""
        options = self.config.train
        generator = torch.Generator().manual_seed(options.seed * 100_003 + epoch - 1)
        batches = self.train_data.batches(options.batch_size, generator)
        self.model.train()
        losses: list[dict[str, Tensor]] = []
        logged, started = 0, time.perf_counter()
        hidden = not distributed.is_main_process()
        bar = progress_bar(batches, f"epoch {epoch}/{options.epochs}", leave=False, unit="step", disable=hidden)
        for number, indices in enumerate(bar, start=1):
            self.set_rates(epoch - 1 + (number - 0.5) / len(batches))
            losses.append(self.step(indices))
            if number % options.log_interval == 0 or number == len(batches):
                means = _means(losses[logged:], epoch)  # waits for a GPU; nothing else in the loop does
                bar.set_postfix(loss=f"{means['total']:.3f}", refresh=False)
                seconds = (time.perf_counter() - started) / (number - logged)
                step = (epoch - 1) * len(batches) + number
                self._record({"epoch": epoch, "step": step, **means, "seconds_per_step": seconds})
                logged, started = number, time.perf_counter()
        return _means(losses, epoch)

    def set_rates(self, epochs: float) -> None:
        """Set the learning rates after ``epochs`` of training: warm-up, then the schedule."""
        options, progress = self.config.train, epochs / self.config.train.epochs
        factor = min(progress / options.warmup, 1.0) if options.warmup else 1.0
        if options.schedule == "cosine" and progress > options.warmup:
            factor = 0.5 * (1 + math.cos(math.pi * (progress - options.warmup) / (1 - options.warmup)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate

    def step(self, indices: Tensor) -> dict[str, Tensor]:
        """Take an optimizer step on the videos at ``indices`` (B,), shared by all processes. Returns the losses."""
        share = indices[distributed.rank() :: distributed.world_size()]
        weight = 1.0 if len(share) else 0.0  # a process without a video computes one that does not count
        batch = self.train_data.batch(share if len(share) else indices[:1])
        targets = self.targets(batch, len(self.split.seen))
        normalizers = LossNormalizers.of(targets).over_processes(weight)
        total, losses = self.train_step(batch.features, targets, normalizers, batch.valid)
        self.optimizer.zero_grad()
        # times the number of processes, because the gradients' mean is taken
        self.scaler.scale(total * (weight * distributed.world_size())).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        values = distributed.all_reduce(weight * torch.stack([total, *losses.values()]).detach())
        # A step that float16 skips has no finite norm; it counts 0.
        return dict(zip(("total", *losses), values.unbind(), strict=True)) | {"gradient_norm": norm.nan_to_num(0, 0)}

    def targets(self, batch: Batch, num_classes: int) -> Targets:
        """The targets of a batch that the model's parts need."""
        model, T = self.config.model, batch.features.shape[1]
        kinds: Any = {"masks": model.localizer.kind != "none", "points": model.points if model.points.enabled else None}
        return build_targets(batch.segments, batch.labels, num_classes, T, valid=batch.valid, **kinds)

    @property
    def tested_model(self) -> Stale:
        """The model with the weights that are validated, saved and tested: their moving average, if there is one."""
        return self.model if self.average is None else cast(Stale, self.average.module)

    def validate(self, epoch: int) -> float:
        """Detect seen classes in held-out videos. The best mAP so far makes the checkpoint ``best.pt``.

        Without such videos it is the last one, and the mAP is NaN.
        """
        options = self.config.detection.model_copy(update={"oracle": []})  # an oracle is for test videos only
        model, held_out = self.tested_model, self.held_out
        classes = class_features(model, self.split.seen)  # all in single precision, as at detection
        if options.classify_by == "calibrated":
            calibrate(model, self.train_data, classes, options)
            for name in ("class_weights", "quality_scales"):
                values = getattr(model, name)
                getattr(self.model, name).copy_(values)  # the moving average takes over the model's buffers
                _log.info("calibrated on seen classes: %s %s", name, [round(x, 3) for x in values.tolist()])
        results = detect(model, held_out.videos, held_out.features, classes, options=options, progress=False)
        score = math.nan
        if distributed.is_main_process() and len(held_out):
            tious = facts(self.config.data.dataset, self.config.data.tious).tious
            metrics = evaluate_results(held_out.videos, results, self.split.seen, tious)
            score = metrics.average
            self._show("held_out_AP/", dict(zip(metrics.classes, metrics.ap.mean(0).tolist(), strict=True)), epoch)
        score = distributed.gather(score)[0]
        result: dict[str, Any] = {"epoch": epoch, "mAP": score} if len(held_out) else {"epoch": epoch}
        if self.test_data is not None:
            result["unseen_loss"] = self.unseen_loss(self.test_data)
            better = result["unseen_loss"] < self.best.get("unseen_loss", math.inf)
        else:
            better = not len(held_out) or score > self.best["mAP"]  # a tie is not
        if better:
            self.best = result
            if distributed.is_main_process():
                save_checkpoint(self.run.checkpoint("best"), self._weights(epoch))
        if len(held_out):
            self._record({"epoch": epoch, "held_out_mAP": score})
        return score

    @torch.no_grad()
    def unseen_loss(self, test: VideoDataset) -> float:
        """Loss on the unseen TEST classes [C], which zero-shot training must not use. Every process computes it all."""
        unseen, total = self.split.unseen, 0.0
        train_step = TrainStep(self.tested_model, self.config.loss, unseen, self.precision).eval()
        for indices in torch.arange(len(test), device=self.device).split(self.config.train.batch_size):
            batch = test.batch(indices)
            targets = self.targets(batch, len(unseen))
            loss, _ = train_step(batch.features, targets, LossNormalizers.of(targets), batch.valid)
            total += float(loss) * len(indices)
        return total / len(test)

    def save(self, epoch: int) -> None:
        """Write ``last.pt``, from which the run can be resumed after ``epoch``."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        of_processes = distributed.gather(random)
        if distributed.is_main_process():
            optimizer, scaler = self.optimizer.state_dict(), self.scaler.state_dict()
            content = {**self._weights(epoch), "optimizer": optimizer, "scaler": scaler, "random": of_processes}
            if self.average is not None:
                content["trained"] = self.model.state_dict()  # "model" is their moving average
            save_checkpoint(self.run.checkpoint("last"), content)
            self.run.settle()
        self.epoch = epoch

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the checkpoint ``state``; a StaleError if it is not one of this model in training."""
        try:
            if self.average is not None:
                self.average.module.load_state_dict(state["model"])
                self.average.n_averaged.fill_(1)  # not to begin again with the next weights
            self.model.load_state_dict(state["model" if self.average is None else "trained"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.best = state["epoch"], state["best"]
            if distributed.rank() < len(state["random"]):  # a further process keeps its own
                random = state["random"][distributed.rank()]
                torch.set_rng_state(random["cpu"])
                if "cuda" in random and self.device.type == "cuda":
                    torch.cuda.set_rng_state(random["cuda"], self.device)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            fault = f"is of another model or not of training: {' '.join(str(error).split())[:300]}"
            raise StaleError(f"cannot resume, {self.run.checkpoint('last')} {fault}") from error

    def _weights(self, epoch: int) -> dict[str, Any]:
        return {"model": self.tested_model.state_dict(), **self._features, "epoch": epoch, "best": self.best}

    def _record(self, record: Mapping[str, Any]) -> None:
        """Append a line to history.jsonl, and its values to TensorBoard's curves."""
        if distributed.is_main_process():
            append_text(self.run.history, json.dumps(record) + "\n")
            values = {name: value for name, value in record.items() if name not in ("epoch", "step")}
            self._show("", values, record.get("step", record["epoch"]))

    def _show(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Add values to TensorBoard's curves."""
        for name, value in values.items() if self._board is not None else ():
            self._board.add_scalar(group + name, value, step)


class TrainStep(nn.Module):
    """Model, in ``precision``, and losses, in float32, as one module, which can be distributed as a whole."""

    def __init__(self, model: Stale, loss: LossConfig, classes: Sequence[str], precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision
        prompts = self.prompts = model.text.tokenize(phrases(classes)).to(model.background.device)
        K, N, rank = len(prompts.tokens), distributed.world_size(), distributed.rank()
        count = math.ceil(K / N)  # of classes in a process; the last may compute some again
        share = torch.arange(rank * count, (rank + 1) * count) % K
        self._share = Prompts.of(prompts.tokens[share], prompts.end[share])
        self._fixed_text: Tensor | None = None

    def forward(
        self, features: Tensor, targets: Targets, normalizers: LossNormalizers, valid: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, T, D), of which ``valid`` (B, T), → the weighted sum of the losses; each of them; statistics."""
        given_mask = targets.foreground.float() if self.model.mask_given else None
        with autocast(features.device, self.precision):
            outputs = self.model(features, self._text(), given_mask, targets.foreground, valid=valid)
        total, losses = total_loss(outputs, targets, normalizers, self.loss)
        return total, losses | part_statistics(outputs, targets, normalizers, self.model.config.masking.threshold)

    def _text(self) -> Tensor:
        """Text features (K, C), of which each process computes a share; computed once if nothing of it is trained."""
        if not self.model.text.fixed:
            return distributed.all_gather(self.model.text(self._share).float())[: len(self.prompts.tokens)]
        if self._fixed_text is None:
            self._fixed_text = self.model.text(self.prompts)
        return self._fixed_text


def _means(losses: Sequence[Mapping[str, Tensor]], epoch: int) -> dict[str, float]:
    """The mean of each loss over the steps; a StaleError if one is not finite."""
    means = {name: float(torch.stack([step[name] for step in losses]).mean()) for name in losses[0]}
    if not all(map(math.isfinite, means.values())):
        raise StaleError(f"the loss is not finite in epoch {epoch} ({_listed(means)}); {_NOT_FINITE}")
    return means


def _listed(values: Mapping[str, float], form: str = ".4g") -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


def _settle(run: RunFolder) -> None:
    if distributed.is_main_process() and run.settle():
        _log.warning("%s holds the former run again: the one to replace it wrote no checkpoint", run.path)


def _saved_state(config: Config, run: RunFolder, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint to resume from, None for a new run; a StaleError if the folder is not free for either."""
    files, other = run.own_files(), "choose another --output"
    if files and not run.config.is_file():
        raise StaleError(f"{run.path} holds {files[0].name} but no config.yaml: no run of ours; {other}")
    if files and not (resume or overwrite):
        raise StaleError(
            f"{run.path} already holds a run: continue it with --resume, replace it with --overwrite, or {other}"
        )
    if not files or not resume:
        return None
    changed = [key for key in differing_keys(config, load_config([run.config])) if key not in _FREE]
    if changed:
        raise StaleError(f"{run.path} holds a run with another {name_some(changed)}; use its value, or {other}")
    last = run.checkpoint("last")
    return load_checkpoint(last) if last.exists() else None


def _check_same_data(state: Mapping[str, Any], data: TrainingData, run: RunFolder) -> None:
    """Raise a StaleError if features or annotations have changed at unchanged paths."""
    require_same_backbone(Backbone.of(state.get("features", {})), data.backbone, "the features now")
    where, advice = f"{run.path}: the features now", "use those, or another --output"
    require_same_width(state["feature_width"], data.feature_width, where, advice)
    changed = [name for name in run.changed(_split_record(data)) if name != "source"]
    if changed:
        what = f"the data have changed since the run began ({name_some(changed)} differ)"
        raise StaleError(f"{run.split}: {what}: restore them, or choose another --output")


def _split_record(data: TrainingData) -> dict[str, Any]:
    record = {"source": data.split.source, "seen": list(data.split.seen), "unseen": list(data.split.unseen)}
    return {**record, "held_out": [video.id for video in data.held_out.videos], **data.digests}
