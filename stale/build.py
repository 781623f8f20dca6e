"""From a configuration to its parts: classes, videos, data sets, the model. The one place that unpacks it for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stale.config import Config, DataConfig, ModelConfig, require
from stale.data.annotations import Video, all_labels, in_subset, read_annotations, repair
from stale.data.dataset import VideoDataset, hold_out, with_any_of, with_features
from stale.data.features import FeatureStore, open_features
from stale.data.splits import ClassSplit, load_split
from stale.data.tower import Tower
from stale.data.vocabulary import phrase
from stale.errors import StaleError
from stale.model.adaptation import CrossAdaptation
from stale.model.localizer import MaskLocalizer
from stale.model.masking import build_masking
from stale.model.stale import Stale
from stale.model.temporal import build_temporal_model
from stale.model.text import TextEncoder, TextTower, load_text_weights

_log = logging.getLogger(__name__)

VOCABULARIES = ("unseen", "seen", "all")


@dataclass(frozen=True)
class TrainingData:
    """The seen training videos, a part of them held out to choose the checkpoint."""

    train: VideoDataset
    held_out: VideoDataset
    split: ClassSplit
    feature_width: int
    tower: Tower  # which made the features, where they record it


@dataclass(frozen=True)
class TestData:
    """The test subset's videos with at least one instance of ``classes`` and with features; ``skipped`` have none."""

    videos: list[Video]
    classes: list[str]
    split: ClassSplit
    store: FeatureStore
    skipped: int


def load_annotations(config: DataConfig) -> tuple[dict[str, Video], ClassSplit]:
    """All videos by id, and which of their classes are seen."""
    videos = read_annotations(config.annotations)
    labels = all_labels(videos.values())
    return videos, load_split(labels, config.setting, config.split, config.splits, config.dataset)


def load_training_data(config: Config) -> TrainingData:
    """Training data of the seen classes. Labels of unseen classes end here: their segments stay, anonymous."""
    require(config, "data.annotations", "data.features", "model.text.weights")
    videos, split = load_annotations(config.data)
    chosen = with_any_of(in_subset(videos.values(), config.data.train_subset), split.seen)
    chosen, repairs = repair(chosen)
    if repairs.clipped or repairs.dropped:
        _log.info("training segments: %d clipped to their video, %d dropped as empty", repairs.clipped, repairs.dropped)
    store = open_features(config.data.features)
    chosen = with_features(with_any_of(chosen, split.seen), store, config.data.missing)
    kept, held_out = hold_out(chosen, split.seen, config.data.holdout, config.train.seed)
    if not held_out:
        raise StaleError(f"{len(chosen)} training videos are too few to hold out {config.data.holdout:.0%} of them")
    train, validation = (VideoDataset(part, store, split.seen, config.data.num_snippets) for part in (kept, held_out))
    return TrainingData(train, validation, split, store.width, store.tower())


def load_test_data(config: Config, vocabulary: str) -> TestData:
    """The test videos of a vocabulary: ``unseen``, ``seen`` or ``all`` classes."""
    require(config, "data.annotations", "data.features", "model.text.weights")
    videos, split = load_annotations(config.data)
    classes = classes_of(split, vocabulary)
    wanted = with_any_of(in_subset(videos.values(), config.data.test_subset), classes)
    store = open_features(config.data.features)
    chosen = with_features(wanted, store, config.data.missing)
    return TestData(chosen, classes, split, store, len(wanted) - len(chosen))


def classes_of(split: ClassSplit, vocabulary: str) -> list[str]:
    """The labels of a vocabulary: ``unseen``, ``seen`` or ``all`` classes."""
    return list({"unseen": split.unseen, "seen": split.seen, "all": sorted({*split.seen, *split.unseen})}[vocabulary])


def phrases(labels: list[str] | tuple[str, ...]) -> list[str]:
    """The phrase of each label."""
    return [phrase(label) for label in labels]


def build_model(config: ModelConfig, num_snippets: int, feature_width: int, tower: TextTower) -> Stale:
    """STALE with the configured components around ``tower``.

    Raises:
        StaleError: the features' width does not belong to the tower's, or heads do not divide a width.
    """
    width = tower.output_width
    for name in ("temporal", "masking", "adaptation"):
        heads = getattr(config, name).heads
        if width % heads:
            raise StaleError(f"model.{name}.heads is {heads}, which does not divide the embedding width {width}")
    text, temporal, masking, adaptation = config.text, config.temporal, config.masking, config.adaptation
    localizer = config.localizer
    return Stale(
        TextEncoder(
            tower, text.prompt, text.context_tokens, text.context_init, text.template, text.encoder == "finetune"
        ),
        build_temporal_model(temporal.kind, width, temporal.layers, temporal.heads, temporal.dropout),
        build_masking(masking.kind, width, masking.queries, masking.layers, masking.heads, masking.dropout),
        CrossAdaptation(width, adaptation.heads, adaptation.dropout, adaptation.alpha) if adaptation.enabled else None,
        MaskLocalizer(
            width,
            num_snippets,
            localizer.kind,
            localizer.coordinates,
            localizer.hidden,
            localizer.layers,
            localizer.kernel_size,
            localizer.bank,
        ),
        feature_width,
        config.visual_projection,
        config.temperature,
        masking.threshold,
        masking.gradient,
    )


def load_tower(config: ModelConfig) -> TextTower:
    """The text tower with its original weights."""
    return TextTower.from_weights(load_text_weights(config.text.weights))


def restore_model(config: Config, checkpoint: Mapping[str, Any], path: object = "checkpoint") -> Stale:
    """The trained model of a checkpoint; the vocabulary it was trained on leaves no trace in it.

    Raises:
        StaleError: the checkpoint's tensors do not fit the configuration.
    """
    state = checkpoint["model"]
    prefix = "text.tower."
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in state.items() if name.startswith(prefix)}
    tower = TextTower.like(shapes)
    tower.token_embedding = torch.empty_like(state[prefix + "token_embedding"])
    model = build_model(config.model, config.data.num_snippets, checkpoint["feature_width"], tower)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise StaleError(f"{path} does not fit this run's configuration: {reason}") from None
    return model


def choose_device(name: str) -> torch.device:
    """``auto`` → the GPU if there is one; otherwise the device as named.

    Raises:
        StaleError: the device is unknown, or a GPU is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StaleError(f"train.device '{name}' is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StaleError(f"train.device is {name}, but {torch.cuda.device_count()} GPUs are usable; use auto or cpu")
    return device
