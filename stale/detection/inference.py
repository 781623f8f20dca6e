"""A run's detections: the trained model's and the untrained rows', written as ActivityNet results.

Videos go through it batch by batch, from their features on the disk to their lines in the files: memory holds a few
batches whatever the number of videos. Several processes (``torchrun``) take the batches by turns and send their
detections to the first, which writes them in order: the same files as one process writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stale import parallel
from stale.build import TestData, choose_device, load_test_data, phrases, restore_model, untrained_text
from stale.checkpoint import load_checkpoint
from stale.config import Config
from stale.data.annotations import Video
from stale.data.dataset import load_features
from stale.data.tower import Tower, require_same_tower, require_same_width
from stale.detection.detector import Results, describe_classes, detect_batch
from stale.detection.formats import entries_json, results_file
from stale.detection.oracle import DESCRIPTIONS
from stale.detection.stream import in_batches, read_ahead
from stale.detection.untrained import ROWS, detect_untrained
from stale.files import remove_leftovers
from stale.memory import names_knob
from stale.model.stale import Stale
from stale.run import RunFolder, log_into, start_logging

_log = logging.getLogger(__name__)

CHOSEN_ON = "mAP of held-out training videos, seen classes"
CHOSEN_ON_UNSEEN = "LOSS ON THE UNSEEN TEST CLASSES (as the released code; not zero-shot)"


@dataclass(frozen=True)
class Row:
    """A file of detections in the making.

    Attributes:
        snippets: at how many a video is read.
        detect: a batch's videos and their features (B, snippets, D), on the model's device → their detections.
    """

    path: Path
    protocol: Mapping[str, Any]
    snippets: int
    detect: Callable[[Sequence[Video], Tensor], Results]


def infer(
    run: RunFolder,
    checkpoint: str = "best",
    vocabulary: str = "unseen",
    device_name: str | None = None,
    oracle: str | None = None,
) -> None:
    """Detect the classes of ``vocabulary`` in the run's test videos.

    Args:
        checkpoint: ``best``, ``last`` or a file.
        vocabulary: ``unseen``, ``seen`` or ``all`` classes.
        device_name: in place of the run's ``train.device``.
        oracle: ``masks`` or ``proposals``: ground truth in place of a prediction; the detections go to a file of
            their own, see :meth:`RunFolder.detections`.

    Raises:
        StaleError: no run, no checkpoint, or data that do not fit.
    """
    kept = start_logging()
    parallel.hush_others()
    config = run.load_config()
    if oracle:
        config = replace(config, detection=replace(config.detection, oracle=oracle))
    if parallel.is_first():
        log_into(run.log, kept)
    path = run.checkpoint(checkpoint)
    state = load_checkpoint(path)
    setting = "--device" if device_name else "train.device"
    device = parallel.own_device(choose_device(device_name or config.train.device, setting), setting)
    model = restore_model(config, state, path).to(device)

    test = load_test_data(config, vocabulary)
    require_same_tower(Tower.of(state.get("features", {})), test.store.tower(), f"features {config.data.features}")
    require_same_width(state["feature_width"], test.store.width, f"features {config.data.features}", "use those")
    protocol = describe(config, test, vocabulary, checkpoint, state)
    rows = [_trained(run.detections(vocabulary, oracle), protocol, model, test, config)]
    if not oracle:
        rows += _untrained(run, vocabulary, protocol, model, test, config)
    _write(rows, test, config, device)
    _log.info("%d videos, %d classes → %s", len(test.videos), len(test.classes), rows[0].path)


def _trained(path: Path, protocol: Mapping[str, Any], model: Stale, test: TestData, config: Config) -> Row:
    text = describe_classes(model, phrases(test.classes), config.detection.templates)

    def detect(videos: Sequence[Video], features: Tensor) -> Results:
        return detect_batch(model, videos, features, text, test.classes, config.detection)

    return Row(path, protocol, config.tested_snippets, detect)


@torch.inference_mode()
def _untrained(
    run: RunFolder, vocabulary: str, protocol: Mapping[str, Any], model: Stale, test: TestData, config: Config
) -> list[Row]:
    """One each of :data:`ROWS`; none where features and text cannot be compared."""
    if test.store.width != model.text.output_width:
        _log.warning("untrained rows left out: the features do not lie in the text tower's space")
        return []
    text = untrained_text(config.model, phrases(test.classes)).to(model.background.device)
    made_by = {**protocol, "checkpoint": "none", "checkpoint_chosen_on": "nothing: untrained", "oracle": "none"}

    def row(name: str) -> Row:
        def detect(videos: Sequence[Video], features: Tensor) -> Results:
            return detect_untrained(name, videos, features, text, test.classes, config.detection)

        return Row(run.untrained(name, vocabulary), made_by, config.data.num_snippets, detect)

    return [row(name) for name in ROWS]


def _write(rows: Sequence[Row], test: TestData, config: Config, device: torch.device) -> None:
    """All files in a single pass over the features; the first row's is there last."""
    parts = in_batches(test.videos, config.detection.batch_size)

    def read(videos: Sequence[Video]) -> dict[int, Tensor]:
        ids, lengths = [video.id for video in videos], {row.snippets for row in rows}
        return {length: load_features(ids, test.store, length) for length in lengths}

    def entries(videos: Sequence[Video], features: dict[int, Tensor]) -> list[str]:
        size = config.detection.batch_size
        with names_knob("detection.batch_size", size, "; a run's config.yaml may be changed there"):
            moved = {length: block.to(device) for length, block in features.items()}
            return [entries_json(row.detect(videos, moved[row.snippets])) for row in rows]

    own = (entries(*batch) for batch in read_ahead(read, parallel.share(parts)))
    bar = tqdm(total=len(test.videos), desc="detect", unit="video", leave=False, disable=not parallel.is_first())
    with bar, ExitStack() as stack:
        writers = [_start(row, stack) for row in rows] if parallel.is_first() else []
        for number, texts in enumerate(parallel.in_order(own, len(parts))):
            for write, text in zip(writers, texts, strict=True):
                write(text)
            bar.update(len(parts[number]))


