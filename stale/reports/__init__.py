"""The report page: one HTML file with the results, the error analysis and the timeline of every video of a run or two.

Sizes: G instances, N detections, K classes, R thresholds, V videos.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from stale.data.annotations import match_video_ids
from stale.data.datasets import facts
from stale.errors import StaleError
from stale.evaluation import analysis
from stale.evaluation.aggregate import statistics
from stale.evaluation.assess import Assessment
from stale.evaluation.mean_ap import Detections, GroundTruth, evaluate
from stale.evaluation.measures import rank_in_video, top1_whole_video
from stale.evaluation.tables import NOT_STATED, percent, result_rows, threshold_key
from stale.io import read_json, write_text
from stale.run_folder import RunFolder

MOST_DETECTIONS = 25  # shown of a video, or twice its number of instances where that is more
MOST_CLASSES = 25  # of the confusion matrix
RECALLS = np.linspace(0, 1, 41)  # where precision is drawn
PLAYED = (".mp4", ".webm", ".mkv", ".m4v", ".mov")  # by browsers
LEVELS = np.array(list("0123456789abcdefghijklmnopqrstuvwxyz"))  # of a curve from 0 to 1, a character a snippet

Rows = list[list[Any]]


@dataclass(frozen=True)
class Subject:
    """What the page shows: a run folder or a detections file, and its evaluation."""

    path: Path
    assessment: Assessment


def write_report(subjects: Sequence[Subject], folder: str | Path, videos: str | Path | None = None) -> Path:
    """Write ``folder``/index.html, which needs no other file but the ``videos`` that it plays, and return it.

    Args:
        subjects: one, or two that were tested on the same; else a StaleError.
        folder: of the page.
        videos: folder of video files, named by their ids.
    """
    page = Path(folder) / "index.html"
    files = {} if videos is None else _video_files(subjects[0].assessment.truth, Path(videos), page.parent)
    write_text(page, render(subjects, files))
    return page


def render(subjects: Sequence[Subject], files: Mapping[str, str]) -> str:
    """The page; texts that come from files are escaped. ``files`` maps a video to its address."""
    first, last = subjects[0].assessment, subjects[-1].assessment
    truth, tious = first.truth, first.metrics["protocol"]["tious"]
    same = all(np.array_equal(value, vars(last.truth)[name]) for name, value in vars(truth).items())
    if not same or tious != last.metrics["protocol"]["tious"]:
        compared = f"{subjects[0].path} and {subjects[-1].path}"
        raise StaleError(f"{compared} were not tested on the same videos, classes, instances and tIoU thresholds")
    reference = int(np.abs(np.asarray(tious) - 0.5).argmin())
    diagnoses = [analysis.diagnose(truth, subject.assessment.found, tious) for subject in subjects]
    links: dict[str, list[int]] = {}  # videos that a click leads to, those with most of what it names first

    def link(run: int, key: str, videos: np.ndarray) -> str:
        found, counts = np.unique(videos[videos >= 0], return_counts=True)
        links[f"{run} {key}"] = found[np.argsort(-counts, kind="stable")].tolist()
        return f"{run} {key}"

    for k in range(len(truth.classes)):
        link(0, f"class {k}", truth.video[truth.label == k])
    runs = [
        {**_head(subject), **_errors(diagnosis, reference, subject, partial(link, r))}
        for r, (subject, diagnosis) in enumerate(zip(subjects, diagnoses, strict=True))
    ]
    ap = [100 * video_ap(truth, subject.assessment.found, tious) for subject in subjects]
    timelines = [_timelines(one, _read_curves(subject)) for one, subject in zip(diagnoses, subjects, strict=True)]
    scores = [[item[3] for video in part for item in video["found"]] or [0.0] for part in timelines]
    columns, cells = _list(ap, diagnoses, reference)
    counts = np.bincount(truth.video, minlength=len(truth.videos))
    instances = np.split(np.argsort(truth.video, kind="stable"), np.cumsum(counts)[:-1])
    data = {
        "classes": list(truth.classes),
        "tious": [threshold_key(tiou) for tiou in tious],
        "reference": reference,
        "kinds": list(analysis.KINDS),
        "runs": [
            {"steps": np.quantile(shown, np.linspace(0, 1, 101), method="lower").tolist(), "precision": _precision(one)}
            for shown, one in zip(scores, diagnoses, strict=True)
        ],
        "links": links,
        "columns": columns,
        "videos": [
            {
                "cells": row,
                "duration": round(float(truth.durations[index]), 2),
                "truth": _rows(truth.segments[instances[index]], truth.label[instances[index]]),
                "runs": [part[index] for part in timelines],
                "file": files.get(truth.videos[index], ""),
            }
            for index, row in enumerate(cells)
        ],
    }
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("stale.reports"), autoescape=True, **options)
    environment.filters["percent"] = percent
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("report.html").render(
        runs=runs,
        comparison=_compare(runs, ap, truth.videos) if len(runs) > 1 else None,
        # At first about as many detections are shown as there are instances.
        start=int(100 * (1 - min(1.0, len(truth) / len(scores[0])))),
        plays=bool(files),
        data=data,
    )


def _head(subject: Subject) -> dict[str, Any]:
    """Name, origin, results and oracle factorial of a run."""
    metrics, run, oracle = subject.assessment.metrics, RunFolder(subject.path), {}
    vocabulary, about = metrics["protocol"]["vocabulary"], {"file": str(subject.path)}
    if subject.path.is_dir():
        about = {"run": str(subject.path), "commit of the training": run.read_split().get("revision", "")}
        if (file := run.detections(vocabulary)).is_file():
            about["detected"] = f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}"
        if run.diagnosis.is_file():
            diagnosis = read_json(run.diagnosis, "diagnosis")
            oracle = diagnosis.get("vocabularies", {}).get(vocabulary, {}).get("average mAP", {})
    protocol = metrics["protocol"]["line"].removeprefix("protocol: ").split(" | ")
    rows = [*result_rows(metrics), *metrics["groups"].items()]
    name = subject.path.resolve().name
    return {"name": name, "about": about, "protocol": protocol, "rows": rows, "oracle": oracle, "metrics": metrics}


def _errors(
    diagnosis: analysis.Diagnosis, reference: int, subject: Subject, link: Callable[[str, np.ndarray], str]
) -> dict[str, Any]:
    """The error analysis of a run at the ``reference`` threshold; ``link`` takes a name and the videos of a part."""
    truth, ranked, kind = diagnosis.truth, diagnosis.ranked, diagnosis.kind[reference]
    top = [diagnosis.top & (kind == k) for k in range(len(analysis.KINDS))]
    missed = ~np.isin(np.arange(len(truth)), diagnosis.taken[reference])
    buckets = analysis.sensitivity(diagnosis, facts(subject.assessment.metrics["protocol"]["dataset"]).buckets)
    for name, rows in buckets.items():
        for row in rows:
            row["link"] = link(f"{name} {row['bucket']}", truth.video[row["chosen"] & missed])
    # Rows: true class. Columns: predicted class, others, missed, background.
    predicted, background = analysis.confusion(diagnosis, float(diagnosis.tious[reference]))
    wrong = np.bincount(truth.label[predicted != truth.label], minlength=len(truth.classes))
    wrong += np.bincount(ranked.label[background], minlength=len(truth.classes))
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES]).tolist()
    column = np.full(len(truth.classes) + 1, len(shown))  # of a predicted class, the last for none
    column[shown], column[-1] = np.arange(len(shown)), len(shown) + 1
    matrix = []
    for k in shown:
        own = [truth.video[(truth.label == k) & (column[predicted] == c)] for c in range(len(shown) + 2)]
        own.append(ranked.video[background & (ranked.label == k)])
        cells = [(len(videos), link(f"cell {k} {c}", videos) if len(videos) else "") for c, videos in enumerate(own)]
        matrix.append((truth.classes[k], cells))
    return {
        "profile": analysis.false_positive_profile(diagnosis),
        "removal": analysis.removal_impact(diagnosis),
        "kinds": [(int(mask.sum()), link(f"kind {k}", ranked.video[mask])) for k, mask in enumerate(top)],
        "buckets": buckets,
        "matrix": matrix,
    }


def _precision(diagnosis: analysis.Diagnosis) -> list[Rows]:
    """Interpolated precision in per mille at :data:`RECALLS` by class and threshold; first the mean over classes."""
    label, counts = diagnosis.ranked.label, diagnosis.num_instances
    bounds = np.searchsorted(label, np.arange(len(counts) + 1))
    table = np.zeros((len(counts) + 1, len(diagnosis.tious), len(RECALLS)))
    for k in np.flatnonzero(counts):
        needed = np.maximum(np.ceil(RECALLS * counts[k] - 1e-9).astype(int), 1) - 1  # which true positive
        for row, kind in zip(table[k + 1], diagnosis.kind[:, bounds[k] : bounds[k + 1]], strict=True):
            positions = np.flatnonzero(kind == 0)
            precision = np.arange(1, len(positions) + 1) / (positions + 1)
            reached = needed < len(positions)
            row[reached] = np.maximum.accumulate(precision[::-1])[::-1][needed[reached]]
    table[0] = table[1:].sum(axis=0) / max((counts > 0).sum(), 1)
    return (1000 * table).round().astype(int).tolist()


def _list(ap: Sequence[np.ndarray], diagnoses: Sequence[analysis.Diagnosis], reference: int) -> tuple[list[str], Rows]:
    """Names of the columns and a row for each video: instances, then of each run ``ap``, and at the ``reference``
    threshold instances missed, false positives among the G best detections, and whether the best one's label is right.
    """
    truth = diagnoses[0].truth
    num_videos, num_classes = len(truth.videos), len(truth.classes)
    instances = np.bincount(truth.video, minlength=num_videos)
    columns, cells = ["video", "inst."], [list(truth.videos), instances.tolist()]
    if len(ap) > 1:
        columns, cells = [*columns, "2 − 1"], [*cells, (ap[1] - ap[0]).round(1).tolist()]
    measured = []
    for own, one in zip(ap, diagnoses, strict=True):
        ranked, taken = one.ranked, one.taken[reference]
        found = np.bincount(ranked.video[taken >= 0], minlength=num_videos)
        wrong = (ranked.video >= 0) & (rank_in_video(ranked) < instances[ranked.video]) & (taken < 0)
        best = top1_whole_video(truth, ranked)
        named = np.isin(best.video * num_classes + best.label, truth.video * num_classes + truth.label)
        top1 = np.where(np.isin(np.arange(num_videos), best.video[named]), "✓", "✗")
        measured.append([own.round(1), instances - found, np.bincount(ranked.video[wrong], minlength=num_videos), top1])
    for name, *values in zip(("AP", "missed", "false pos.", "top-1"), *measured, strict=True):
        columns += [f"{name} {number}" for number in (1, 2)] if len(ap) > 1 else [name]
        cells += [each.tolist() for each in values]
    return columns, [list(row) for row in zip(*cells, strict=True)]


def _timelines(diagnosis: analysis.Diagnosis, curves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every video its ``curves`` and its best detections ``found``: [start, end, class, score, kinds, instance].

    ``kinds`` has a digit a threshold; ``instance`` is the one of the video that a true positive takes: a number, or
    where they differ one a threshold.
    """
    truth, ranked, rank = diagnosis.truth, diagnosis.ranked, rank_in_video(diagnosis.ranked)
    by_video = np.argsort(truth.video, kind="stable")
    number = np.full(len(truth) + 1, -1)  # of each instance within its video; the last one is for none
    number[by_video] = np.arange(len(truth)) - np.searchsorted(truth.video[by_video], truth.video[by_video])
    right: np.ndarray = np.any(diagnosis.taken >= 0, axis=0)
    limit = np.maximum(MOST_DETECTIONS, 2 * np.bincount(truth.video, minlength=len(truth.videos)))
    shown = np.flatnonzero((ranked.video >= 0) & ((rank < limit[ranked.video]) | right))
    shown = shown[np.lexsort((rank[shown], ranked.video[shown]))]
    result: list[dict[str, Any]] = [{"found": [], "curves": curves.get(name, {})} for name in truth.videos]
    for row, position in zip(_rows(ranked.segments[shown], ranked.label[shown]), shown.tolist(), strict=True):
        row += [float(f"{ranked.scores[position]:.4g}"), "".join(map(str, diagnosis.kind[:, position].tolist()))]
        if right[position]:
            takes = number[diagnosis.taken[:, position]].tolist()
            row.append(max(takes) if len({*takes} - {-1}) == 1 else takes)
        result[ranked.video[position]]["found"].append(row)
    return result


