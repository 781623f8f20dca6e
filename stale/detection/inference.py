"""A run's detections: the trained model's and the untrained rows', written as ActivityNet results."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stale.build import TestData, choose_device, load_test_data, load_tower, phrases, restore_model
from stale.checkpoint import load_checkpoint
from stale.config import Config
from stale.data.dataset import load_features
from stale.data.tower import Tower, require_same_tower
from stale.detection.detector import Results, detect
from stale.detection.formats import results_json
from stale.detection.oracle import DESCRIPTIONS
from stale.detection.untrained import ROWS, detect_untrained
from stale.files import write_json
from stale.model.text import TextEncoder
from stale.run import RunFolder, log_into, start_logging

_log = logging.getLogger(__name__)

CHOSEN_ON = "mAP of held-out training videos, seen classes"
CHOSEN_ON_UNSEEN = "LOSS ON THE UNSEEN TEST CLASSES (as the released code; not zero-shot)"


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
    config = run.load_config()
    if oracle:
        config = replace(config, detection=replace(config.detection, oracle=oracle))
    log_into(run.log, kept)
    path = run.checkpoint(checkpoint)
    state = load_checkpoint(path)
    device = choose_device(device_name, "--device") if device_name else choose_device(config.train.device)
    model = restore_model(config, state, path).to(device)

    test = load_test_data(config, vocabulary)
    require_same_tower(Tower.of(state.get("features", {})), test.store.tower(), f"features {config.data.features}")
    features = load_features([video.id for video in test.videos], test.store, config.data.num_snippets)
    protocol = describe(config, test, vocabulary, checkpoint, state)
    names = phrases(test.classes)
    results = detect(model, test.videos, features, test.classes, names, config.detection)
    written = run.detections(vocabulary, oracle)
    _write(written, results, protocol)
    _log.info("%d videos, %d classes → %s", len(test.videos), len(names), written)
    if oracle:
        return

    if test.store.width != model.text.output_width:
        _log.warning("untrained rows left out: the features do not lie in the text tower's space")
        return
    encoder = TextEncoder(load_tower(config.model), "template", template=config.model.text.template)
    with torch.inference_mode():
        text = encoder(encoder.tokenize(names))
    for row in ROWS:
        results = detect_untrained(row, test.videos, features, text, test.classes, config.detection)
        nothing = {"checkpoint": "none", "checkpoint_chosen_on": "nothing: untrained", "oracle": "none"}
        untrained = {**protocol, **nothing}
        _write(run.untrained(row, vocabulary), results, untrained)


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
        "split": data.split,
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


def _write(path: Path, results: Results, protocol: Mapping[str, Any]) -> None:
    write_json(path, results_json(results, protocol=protocol))
