"""The evaluator against its definition, and its growth with the size. CPU seconds: it is work of one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from scripts.benchmarks.rows import Row, best_of, require_equal, timed
from stale.evaluation import Detections, GroundTruth, evaluate


def bench(scale: float, device: Any = None) -> Iterator[Row]:
    """ActivityNet's validation videos, against the loop form; and ten times as many."""
    tious = np.linspace(0.5, 0.95, 10)
    num_videos = max(int(4728 * scale), 20)
    truth, found = random_case(num_videos)
    seconds = best_of(lambda: evaluate(truth, found, tious), 7, time.process_time)
    loop_seconds, expected = timed(lambda: loop_form(truth, found, tious), time.process_time)
    defined = ~np.isnan(expected)
    require_equal("eval: classes with an AP", ~np.isnan(evaluate(truth, found, tious).ap), defined)
    require_equal("eval: AP", evaluate(truth, found, tious).ap[defined], expected[defined], 1e-9)
    yield Row("eval: mAP against the loop form", loop_seconds, seconds, _size(truth, found, tious))
    large = random_case(10 * num_videos)
    large_seconds = best_of(lambda: evaluate(*large, tious), 5, time.process_time)
    count = len(found)
    allowance = seconds * 10 * math.log(10 * count) / math.log(count)
    yield Row("eval: 10 times the size against n log n", allowance, large_seconds, _size(*large, tious))


def random_case(
    num_videos: int, num_classes: int = 200, a_video: int = 100, seed: int = 0
) -> tuple[GroundTruth, Detections]:
    """Videos of one class with one to three instances, and detections about them, half of the right class."""
    rng = np.random.default_rng(seed)
    duration = rng.uniform(30.0, 240.0, num_videos)
    video_class = rng.integers(0, num_classes, num_videos)
    video = np.repeat(np.arange(num_videos), rng.choice([1, 2, 3], num_videos, p=[0.6, 0.3, 0.1]))
    segments = np.sort(rng.random((len(video), 2)), axis=1) * duration[video, None]
    names = tuple(f"video {i}" for i in range(num_videos)), tuple(f"class {i}" for i in range(num_classes))
    truth = GroundTruth(*names, duration, video, video_class[video], segments)
    owner = np.repeat(np.arange(num_videos), a_video)
    right = rng.random(len(owner)) < 0.5
    label = np.where(right, video_class[owner], rng.integers(0, num_classes, len(owner)))
    first_instance = np.searchsorted(video, owner)
    near = segments[first_instance] + rng.normal(0.0, 5.0, (len(owner), 2))
    far = rng.random((len(owner), 2)) * duration[owner, None]
    found = np.sort(np.where(rng.random((len(owner), 1)) < 0.3, near, far), axis=1)
    return truth, Detections(owner, label, found, rng.random(len(owner)))


def loop_form(truth: GroundTruth, found: Detections, tious: np.ndarray) -> np.ndarray:
    """AP (R, K) by the definition, one detection, threshold and instance after another, over pandas tables."""
    columns = ["start", "end"]
    true = pd.DataFrame(truth.segments, columns=columns).assign(video=truth.video, label=truth.label)
    detected = pd.DataFrame(found.segments, columns=columns)
    detected = detected.assign(video=found.video, label=found.label, score=found.scores)
    table = np.full((len(tious), len(truth.classes)), np.nan)
    found_of_class = detected.groupby("label")
    for label, of_class in true.groupby("label"):
        of_class = of_class.reset_index(drop=True)
        if label in found_of_class.groups:
            table[:, label] = _loop_over_class(of_class, found_of_class.get_group(label), tious)
        else:
            table[:, label] = 0.0
    return table


def _loop_over_class(true: pd.DataFrame, detected: pd.DataFrame, tious: np.ndarray) -> list[float]:
    """AP at each threshold (R) of one class, from its two tables."""
    ranked = detected.iloc[np.argsort(detected["score"].to_numpy(), kind="stable")[::-1]].reset_index(drop=True)
    by_video = true.groupby("video")
    taken = np.zeros((len(tious), len(true)), dtype=bool)
    correct = np.zeros((len(tious), len(ranked)), dtype=bool)
    for place, row in ranked.iterrows():
        try:
            here = by_video.get_group(row["video"])
        except KeyError:
            continue
        overlaps = _tious_with(row, here)
        preference = np.argsort(overlaps, kind="stable")[::-1]
        for threshold, least in enumerate(tious):
            for choice in preference:
                instance = here.index[choice]
                if overlaps[choice] < least:
                    break
                if not taken[threshold, instance]:
                    taken[threshold, instance] = correct[threshold, place] = True
                    break
    return [_area(of_threshold, len(true)) for of_threshold in correct]


def _tious_with(row: pd.Series, here: pd.DataFrame) -> np.ndarray:
    shared = np.minimum(row["end"], here["end"]) - np.maximum(row["start"], here["start"])
    shared = shared.to_numpy().clip(0)
    return shared / ((here["end"] - here["start"]).to_numpy() + (row["end"] - row["start"]) - shared)


def _area(correct: np.ndarray, num_instances: int) -> float:
    precision = np.cumsum(correct) / np.arange(1, len(correct) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[correct].sum() / num_instances)


def _size(truth: GroundTruth, found: Detections, tious: np.ndarray) -> str:
    sizes = (len(truth.videos), "videos"), (len(found), "detections"), (len(truth.classes), "classes")
    return ", ".join(f"{count:,} {what}" for count, what in sizes) + f", {len(tious)} tIoUs"