def _start(row: Row, stack: ExitStack) -> Callable[[str], None]:
    """What takes a row's detections, until the end of ``stack``."""
    remove_leftovers(row.path)
    return stack.enter_context(results_file(row.path, protocol=row.protocol))


def describe(
    config: Config, test: TestData, vocabulary: str, checkpoint: str, state: Mapping[str, Any]
) -> dict[str, Any]:
    """The protocol under which detections were made: what an evaluation must know and a reader should."""
    data, best = config.data, state["best"]
    chosen_on = f"nothing: epoch {state['epoch']}"
    if state.get("step"):
        chosen_on += f", and {state['step']} steps of the next"
    if checkpoint == "best":
        chosen_on = f"{CHOSEN_ON_UNSEEN if 'unseen_loss' in best else CHOSEN_ON}, epoch {best['epoch']}"
    return {
        "dataset": data.dataset,
        "setting": data.setting,
        "split": data.number,
        "split_source": test.split.source,
        "subset": data.tested_subset,
        "vocabulary": vocabulary,
        "classes": test.classes,
        "unseen_classes": list(test.split.unseen),
        "annotations": data.annotations,
        "features": data.features if isinstance(data.features, str) else " + ".join(data.features),
        "checkpoint": checkpoint,
        "checkpoint_chosen_on": chosen_on,
        "oracle": _oracle(config),
        "skipped_videos": test.skipped,
    }


def _oracle(config: Config) -> str:
    """Which ground truth took a prediction's place."""
    of_test = DESCRIPTIONS[config.detection.oracle]
    if config.model.masking.kind != "gt":
        return of_test
    in_model = "GROUND-TRUTH MASKS in training and at test time"
    return in_model if config.detection.oracle != "proposals" else f"{in_model}, {of_test}"
