"""From the configuration to the videos that a run is trained and tested on.

Labels of unseen classes end here: training gets their segments without a label, and nothing else of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stale.config import Config, DataConfig, require
from stale.data.annotations import Video, all_labels, in_subset, read_annotations, repair, with_any_of
from stale.data.classes import phrase
from stale.data.dataset import NativeDataset, VideoDataset
from stale.data.features import Backbone, FeatureStore, duration_mismatch, open_features
from stale.data.splits import ClassSplit, cut_seen, load_split
from stale.errors import StaleError, name_some

_log = logging.getLogger(__name__)

_NEEDED = ("data.annotations", "data.features", "model.text.weights")


@dataclass(frozen=True)
class TrainingData:
    """The seen training videos, a part of them held out to choose the checkpoint."""

    train: VideoDataset
    held_out: VideoDataset
    split: ClassSplit
    feature_width: int  # D, that of the localizer's features included
    localizer_width: int
    backbone: Backbone  # the image encoder that made the features, where they record it
    test: VideoDataset | None = None  # unseen TEST videos, only by train.choose_on=unseen_loss [C]: not zero-shot


@dataclass(frozen=True)
class TestData:
    """The test videos with at least one instance of ``classes`` and with features; ``skipped`` have none."""

    videos: list[Video]
    classes: list[str]
    split: ClassSplit
    store: FeatureStore
    skipped: int


def load_annotations(data: DataConfig) -> tuple[dict[str, Video], ClassSplit]:
    """Load all videos by id, and which of their classes are seen."""
    videos, second_level = read_annotations(data.annotations), data.setting == "seen_cv"
    setting = data.cv_setting if second_level else data.setting
    split = load_split(all_labels(videos.values()), setting, data.split, folder=data.splits, dataset=data.dataset)
    return videos, cut_seen(split, data.split, data.fold, data.folds) if second_level else split


def training_videos(data: DataConfig, videos: Iterable[Video], split: ClassSplit) -> list[Video]:
    """The videos of the training subset with a seen class, their segments clipped to the video."""
    chosen = with_any_of(in_subset(videos, data.train_subset), split.seen)
    if data.setting == "seen_cv":  # all videos with a pseudo-unseen class are kept for testing
        tested = {video.id for video in with_any_of(chosen, split.unseen)}
        chosen = [video for video in chosen if video.id not in tested]
    chosen, repairs = repair(chosen)
    if repairs.clipped or repairs.dropped:
        _log.info("training segments: %d clipped to their video, %d dropped as empty", repairs.clipped, repairs.dropped)
    return with_any_of(chosen, split.seen)


def load_training_data(config: Config) -> TrainingData:
    """Load the training data of the seen classes; a StaleError if something is missing or too few videos are left."""
    require(config, *_NEEDED)
    data = config.data
    videos, split = load_annotations(data)
    store = open_all_features(data)
    chosen = with_features(training_videos(data, videos.values(), split), store, data.missing, data.duration_mismatch)
    kept, held_out = hold_out(chosen, split.seen, data.holdout, config.train.seed)
    if not held_out:
        raise StaleError(f"{len(chosen)} training videos are too few to hold out {data.holdout:.0%} of them")
    kept = reduce_instances(kept, split.seen, data)
    train, validation = (_dataset(part, store, split.seen, data) for part in (kept, held_out))

    test = None
    if config.train.choose_on == "unseen_loss":
        _log.warning("train.choose_on=unseen_loss: chosen by TEST labels of UNSEEN classes: no zero-shot")
        unseen = with_any_of(in_subset(videos.values(), data.tested_subset), split.unseen)
        unseen = repair(with_features(unseen, store, data.missing, data.duration_mismatch))[0]
        unseen = reduce_instances(with_any_of(unseen, split.unseen), split.unseen, data)
        test = _dataset(unseen, store, split.unseen, data)
    return TrainingData(
        train,
        validation,
        split,
        feature_width=store.width,
        localizer_width=localizer_width(store, data),
        backbone=store.backbone(),
        test=test,
    )


def open_all_features(data: DataConfig) -> FeatureStore:
    """Open ``data.features``, with ``data.localizer_features`` behind them along the width."""
    if not data.localizer_features:
        return open_features(data.features)
    sources = [data.features] if isinstance(data.features, str) else data.features
    return open_features([*sources, data.localizer_features])


def localizer_width(store: FeatureStore, data: DataConfig) -> int:
    """Width of ``data.localizer_features``, the last source of what :func:`open_all_features` opens; 0 without any."""
    return store.sources[-1].width if data.localizer_features else 0


def _dataset(videos: Sequence[Video], store: FeatureStore, classes: Sequence[str], data: DataConfig) -> VideoDataset:
    if data.sampling == "native":
        return NativeDataset(videos, store, classes, data)
    return VideoDataset(videos, store, classes, data.num_snippets)


def load_test_data(config: Config, vocabulary: str) -> TestData:
    """Load the test videos of a vocabulary: ``unseen``, ``seen`` or ``all`` classes."""
    require(config, *_NEEDED)
    data = config.data
    videos, split = load_annotations(data)
    classes = classes_of(split, vocabulary)
    if data.setting == "seen_cv" and vocabulary != "unseen":
        raise StaleError(
            f"data.setting=seen_cv tests pseudo-unseen classes alone, not {vocabulary}: the run was trained on the rest"
        )
    wanted = with_any_of(in_subset(videos.values(), data.tested_subset), classes)
    store = open_all_features(data)
    chosen = with_features(wanted, store, data.missing, data.duration_mismatch)
    return TestData(chosen, classes, split, store, skipped=len(wanted) - len(chosen))


def classes_of(split: ClassSplit, vocabulary: str) -> list[str]:
    """The labels of a vocabulary: ``unseen``, ``seen`` or ``all`` classes."""
    return list({"unseen": split.unseen, "seen": split.seen, "all": sorted({*split.seen, *split.unseen})}[vocabulary])


def phrases(labels: Sequence[str]) -> list[str]:
    """The phrase of each label."""
    return [phrase(label) for label in labels]


def reduce_instances(videos: Sequence[Video], classes: Sequence[str], data: DataConfig) -> list[Video]:
    """The videos with those instances of ``classes`` that the released code's switches leave; others stay [C].

    ``data.instances=last`` keeps the last instance of a video in the file's order, ``data.shrink`` removes snippets
    from both sides, ``data.drop_shorter`` drops what is then shorter. It is a StaleError if none is left.
    """
    if data.instances == "all" and not data.shrink and not data.drop_shorter:
        return list(videos)
    reduced = []
    for video in videos:
        snippet = video.duration / data.num_snippets  # seconds
        shortest = max(data.drop_shorter * snippet - 1e-9, 0)
        known = [item for item in video.instances if item.label in classes]
        kept = []
        for item in known[-1:] if data.instances == "last" else known:
            start, end = item.start + data.shrink * snippet, item.end - data.shrink * snippet
            if end - start > shortest:
                kept.append(replace(item, start=start, end=end))
        others = [item for item in video.instances if item.label not in classes]
        reduced.append(replace(video, instances=(*kept, *others)))
    left = with_any_of(reduced, classes)
    switches = f"data.instances={data.instances}, data.shrink={data.shrink:g}, data.drop_shorter={data.drop_shorter:g}"
    _log.info("%s: %d of %d videos left", switches, len(left), len(videos))
    if not left:
        raise StaleError("no instance is left; lower data.shrink or data.drop_shorter")
    return left


def hold_out(
    videos: Sequence[Video], classes: Sequence[str], share: float, seed: int
) -> tuple[list[Video], list[Video]]:
    """Split training videos into (kept, held out), by seed and spread evenly over ``classes``.

    Shuffled and ordered by their first class, every (1 / share)-th is held out, unless a class would lose its last.
    """
    rng = np.random.default_rng(seed)
    labels = {video.id: [item.label for item in video.instances if item.label in classes] for video in videos}
    shuffled = [videos[i] for i in rng.permutation(len(videos))]
    ordered = sorted(shuffled, key=lambda video: next(iter(labels[video.id]), ""))
    count = round(share * len(videos))
    positions = (np.arange(count) + rng.random()) * len(videos) / max(count, 1)
    left = Counter(label for video in videos for label in set(labels[video.id]))  # videos of each class to train on
    chosen: set[int] = set()
    for position in positions.astype(int).tolist():
        own = set(labels[ordered[position].id])
        if all(left[label] > 1 for label in own):
            left.subtract(own)
            chosen.add(position)
    kept = [video for position, video in enumerate(ordered) if position not in chosen]
    return kept, [ordered[position] for position in sorted(chosen)]


def with_features(videos: Sequence[Video], store: FeatureStore, missing: str, mismatch: str = "stop") -> list[Video]:
    """The videos whose features exist and, as far as they tell, fit the annotated duration; a StaleError if none does.

    ``missing`` is ``stop`` (a StaleError) or ``skip`` (left out and logged) for absent features, ``mismatch`` the same
    for features far longer or shorter than their video, or ``keep``.
    """

    def stop_or_skip(rule: str, fault: str, fix: str) -> None:
        if rule == "stop":
            raise StaleError(f"{fault}; {fix}=skip")
        _log.warning("skipped: %s", fault)

    left = [video for video in videos if store.find(video.id) is not None]
    if len(left) < len(videos):
        absent = name_some(video.id for video in videos if store.find(video.id) is None)
        fault = f"{len(videos) - len(left)} of {len(videos)} videos have no features in {store.path}: {absent}"
        stop_or_skip(missing, fault, "add them, or continue without them by data.missing")
    checked = [] if mismatch == "keep" else left
    wrong = {video.id: f"{video.id} in {fault}" for video in checked if (fault := duration_mismatch(store, video))}
    if wrong:
        stop_or_skip(
            mismatch,
            f"{len(wrong)} of {len(left)} videos have features far longer or shorter than the annotated duration: "
            f"{name_some(wrong.values())}",
            "extract them again or correct the annotations, or continue without them by data.duration_mismatch",
        )
    left = [video for video in left if video.id not in wrong]
    if not left:
        raise StaleError(f"none of the {len(videos)} videos has usable features in {store.path}")
    return left
