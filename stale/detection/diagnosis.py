"""What each part of a trained run contributes (B videos, T snippets, K classes under test, C joint width).

Every value is a fraction, and none is a result: ground truth is used throughout.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import Config
from stale.data.dataset import load_sampled
from stale.data.datasets import facts
from stale.data.selection import TestData, localizer_width, phrases
from stale.detection.baselines import min_max_normalize
from stale.detection.oracle import true_targets
from stale.detection.run import class_features, over_batches, propose, to_results
from stale.errors import StaleError
from stale.evaluation import evaluate_results
from stale.evaluation.tables import percent, text_table
from stale.model.stale import Outputs, Stale, initial_model, training_free_text
from stale.training.monitor import copied_weights, relative_changes
from stale.training.targets import Targets

_ORACLES = {"masks": "L", "localizer": "M", "labels": "labels"}
# Cells of the oracle factorial: name → detection.oracle
CELLS = {
    f"true {', '.join(_ORACLES[name] for name in names)}" if names else "as trained": list(names)
    for size in range(len(_ORACLES) + 1)
    for names in combinations(_ORACLES, size)
}
SNIPPETS, VIDEOS = "accuracy, true foreground snippets", "accuracy, videos by their mean true foreground snippet"
FOREGROUND, MASKS = "foreground mask L", "instance masks M, IoU of the columns of true foreground"
ADAPTATION, WEIGHTS = "adaptation, share of the text's norm", "change of weights, share of their initial norm"
MEAN_AP = "average mAP"
_HALF = 0.5  # threshold of M, and of min-max normalized L, for their regions

Values = dict[tuple[str, str], Tensor]  # title, row → the values in a batch, whose mean over all batches is shown


@torch.no_grad()
def diagnose(config: Config, model: Stale, tests: Mapping[str, TestData]) -> dict[str, Any]:
    """Measure every part on the test videos of each vocabulary.

    Returns:
        ``vocabularies``: vocabulary → title of a table → row → fraction; ``weights``: component → relative change since
        the initialization.
    """
    if model.localizer is None:
        raise StaleError("the diagnosis compares the masks M, which model.localizer.kind=none does not predict")
    test = next(iter(tests.values()))
    width = test.store.width, localizer_width(test.store, config.data)
    initial = initial_model(config, width, phrases(test.split.seen)).to(model.background.device)
    try:
        weights = relative_changes(copied_weights(initial), copied_weights(model))
    except (KeyError, RuntimeError):  # weights that are missing, or of another size
        file = config.model.text.weights
        raise StaleError(f"model.text.weights {file}: not the file that the run was trained with") from None
    found = {name: _diagnose_vocabulary(config, model, test) for name, test in tests.items()}
    return {"vocabularies": found, "weights": weights}


def _diagnose_vocabulary(config: Config, model: Stale, test: TestData) -> dict[str, Any]:
    device = model.background.device
    classes = class_features(model, test.classes)
    original = training_free_text(model, phrases(test.classes)).to(device)
    texts = {"CLIP's original text": original, "learned text": classes.text}

    def load(part: slice) -> Tensor:
        features = load_sampled(test.videos[part], test.store, config.data, config.tested_snippets)
        assert isinstance(features, Tensor)  # a model with M has no other rate
        return features

    def work(part: slice, features: Tensor) -> tuple[Values, dict[str, Any]]:
        videos, features = test.videos[part], features.to(device).float()
        outputs, results = {}, {}
        for name, oracle in CELLS.items():
            options = config.detection.model_copy(update={"oracle": oracle})
            outputs[name], proposals = propose(model, videos, features, classes, options=options)
            results[name] = to_results(videos, proposals, classes.labels, options)
        truth = true_targets(videos, classes.labels, features.shape[1], device)
        return measure(model, features, outputs["as trained"], truth, texts=texts), results

    size = config.detection.batch_size
    batches, results = zip(*over_batches(len(test.videos), load, work, size=size, progress=True), strict=True)
    tables: dict[str, dict[str, float | None]] = {}
    for title, row in batches[0]:
        values = torch.cat([batch[title, row] for batch in batches]).double()
        tables.setdefault(title, {})[row] = float(values.mean()) if len(values) else None
    tious, scores = facts(config.data.dataset, config.data.tious).tious, {}
    for name in CELLS:
        rows = {video: found for batch in results for video, found in batch[name].items()}
        scores[name] = evaluate_results(test.videos, rows, test.classes, tious).average
    return {"videos": len(test.videos), "classes": len(test.classes), **tables, MEAN_AP: scores}


def measure(model: Stale, features: Tensor, outputs: Outputs, truth: Targets, *, texts: Mapping[str, Tensor]) -> Values:
    """Measure what the parts do on one batch (B, T, D); ``texts`` are text features (K, C) of the classes by name."""
    values: Values = {}
    foreground, background = truth.foreground, truth.valid & ~truth.foreground

    # Classification
    classified = outputs.classifier_features
    assert classified is not None and outputs.language is not None
    compared = {
        f"{where}, {name}": (x, text)
        for where, x in (("as extracted", features), ("after the temporal model", classified))
        for name, text in texts.items()
        if x.shape[2] == text.shape[1]
    }
    if model.adaptation is not None:
        compared["after the temporal model, adapted text"] = classified, outputs.language[:, :-1]
    is_true = truth.classes[:, :-1] > 0  # B × K × T
    for row, (x, text) in compared.items():
        cosine = F.normalize(text, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)  # B × K × T
        named = is_true.gather(1, cosine.argmax(1, keepdim=True)).squeeze(1)  # B × T
        values[SNIPPETS, row] = named[foreground]
        best = (cosine * foreground.unsqueeze(1)).sum(2).argmax(1, keepdim=True)  # B × 1
        values[VIDEOS, row] = is_true.any(2).gather(1, best).squeeze(1)

    # Foreground mask
    assert outputs.mask_logits is not None and truth.masks is not None  # as diagnose has checked
    columns = {"M": outputs.mask_logits.float() > 0}  # B × T × T; sigmoid(0) is 0.5
    if outputs.foreground_logits is not None:
        L = outputs.foreground_logits.float().sigmoid()
        area = area_under_curve(L, foreground, background)
        values[FOREGROUND, "AUC against the true foreground, mean over videos"] = area[area.isfinite()]
        values[FOREGROUND, "standard deviation over time, mean over videos"] = L.std(1, correction=0)
        above = min_max_normalize(L) > _HALF
        region = F.pad((above[:, 1:] != above[:, :-1]).cumsum(1), (1, 0))  # B × T, numbered along time
        columns["regions of L"] = (region.unsqueeze(2) == region.unsqueeze(1)) & above.unsqueeze(1)

    # Instance masks
    for row, masks in columns.items():
        inter, union = (masks & truth.masks).sum(1), (masks | truth.masks).sum(1)  # B × T
        values[MASKS, row] = (inter / union)[foreground]

    # Adaptation: the classes without the background
    if model.adaptation is not None:
        change = outputs.language[:, :-1] - F.normalize(texts["learned text"], dim=-1)  # B × K × C
        values[ADAPTATION, "change"] = change.norm(dim=2).flatten()
        values[ADAPTATION, "part specific to classes"] = (change - change.mean(1, keepdim=True)).norm(dim=2).flatten()
        values[ADAPTATION, "part specific to videos"] = (change - change.mean(0)).norm(dim=2).flatten()
    return {key: found.cpu() for key, found in values.items()}


def area_under_curve(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """AUC (B,) of scores (B, T): the share of pairs in order, a tie counting half; NaN where a video has no pair."""
    first, second = scores.unsqueeze(2), scores.unsqueeze(1)
    in_order = (first > second).float() + 0.5 * (first == second).float()  # B × T × T
    pairs = positive.unsqueeze(2) & negative.unsqueeze(1)
    return (in_order * pairs).sum((1, 2)) / pairs.sum((1, 2))


def report(found: Mapping[str, Any]) -> str:
    """The tables of :func:`diagnose`, in per cent."""
    columns = found["vocabularies"]
    counts = [f"{name}: {one['videos']} test videos, {one['classes']} classes" for name, one in columns.items()]
    tables = [text_table([f"{WEIGHTS}, %", "run"], [[part, percent(x)] for part, x in found["weights"].items()])]
    for title in (SNIPPETS, VIDEOS, FOREGROUND, MASKS, ADAPTATION, MEAN_AP):
        rows = dict.fromkeys(row for one in columns.values() for row in one.get(title, ()))
        cells = [[row, *(percent(one[title].get(row)) for one in columns.values())] for row in rows]
        tables += [text_table([f"{title}, %", *columns], cells)] if cells else []
    return "\n\n".join(["; ".join(counts), *tables])
