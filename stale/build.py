"""From a configuration to its parts: classes, videos, data sets, the model. The one place that unpacks it for them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stale import parallel
from stale.config import Config, DataConfig, ModelConfig, TemporalConfig, TextConfig, require
from stale.data.annotations import Video, all_labels, in_subset, read_annotations, repair
from stale.data.dataset import VideoDataset, hold_out, reduce_instances, with_any_of, with_features
from stale.data.features import FeatureStore, open_features
from stale.data.splits import ClassSplit, cut_seen, load_split
from stale.data.tower import Tower
from stale.data.vocabulary import phrase
from stale.errors import StaleError
from stale.model.adaptation import CrossAdaptation
from stale.model.localizer import MaskLocalizer
from stale.model.masking import build_masking
from stale.model.stale import Stale
from stale.model.temporal import build_temporal_model
from stale.model.text import ClassEmbeddings, TextEncoder, TextTower, load_text_weights

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
    test: VideoDataset | None = None  # unseen TEST classes, where the released code's choice of checkpoint is asked for


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
    second_level = config.setting == "seen_cv"
    setting = config.cv_setting if second_level else config.setting
    split = load_split(labels, setting, config.split, config.splits, config.dataset)
    return videos, cut_seen(split, config.split, config.fold, config.folds) if second_level else split


def load_training_data(config: Config) -> TrainingData:
    """Training data of the seen classes. Labels of unseen classes end here: their segments stay, anonymous."""
    require(config, "data.annotations", "data.features", "model.text.weights")
    videos, split = load_annotations(config.data)
    chosen = with_any_of(in_subset(videos.values(), config.data.train_subset), split.seen)
    if config.data.setting == "seen_cv":  # the videos of pseudo-unseen classes are there to be tested
        tested = {video.id for video in with_any_of(chosen, split.unseen)}
        chosen = [video for video in chosen if video.id not in tested]
    chosen, repairs = repair(chosen)
    if repairs.clipped or repairs.dropped:
        _log.info("training segments: %d clipped to their video, %d dropped as empty", repairs.clipped, repairs.dropped)
    store = open_features(config.data.features)
    chosen = with_features(with_any_of(chosen, split.seen), store, config.data.missing, config.data.misfit)
    kept, held_out = hold_out(chosen, split.seen, config.data.holdout, config.train.seed)
    if not held_out:
        raise StaleError(f"{len(chosen)} training videos are too few to hold out {config.data.holdout:.0%} of them")
    kept = _reduce(kept, split.seen, config.data)
    train, validation = (_data_set(part, store, split.seen, config) for part in (kept, held_out))
    test = _unseen_videos(videos, split, store, config) if config.train.choose_on == "unseen_loss" else None
    return TrainingData(train, validation, split, store.width, store.tower(), test)


def _data_set(videos: list[Video], store: FeatureStore, classes: Sequence[str], config: Config) -> VideoDataset:
    device = parallel.own_device(choose_device(config.train.device), "train.device")
    return VideoDataset(videos, store, classes, config.data.num_snippets, config.data.resident, device)


def _reduce(videos: list[Video], classes: tuple[str, ...], data: DataConfig) -> list[Video]:
    """The videos with the instances that the switches of the released code leave."""
    if data.instances == "all" and not data.shrink and not data.drop_shorter:
        return videos
    left = reduce_instances(
        videos, classes, data.num_snippets, data.instances == "last", data.shrink, data.drop_shorter
    )
    kept = "the last instance" if data.instances == "last" else "instances"
    of_them = f"of each video {kept}, shrunk by {data.shrink:g}, at least {data.drop_shorter:g} snippets long"
    _log.info("%s: %d of %d videos left", of_them, len(left), len(videos))
    if not left:
        raise StaleError("no instance is left; lower data.shrink or data.drop_shorter")
    return left


def _unseen_videos(videos: dict[str, Video], split: ClassSplit, store: FeatureStore, config: Config) -> VideoDataset:
    """The videos and labels that zero-shot training must not see: only by train.choose_on=unseen_loss."""
    data = config.data
    _log.warning("train.choose_on=unseen_loss: the checkpoint is chosen by TEST labels of UNSEEN classes; no zero-shot")
    wanted = with_any_of(in_subset(videos.values(), data.tested_subset), split.unseen)
    wanted = with_any_of(repair(with_features(wanted, store, data.missing, data.misfit))[0], split.unseen)
    return _data_set(_reduce(wanted, split.unseen, data), store, split.unseen, config)


def load_test_data(config: Config, vocabulary: str) -> TestData:
    """The test videos of a vocabulary: ``unseen``, ``seen`` or ``all`` classes."""
    require(config, "data.annotations", "data.features", "model.text.weights")
    videos, split = load_annotations(config.data)
    classes = classes_of(split, vocabulary)
    if config.data.setting == "seen_cv" and vocabulary != "unseen":
        raise StaleError(
            f"data.setting=seen_cv tests pseudo-unseen classes alone, not {vocabulary}: it was trained on them"
        )
    wanted = with_any_of(in_subset(videos.values(), config.data.tested_subset), classes)
    store = open_features(config.data.features)
    chosen = with_features(wanted, store, config.data.missing, config.data.misfit)
    return TestData(chosen, classes, split, store, len(wanted) - len(chosen))


def classes_of(split: ClassSplit, vocabulary: str) -> list[str]:
    """The labels of a vocabulary: ``unseen``, ``seen`` or ``all`` classes."""
    return list({"unseen": split.unseen, "seen": split.seen, "all": sorted({*split.seen, *split.unseen})}[vocabulary])


def phrases(labels: list[str] | tuple[str, ...]) -> list[str]:
    """The phrase of each label."""
    return [phrase(label) for label in labels]


def build_model(
    config: ModelConfig, num_snippets: int, feature_width: int, tower: TextTower, seen: Sequence[str] = ()
) -> Stale:
    """STALE with the configured components around ``tower``.

    Args:
        seen: the phrases of the seen classes; needed where there is no text encoder to read others.

    Raises:
        StaleError: the features' width does not belong to the tower's, or heads do not divide a width.
    """
    return _assemble(config, num_snippets, feature_width, _build_text(config.text, tower, seen))


def _build_text(text: TextConfig, tower: TextTower, seen: Sequence[str]) -> TextEncoder | ClassEmbeddings:
    if text.encoder == "none":
        return ClassEmbeddings(ClassEmbeddings.names_of(seen), tower.output_width)
    finetune = text.encoder == "finetune"
    return TextEncoder(tower, text.prompt, text.context_tokens, text.context_init, text.template, finetune)


def _assemble(
    config: ModelConfig, num_snippets: int, feature_width: int, encoder: TextEncoder | ClassEmbeddings
) -> Stale:
    width = encoder.output_width
    for name in ("temporal", "masking", "adaptation"):
        heads = getattr(config, name).heads
        if width % heads:
            raise StaleError(f"model.{name}.heads is {heads}, which does not divide the embedding width {width}")
    temporal, masking, adaptation, localizer = config.temporal, config.masking, config.adaptation, config.localizer
    return Stale(
        encoder,
        build_temporal_model(temporal.kind, width, temporal.layers, temporal.heads, temporal.dropout),
        build_masking(
            masking.kind, width, masking.queries, masking.layers, masking.heads, masking.hidden, masking.dropout
        ),
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
        mask_applied=masking.applied,
        mask_given=masking.kind == "gt",
        classifier=_build_classifier_features(config.classifier_features, temporal, width),
        raw_similarity=config.raw_similarity,
    )


def _build_classifier_features(kind: str, temporal: TemporalConfig, width: int) -> nn.Module | None:
    """What the classifier compares in place of F_vis: the features as they are, or in a context of their own."""
    if kind == "shared":
        return None
    own = temporal.kind if kind == "own" else "none"
    return build_temporal_model(own, width, temporal.layers, temporal.heads, temporal.dropout)


def load_tower(config: ModelConfig) -> TextTower:
    """The text tower with its original weights."""
    return TextTower.from_weights(load_text_weights(config.text.weights))


@torch.no_grad()  # not inference_mode: what is trained may be compared with it
def untrained_text(config: ModelConfig, names: Sequence[str]) -> Tensor:
    """Text features (K, C) of phrases in the configured template, by the tower with its original weights."""
    encoder = TextEncoder(parallel.after_first(lambda: load_tower(config)), "template", template=config.text.template)
    return encoder(encoder.tokenize(names))


def restore_model(config: Config, checkpoint: Mapping[str, Any], path: object = "checkpoint") -> Stale:
    """The trained model of a checkpoint; the vocabulary it was trained on leaves no trace in it.

    Its text side is averaged with the one it started from where ``model.text.start_share`` asks for it.

    Raises:
        StaleError: the checkpoint's tensors do not fit the configuration.
    """
    state = checkpoint["model"]
    try:
        encoder = _text_like(config.model.text, state)
        model = _assemble(config.model, config.data.num_snippets, checkpoint["feature_width"], encoder)
        model.load_state_dict(state)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StaleError(f"{path} does not fit this run's configuration: {reason}") from None
    if config.model.text.start_share:
        _average_with_start(model.text, config.model)
    return model


@torch.no_grad()
def _average_with_start(text: TextEncoder, config: ModelConfig) -> None:
    """Move the trained weights towards those that training began with; random context tokens stay as they are."""
    start = dict(_build_text(config.text, parallel.after_first(lambda: load_tower(config)), ()).named_parameters())
    for name, parameter in text.named_parameters():
        if name != "context" or config.text.context_init:
            parameter.lerp_(start[name], config.text.start_share)


def _text_like(text: TextConfig, state: Mapping[str, Any]) -> TextEncoder | ClassEmbeddings:
    """An empty text side with the sizes of a checkpoint's."""
    if text.encoder == "none":
        return ClassEmbeddings(torch.empty_like(state["text.names"]), state["text.embedding"].shape[1])
    prefix = "text.tower."
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in state.items() if name.startswith(prefix)}
    tower = TextTower.like(shapes)
    tower.token_embedding = torch.empty_like(state[prefix + "token_embedding"])
    return _build_text(text, tower, ())


def choose_device(name: str, setting: str = "train.device") -> torch.device:
    """``auto`` → the GPU if there is one; otherwise the device as named.

    Args:
        setting: where the name was given, for the message.

    Raises:
        StaleError: the device is unknown, or a GPU is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise StaleError(f"{setting} '{name}' is unknown; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        usable = (
            "no GPU is usable here" if not count else f"only {count} GPU{'s are' if count > 1 else ' is'} usable here"
        )
        raise StaleError(f"{setting} is {name}, but {usable}; use auto or cpu")
    return device
