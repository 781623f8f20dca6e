"""From the configuration to the videos that a run is trained and tested on.

Labels of unseen classes end here: training gets their segments without a label, and nothing else of them.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from stale.config import Config, DataConfig, missing_files
from stale.data.annotations import Video, all_labels, in_subset, read_annotations, repair, unit_fault, with_any_of
from stale.data.classes import phrase, warn_of_same_text
from stale.data.dataset import NativeDataset, VideoDataset, relabel
from stale.data.embeddings import read_embeddings, require_text_width
from stale.data.features import Backbone, FeatureStore, duration_mismatch, open_features
from stale.data.splits import ClassSplit, cut_seen, load_split
from stale.errors import StaleError, name_some

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    """The seen training videos, a part of them held out to choose the checkpoint."""

    train: VideoDataset
    held_out: VideoDataset
    split: ClassSplit
    feature_width: int  # D, that of the localizer's features included
    localizer_width: int
    backbone: Backbone  # the image encoder that made the features, where they record it
    digests: dict[str, str]  # see data_digests
    test: VideoDataset | None = None  # unseen TEST videos, only by train.choose_on=unseen_loss [C]: not zero-shot


@dataclass(frozen=True)
class TestData:
    """The test videos with at least one instance of ``classes`` and with features; ``skipped`` have none."""

    videos: list[Video]
    classes: list[str]
    split: ClassSplit
    store: FeatureStore
    skipped: int
    digests: dict[str, str]  # see data_digests


def _read_videos(data: DataConfig) -> dict[str, Video]:
    """All videos by id; a StaleError if their segments seem not to be in seconds."""
    videos = read_annotations(data.annotations)
    if fault := unit_fault(videos.values()):
        raise StaleError(f"annotation file {data.annotations}, {fault}")
    return videos


def load_annotations(data: DataConfig) -> tuple[dict[str, Video], ClassSplit]:
    """Load all videos by id, and which of their classes are seen."""
    videos, second_level = _read_videos(data), data.setting == "seen_cv"
    setting = data.cv_setting if second_level else data.setting
    labels = all_labels(videos.values())
    warn_of_same_text(labels)
    split = load_split(labels, setting, data.split, folder=data.splits, dataset=data.dataset)
    return videos, cut_seen(split, data.split, data.fold, data.folds) if second_level else split


def training_videos(data: DataConfig, videos: Collection[Video], split: ClassSplit) -> list[Video]:
    """The videos of the training subset with a seen class, their segments clipped to the video."""
    chosen = with_any_of(in_subset(videos, data.train_subset), split.seen)
    if data.setting != "closed":  # what is tested is not trained on; subsets can be the same, or have some in common
        tested = {video.id for video in with_any_of(in_subset(videos, data.tested_subset), split.unseen)}
        chosen = [video for video in chosen if video.id not in tested]
    chosen, changes = repair(chosen)
    if changes:
        _log.info("training segments: %s", ", ".join(f"{count} {change}" for change, count in changes.items()))
    return with_any_of(chosen, split.seen)


def load_training_data(config: Config) -> TrainingData:
    """Load the training data of the seen classes; a StaleError if something is missing or too few videos are left."""
    data = config.data
    videos, split, store = open_inputs(config)
    if config.model.visual_projection:
        _log.warning("model.visual_projection: features and text lose their alignment, on which unseen classes depend")
    digests = data_digests(data, videos.values(), split, store)
    chosen = with_features(training_videos(data, videos.values(), split), store, data.missing, data.duration_mismatch)
    warn_if_coarse(config, chosen, store)
    kept, held_out = hold_out(chosen, split.seen, data.holdout, config.train.seed)
    if not held_out and data.holdout:
        fault = f"{len(chosen)} training videos are too few to hold out {data.holdout:.0%} of them"
        raise StaleError(f"{fault}: hold out more, or keep the last checkpoint by data.holdout=0")
    kept = reduce_instances(kept, split.seen, data)
    dataset = NativeDataset if data.sampling == "native" else VideoDataset
    train, validation = (dataset(part, store, split.seen, data) for part in (kept, held_out))
    test = None
    if config.train.choose_on == "unseen_loss":
        _log.warning("train.choose_on=unseen_loss: chosen by TEST labels of UNSEEN classes: no zero-shot")
        unseen = with_any_of(in_subset(videos.values(), data.tested_subset), split.unseen)
        unseen = repair(with_features(unseen, store, data.missing, data.duration_mismatch))[0]
        unseen = reduce_instances(with_any_of(unseen, split.unseen), split.unseen, data)
        test = dataset(unseen, store, split.unseen, data)
    return TrainingData(
        train,
        validation,
        split,
        feature_width=store.width,
        localizer_width=localizer_width(store, data),
        backbone=store.backbone(),
        digests=digests,
        test=test,
    )


def open_inputs(config: Config) -> tuple[dict[str, Video], ClassSplit, FeatureStore]:
    """Open all that training and the test of the run need: videos, split and features, of which none is loaded.

    A StaleError names everything that is missing or wrong, in one line.
    """
    data = config.data
    missing = missing_files(config)
    problems = [f"{key}: {path} does not exist" if path else f"not set: --set {key}=..." for key, path in missing]

    def attempt(step: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return step(*arguments)
        except StaleError as error:
            problems.append(str(error))
            return None

    absent = {key for key, _ in missing}
    annotated = None if absent & {"data.annotations", "data.splits"} else attempt(load_annotations, data)
    store = None if absent & {"data.features", "data.localizer_features"} else attempt(open_all_features, data)
    if annotated:
        videos, split = annotated
        store = store and store.annotate(videos)
        for subset, classes in ((data.train_subset, split.seen), (data.tested_subset, split.unseen)):
            wanted = with_any_of(attempt(in_subset, videos.values(), subset) or (), classes)
            if wanted and store and data.missing == "stop":
                attempt(partial(with_features, missing="stop", mismatch="keep"), wanted, store)
    if config.model.text.embeddings and "model.text.embeddings" not in absent and annotated:
        attempt(_check_embeddings, config, annotated[1], store)
    if problems or not annotated or not store:
        raise StaleError("; ".join(dict.fromkeys(problems)))
    return *annotated, store


def _check_embeddings(config: Config, split: ClassSplit, store: FeatureStore | None) -> None:
    """Raise a StaleError unless the file of class embeddings has all classes and the width of the features."""
    table = read_embeddings(config.model.text.embeddings)
    table.find(classes_of(split, "all"))
    if store and not config.model.visual_projection:
        table.require_model_of(store.backbone())
        require_text_width(store.width - localizer_width(store, config.data), table.vectors.shape[1])


def open_all_features(data: DataConfig) -> FeatureStore:
    """Open ``data.features``, with ``data.localizer_features`` behind them along the width."""
    sources = [data.features] if isinstance(data.features, str) else data.features
    store = open_features([*sources, *filter(None, [data.localizer_features])], data.id_pattern)
    for source in store.sources[: len(sources)]:
        source.overlap = ((data.window or data.stride) / data.stride - 1) / 2
        source.stride, source.frame_rate = data.stride, data.fps
    return store


def localizer_width(store: FeatureStore, data: DataConfig) -> int:
    """Width of ``data.localizer_features``, the last source of what :func:`open_all_features` opens; 0 without any."""
    return store.sources[-1].width if data.localizer_features else 0


def load_test_data(config: Config, vocabulary: str, trained: DataConfig | None = None) -> TestData:
    """Load the test videos of a vocabulary: ``unseen``, ``seen`` or ``all`` classes.

    With ``trained``, the data that a run was trained on, those of ``config`` are another data set, and its unseen
    classes are all that the run has not seen.
    """
    data = config.data
    videos, split = load_annotations(data) if trained is None else cross_split(trained, data)
    classes = classes_of(split, vocabulary)
    if trained is None and data.setting == "seen_cv" and vocabulary != "unseen":
        fault = "data.setting=seen_cv tests pseudo-unseen classes alone"
        raise StaleError(f"{fault}, not {vocabulary}: the run was trained on the rest")
    subset = data.tested_subset if trained is None else data.test_subset
    wanted = with_any_of(in_subset(videos.values(), subset), classes)
    store = open_all_features(data).annotate(videos)
    chosen = with_features(wanted, store, data.missing, data.duration_mismatch)
    warn_if_coarse(config, chosen, store)
    digests = data_digests(data, videos.values(), split, store) if trained is None else {}
    return TestData(chosen, classes, split, store, skipped=len(wanted) - len(chosen), digests=digests)


def data_digests(data: DataConfig, videos: Iterable[Video], split: ClassSplit, store: FeatureStore) -> dict[str, str]:
    """Digests of the ``segments`` and the ``features`` of the training videos, which tell whether they have changed.

    Labels of seen classes alone count. Of features the ids count, and the values of up to 32 videos: times of files
    change when they are copied.
    """
    chosen: list[Video] = []
    with suppress(StaleError):  # a file without the training videos has changed
        chosen = with_any_of(in_subset(videos, data.train_subset), split.seen)
    chosen = sorted(relabel(chosen, split.seen), key=lambda video: video.id)
    found = [video.id for video in chosen if store.find(video.id) is not None]
    features = hashlib.sha256(repr(found).encode())
    for video_id in found[:: math.ceil(len(found) / 32) or 1]:
        with suppress(StaleError):  # reported where it is loaded
            for part in store.read_parts(video_id):
                features.update(repr(part.shape).encode() + part.tobytes())
    segments = repr([(video.id, video.duration, video.instances) for video in chosen])
    return {"segments": hashlib.sha256(segments.encode()).hexdigest(), "features": features.hexdigest()}


def warn_if_coarse(config: Config, videos: Sequence[Video], store: FeatureStore) -> None:
    """Warn where features were rescaled to fewer snippets than the configuration takes of a video."""
    sample = videos[:8]
    for source in store.sources:
        counts = {len(source.read(video.id)) for video in sample}
        rescaled = source.rescaled or len(counts) == 1 < len({round(video.duration) for video in sample})
        if rescaled and (config.tested_snippets or math.inf) > max(counts):
            wanted = f"data.num_snippets={config.tested_snippets}" if config.tested_snippets else "data.sampling=native"
            message = "%s holds %d snippets of every video, fewer than %s takes: use features at their own rate"
            _log.warning(message, source.path, max(counts), wanted)


def cross_split(trained: DataConfig, data: DataConfig) -> tuple[dict[str, Video], ClassSplit]:
    """The videos of another data set than a run was ``trained`` on, and the run's seen classes with its unseen ones."""
    seen, videos = load_annotations(trained)[1].seen, _read_videos(data)

    def spelled(label: str) -> str:  # Shotput and Shot put
        return phrase(label).lower().replace(" ", "")

    labels, known = all_labels(in_subset(videos.values(), data.test_subset)), set(map(spelled, seen))
    unseen = tuple(label for label in labels if spelled(label) not in known)
    shared = name_some(label for label in labels if label not in unseen)
    if shared:
        _log.warning("classes of %s that were seen in training are left out: %s", data.dataset, shared)
    source = f"trained on {trained.dataset}; {len(labels) - len(unseen)} of {len(labels)} classes were seen: {shared}"
    return videos, ClassSplit(seen, unseen, source)


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
        chosen = known[-1:] if data.instances == "last" else known
        cut = data.shrink * snippet
        shrunk = [replace(item, start=item.start + cut, end=item.end - cut) for item in chosen]
        kept = [item for item in shrunk if item.end - item.start > shortest]
        others = [item for item in video.instances if item.label not in classes]
        reduced.append(replace(video, instances=(*kept, *others)))
    left = with_any_of(reduced, classes)
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

    absent = [video.id for video in videos if store.find(video.id) is None]
    if absent:
        near = next((f" (there is '{name}')" for name in sorted(store.ids) if absent[0] in name), "")
        fault = f"{len(absent)} of {len(videos)} videos have no features in {store.path}: {name_some(absent)}{near}"
        stop_or_skip(missing, fault, "add them, or continue without them by data.missing")
    left = [video for video in videos if store.find(video.id) is not None]
    if mismatch != "keep":
        wrong = {video.id: f"{video.id} in {fault}" for video in left if (fault := duration_mismatch(store, video))}
        if wrong:
            some = name_some(wrong.values())
            fault = f"{len(wrong)} of {len(left)} videos have features far longer or shorter than annotated: {some}"
            fix = "extract them again or correct the annotations, or continue without them by data.duration_mismatch"
            stop_or_skip(mismatch, fault, fix)
        left = [video for video in left if video.id not in wrong]
    if not left:
        raise StaleError(f"none of the {len(videos)} videos has usable features in {store.path}")
    return left
