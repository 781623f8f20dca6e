"""The report of one evaluation: a single HTML file with tables, error analysis and a timeline of every video.

Sizes: G instances, N detections, K classes, R thresholds, V videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from stale.evaluation.analysis import analyze
from stale.evaluation.assess import Assessment
from stale.evaluation.mean_ap import Detections, GroundTruth, evaluate, match, rank
from stale.evaluation.tables import percent, result_rows, threshold_key
from stale.io import write_json, write_text

MOST_DETECTIONS = 30  # shown of a video, or twice its number of instances where that is more
BUCKET_NAMES = {
    "coverage": "coverage (share of the video)",
    "length": "length (seconds)",
    "instances": "instances of the class in the video",
}


def write_report(assessment: Assessment, folder: str | Path, title: str) -> Path:
    """Write ``folder``/index.html, which needs no other file, and its analysis as analysis.json; return the page."""
    folder = Path(folder)
    truth, found, protocol = assessment.truth, assessment.found, assessment.metrics["protocol"]
    analysis = analyze(truth, found, protocol["tious"], protocol["dataset"])
    write_json(folder / "analysis.json", {"protocol": protocol, **analysis}, indent=1)
    data = timelines(truth, found, protocol["tious"])
    write_text(folder / "index.html", render(title, assessment.metrics, analysis, data))
    return folder / "index.html"


def render(title: str, metrics: Mapping[str, Any], analysis: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The page of ``metrics.json``, ``analysis.json`` and :func:`timelines`; texts that come from files are escaped."""
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("stale.reports"), autoescape=True, **options)
    environment.filters["percent"] = percent
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("report.html").render(
        title=title,
        protocol=metrics["protocol"]["line"].removeprefix("protocol: ").split(" | "),
        rows=[*result_rows(metrics), *metrics["groups"].items()],
        metrics=metrics,
        classes=sorted(metrics["per_class"].items(), key=lambda item: -(item[1]["average"] or 0.0)),
        analysis=analysis,
        bucket_names=BUCKET_NAMES,
        data=data,
    )


def timelines(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> dict[str, Any]:
    """What the script of the page draws: every video with its instances and its best detections.

    Returns:
        ``classes``, ``tious``, ``reference`` (index of the threshold at which the list counts), ``scores`` (steps of
        the slider, rising), ``start`` (its first step), and ``videos``: [id, seconds, AP, instances missed, false
        positives among the G best detections, number of detections, instances [start, end, class, taken], detections
        [start, end, class, score, right]]. ``taken`` and ``right`` have bit r set where that holds at threshold r.
    """
    taken, right = _true_positives(truth, found, tious)
    reference = int(np.abs(np.asarray(tious) - 0.5).argmin())
    order = np.lexsort((-np.arange(len(found)), -found.scores, found.video))
    order = order[found.video[order] >= 0]
    bounds = np.searchsorted(found.video[order], np.arange(len(truth.videos) + 1))
    per_video = np.bincount(truth.video, minlength=len(truth.videos))
    instances_of = np.split(np.argsort(truth.video, kind="stable"), np.cumsum(per_video)[:-1])
    ap, videos, shown = video_ap(truth, found, tious), [], []
    for index, (name, instances) in enumerate(zip(truth.videos, instances_of, strict=True)):
        ranked = order[bounds[index] : bounds[index + 1]]
        best = ranked[: max(MOST_DETECTIONS, 2 * len(instances))]
        shown.append(found.scores[best])
        wrong = (right[ranked[: len(instances)]] >> reference) & 1 == 0
        missed = (taken[instances] >> reference) & 1 == 0
        times, spans = truth.segments[instances].round(2), found.segments[best].round(2)
        counts = [int(missed.sum()), int(wrong.sum()), len(ranked)]
        rows = [[*times.T.tolist(), truth.label[instances].tolist(), taken[instances].tolist()]]
        rows += [[*spans.T.tolist(), found.label[best].tolist(), _short(found.scores[best]), right[best].tolist()]]
        duration = round(float(truth.durations[index]), 2)
        columns = [[list(item) for item in zip(*row, strict=True)] for row in rows]
        videos.append([name, duration, round(float(ap[index]), 4), *counts, *columns])
    scores = np.concatenate(shown) if shown else np.zeros(0)
    # At first about as many detections are shown as there are instances.
    start = int(100 * (1 - min(1.0, len(truth) / max(len(scores), 1))))
    steps = np.quantile(scores, np.linspace(0, 1, 101), method="lower") if len(scores) else np.zeros(101)
    return {
        "classes": list(truth.classes),
        "tious": [threshold_key(tiou) for tiou in tious],
        "reference": reference,
        "scores": _short(steps),
        "start": start,
        "videos": videos,
    }


def video_ap(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> np.ndarray:
    """AP of each video by itself (V): the mean over the thresholds and over the classes that occur in it."""
    num_classes = len(truth.classes)
    groups, label = np.unique(truth.video * num_classes + truth.label, return_inverse=True)
    # One evaluation in which every pair of a video and a class is a class of its own.
    wanted = np.where(found.video >= 0, found.video * num_classes + found.label, -1)
    group = np.searchsorted(groups, wanted)
    known = np.append(groups, -2)[group] == wanted
    of_groups = replace(truth, classes=tuple(map(str, groups)), label=label)
    ap = evaluate(of_groups, replace(found, label=group).take(known), tious).ap.mean(axis=0)
    video = groups // num_classes
    counts = np.bincount(video, minlength=len(truth.videos))
    return np.bincount(video, ap, len(truth.videos)) / np.maximum(counts, 1)


def _true_positives(truth: GroundTruth, found: Detections, tious: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Bit sets of the thresholds at which each instance is taken (G) and each detection is right (N)."""
    order = rank(found)
    taken, right = np.zeros(len(truth), dtype=np.int64), np.zeros(len(found), dtype=np.int64)
    for bit, (position, instance) in enumerate(match(truth, found, order, np.asarray(tious, dtype=np.float64))):
        right[order[position]] |= 1 << bit
        taken[instance] |= 1 << bit
    return taken, right


def _short(scores: np.ndarray) -> list[float]:
    """Scores with four significant digits."""
    return [float(f"{score:.4g}") for score in scores.tolist()]