def _rows(segments: np.ndarray, label: np.ndarray) -> Rows:
    return [[*segment, k] for segment, k in zip(segments.round(2).tolist(), label.tolist(), strict=True)]


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


def _compare(runs: Sequence[Mapping[str, Any]], ap: Sequence[np.ndarray], videos: Sequence[str]) -> dict[str, Any]:
    """Paired differences, second run minus first, over classes and over videos, and the videos that changed most."""
    rows = [dict(run["rows"]) for run in runs]
    classes = [[row["average"] for row in run["metrics"]["per_class"].values()] for run in runs]
    by_class = np.array([b - a for a, b in zip(*classes, strict=True) if a is not None and b is not None])
    by_video = (ap[1] - ap[0]) / 100
    changed = [i for i in np.argsort(-np.abs(by_video), kind="stable")[:10].tolist() if by_video[i]]
    return {
        "rows": [(name, *(row[name]["average_mAP"] for row in rows)) for name in rows[0] if name in rows[1]],
        "paired": [
            (name, statistics(values), [(np.sign(values) == sign).sum() for sign in (1, -1, 0)])
            for name, values in (("classes", by_class), ("videos", by_video))
        ],
        "changed": [(videos[i], i, ap[0][i] / 100, ap[1][i] / 100) for i in changed],
    }


