"""What each part of a trained run contributes (B videos, T snippets, K classes under test, C joint width).

Every value is a fraction, and none is a result: ground truth is used throughout.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import Config
from stale.data.dataset import load_sampled, segment_lists
from stale.data.datasets import facts
from stale.data.selection import TestData, load_annotations, localizer_width, phrases, training_videos
from stale.detection.baselines import min_max_normalize
from stale.detection.oracle import true_targets
from stale.detection.run import class_features, over_batches, propose, to_results
from stale.errors import StaleError
from stale.evaluation import evaluate_results
from stale.evaluation.tables import percent, text_table
from stale.model.stale import Outputs, Stale, initial_model, training_free_text
from stale.training.monitor import copied_weights, relative_changes
from stale.training.targets import Targets, build_targets

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

Sums = dict[tuple[str, str], tuple[Tensor, float]]  # title, row → a batch's sum of values; their number


@torch.no_grad()
def diagnose(config: Config, model: Stale, tests: Mapping[str, TestData]) -> dict[str, Any]:
    """Measure every part on the test videos of each vocabulary.

    Returns:
        ``vocabularies``: vocabulary → title of a table → row → fraction; ``weights``: component → relative change since
        the initialization; ``constant_mask``: half the width, in snippets, of the best mask for training instances.
    """
    if model.localizer is None:
        raise StaleError("the diagnosis compares the masks M, which model.localizer.kind=none does not predict")
    test = next(iter(tests.values()))
    width = test.store.width, localizer_width(test.store, config.data)
    initial, trained = map(copied_weights, (initial_model(config, width, phrases(test.split.seen)), model))
    if {name: len(own) for name, own in initial.items()} != {name: len(own) for name, own in trained.items()}:
        raise StaleError(f"model.text.weights {config.model.text.weights}: not the file that the run was trained with")
    weights, half_width = relative_changes(initial, trained), fit_constant_mask(config)
    found = {name: _diagnose_vocabulary(config, model, test, half_width) for name, test in tests.items()}
    return {"vocabularies": found, "weights": weights, "constant_mask": half_width}


def _diagnose_vocabulary(config: Config, model: Stale, test: TestData, half_width: int) -> dict[str, Any]:
    device = model.background.device
    classes = class_features(model, test.classes)
    original = training_free_text(model, phrases(test.classes)).to(device)
    texts = {"CLIP's original text": original, "learned text": classes.text}

    def load(part: slice) -> Tensor:
        features = load_sampled(test.videos[part], test.store, config.data, config.tested_snippets)
        assert isinstance(features, Tensor)  # a model with M has no other rate
        return features

    def work(part: slice, features: Tensor) -> tuple[Sums, dict[str, Any]]:
        videos, features = test.videos[part], features.to(device).float()
        outputs, results = {}, {}
        for name, oracle in CELLS.items():
            options = config.detection.model_copy(update={"oracle": oracle})
            outputs[name], proposals = propose(model, videos, features, classes, options=options)
            results[name] = to_results(videos, proposals, classes.labels, options)
        truth = true_targets(videos, classes.labels, features.shape[1], device)
        return measure(model, features, outputs["as trained"], truth, texts=texts, half_width=half_width), results

    tious = facts(config.data.dataset, config.data.tious).tious
    size, scores = config.detection.batch_size, {}
    sums, results = zip(*over_batches(len(test.videos), load, work, size=size, progress=True), strict=True)
    for name in CELLS:
        rows = {video: found for batch in results for video, found in batch[name].items()}
        scores[name] = evaluate_results(test.videos, rows, test.classes, tious).average
    return {"videos": len(test.videos), "classes": len(test.classes), **tables_of(sums), MEAN_AP: scores}


def measure(
    model: Stale, features: Tensor, outputs: Outputs, truth: Targets, *, texts: Mapping[str, Tensor], half_width: int
) -> Sums:
    """Sum up what the parts do on one batch (B, T, D); ``texts`` are text features (K, C) of the classes by name."""
    sums: Sums = {}
    foreground, background = truth.foreground, truth.valid & ~truth.foreground

    def add(title: str, row: str, values: Tensor, count: Tensor | float | None = None) -> None:
        number = float(values.numel() if count is None else count)
        sums[title, row] = values.double().sum().cpu(), number

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
        add(SNIPPETS, row, named[foreground])
        best = (cosine * foreground.unsqueeze(1)).sum(2).argmax(1, keepdim=True)  # B × 1
        add(VIDEOS, row, is_true.any(2).gather(1, best))

    # Foreground mask
    assert outputs.mask_logits is not None and truth.masks is not None  # as diagnose has checked
    columns = {"M": outputs.mask_logits.float() > 0}  # B × T × T; sigmoid(0) is 0.5
    position = torch.arange(outputs.num_snippets, device=foreground.device)
    near = (position[:, None] - position[None]).abs() <= half_width
    columns[f"constant mask, {half_width} snippets to either side"] = near.expand_as(truth.masks)
    if outputs.foreground_logits is not None:
        L = outputs.foreground_logits.float().sigmoid()
        area = area_under_curve(L, foreground, background)
        add(FOREGROUND, "AUC against the true foreground, mean over videos", area[area.isfinite()])
        add(FOREGROUND, "standard deviation over time, mean over videos", L.std(1, correction=0))
        above = min_max_normalize(L) > _HALF
        region = F.pad((above[:, 1:] != above[:, :-1]).cumsum(1), (1, 0))  # B × T, numbered along time
        columns["regions of L"] = (region.unsqueeze(2) == region.unsqueeze(1)) & above.unsqueeze(1)

    # Instance masks
    for row, masks in columns.items():
        inter, union = (masks & truth.masks).sum(1), (masks | truth.masks).sum(1)  # B × T
        add(MASKS, row, (inter / union)[foreground])

    # Adaptation: the classes without the background
    if model.adaptation is not None:
        change = (outputs.language[:, :-1] - F.normalize(texts["learned text"], dim=-1)).double()  # B × K × C
        pairs = change.shape[0] * change.shape[1]
        add(ADAPTATION, "change", change.square(), pairs)
        add(ADAPTATION, "part specific to classes", (change - change.mean(1, keepdim=True)).square(), pairs)
        sums[ADAPTATION, "mean over videos"] = change.sum(0).cpu(), float(len(change))
    return sums


def tables_of(batches: Sequence[Sums]) -> dict[str, dict[str, float | None]]:
    """Means of the :func:`measure` of all batches: title → row → fraction, None for a mean of nothing."""
    tables: dict[str, dict[str, Any]] = {}
    for title, row in batches[0]:
        total, count = (sum(sums[title, row][part] for sums in batches) for part in (0, 1))
        tables.setdefault(title, {})[row] = total / count if count else None
    if means := tables.pop(ADAPTATION, {}):  # squared norms, of changes to text of norm 1
        shared = means.pop("mean over videos").square().sum(1).mean()
        means["part specific to videos"] = (means["change"] - shared).clamp(min=0)
        tables[ADAPTATION] = {row: value**0.5 for row, value in means.items()}
    return {
        title: {row: None if value is None else float(value) for row, value in rows.items()}
        for title, rows in tables.items()
    }


def area_under_curve(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """AUC (B,) of scores (B, T): the share of pairs in order, a tie counting half; NaN where a video has no pair."""
    in_order = ((scores.unsqueeze(2) - scores.unsqueeze(1)).sign() + 1) / 2  # B × T × T
    pairs = positive.unsqueeze(2) & negative.unsqueeze(1)
    return (in_order * pairs).sum((1, 2)) / pairs.sum((1, 2))


def fit_constant_mask(config: Config) -> int:
    """Half the width, in snippets, of the constant mask with the highest IoU over all columns in training."""
    videos, split = load_annotations(config.data)
    chosen, T, found = training_videos(config.data, videos.values(), split), config.data.num_snippets, []
    for first in range(0, len(chosen), config.detection.batch_size):
        segments, labels = segment_lists(chosen[first : first + config.detection.batch_size], split.seen, T)
        targets = build_targets(segments, labels, len(split.seen), T)
        assert targets.masks is not None
        columns = targets.masks.transpose(1, 2)[targets.foreground]  # one for each foreground snippet, × T
        start, snippet = columns.float().argmax(1), targets.foreground.nonzero()[:, 1]
        found.append(torch.stack([snippet, start, start + columns.sum(1)]))
    snippet, start, end = torch.cat(found, 1)
    scores = []
    for half_width in range(T):
        first, last = (snippet - half_width).clamp(min=0), (snippet + half_width + 1).clamp(max=T)
        inter = torch.minimum(last, end) - torch.maximum(first, start)  # positive: both contain the snippet
        scores.append((inter / (last - first + end - start - inter)).mean())
    return int(torch.stack(scores).argmax())


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