def _read_curves(subject: Subject) -> dict[str, dict[str, str]]:
    """Video → class (empty: the foreground) → its curve in :data:`LEVELS`, where inference.py saved them."""
    path = RunFolder(subject.path).snippet_scores(subject.assessment.metrics["protocol"]["vocabulary"])
    index = {"": "", **{name: str(k) for k, name in enumerate(subject.assessment.truth.classes)}}
    content = read_json(path, "snippet scores") if path.is_file() else {"protocol": {}, "results": {}}
    checkpoint = content["protocol"].get("checkpoint", NOT_STATED)
    saved = content["results"] if checkpoint == subject.assessment.metrics["protocol"]["checkpoint"] else {}

    def levels(values: Sequence[float]) -> str:
        return "".join(LEVELS[(0.35 * np.clip(values, 0, 100)).round().astype(int)])

    return {
        video: {index[one["label"]]: levels(one["percent"]) for one in curves if one["label"] in index}
        for video, curves in saved.items()
    }


def _video_files(truth: GroundTruth, videos: Path, page: Path) -> dict[str, str]:
    """Video → address of its file relative to the page."""
    paths = {path.stem: path for path in sorted(videos.rglob("*")) if path.suffix.lower() in PLAYED}
    known = match_video_ids(paths, truth.videos)
    if not known:
        raise StaleError(f"--videos {videos}: no file there is a video under test; looked for {' '.join(PLAYED)}")
    return {video: quote(os.path.relpath(paths[name], page)) for name, video in known.items()}
