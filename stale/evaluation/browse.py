"""One HTML page to browse a run's videos: sorted by AP, filtered by class, each with its timeline.

K classes, T snippets.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stale.data.annotations import Video
from stale.evaluation.mean_ap import evaluate_results
from stale.evaluation.web import document, embed_json
from stale.plots import choose_classes

MOST_DETECTIONS = 30  # of a video, on the page

_STYLE = (
    "body{max-width:1080px}th button{font:inherit;font-weight:bold;border:0;background:none;padding:0;cursor:pointer}"
    "th[aria-sort=ascending] button::after{content:' ▲'}th[aria-sort=descending] button::after{content:' ▼'}"
    ".list{max-height:24em;overflow:auto;border:1px solid #ddd}.list table{margin:0;width:100%}"
    ".list th{position:sticky;top:0;background:#f2f4f7}tr[aria-current]{background:#fff3e6}"
    "label{margin-right:1.5em}select,input,button{font:inherit}a:focus,button:focus,select:focus,input:focus"
    "{outline:3px solid #0072B2;outline-offset:1px}#detail{border-top:2px solid #ddd;margin-top:1.5em}"
    "#detail:focus{outline:none}svg{width:100%;height:auto;font-size:13px}.heat{image-rendering:pixelated}"
    "caption{text-align:left;font-weight:bold}#detail td:nth-child(2),#detail th:nth-child(2){text-align:left}"
    ".key{color:#555}"
)
_COLUMNS = {"id": "video", "duration": "length", "instances": "instances", "found": "detections", "ap": "AP, %"}
_KEY = (
    "Timeline: ground truth dark (hatched where its class is not under test), detections orange, opacity by score, "
    "foreground mask green with its threshold dashed, snippet scores blue, opacity from 0 to 1. Keys: Tab and Enter; "
    "arrows walk the list; Escape closes a timeline. AP is the mean over the protocol's tIoU thresholds and the "
    "classes that occur in the video; where a class is chosen, of that class."
)


class Seen(Protocol):
    """What the page needs of a video: :class:`stale.detection.explain.VideoDetections`."""

    video: Video
    classes: list[str]
    detections: list[dict[str, Any]]
    class_scores: np.ndarray
    foreground: np.ndarray | None
    threshold: float


def browse_page(title: str, protocol: str, videos: Sequence[Seen], tious: Sequence[float]) -> str:
    """The page of ``videos``, which share their classes.

    Args:
        protocol: one line, what is shown and how it was made.
        tious: thresholds of AP.
    """
    classes = list(videos[0].classes) if videos else []
    strangers = sorted({item.label for seen in videos for item in seen.video.instances} - set(classes))
    labels = [*classes, *strangers]
    data = {
        "labels": labels,
        "known": len(classes),
        "threshold": videos[0].threshold if videos else 0.5,
        "videos": [video_record(seen, {label: n for n, label in enumerate(labels)}, tious) for seen in videos],
    }
    heads = "".join(
        f'<th scope="col"><button type="button" data-key="{key}">{html.escape(name)}</button></th>'
        for key, name in _COLUMNS.items()
    )
    body = [
        f'<p class="protocol">{html.escape(protocol)}</p>',
        '<p><label>Class <select id="class"><option value="">all</option></select></label>'
        '<label>Find <input id="search" type="search"></label><span id="count" role="status"></span></p>',
        f'<div class="list"><table><thead><tr>{heads}</tr></thead><tbody id="rows"></tbody></table></div>',
        '<section id="detail" tabindex="-1" aria-label="timeline" hidden></section>',
        f'<p class="key">{html.escape(_KEY)}</p><noscript>This page needs JavaScript.</noscript>',
        embed_json("data", data),
    ]
    script = Path(__file__).with_name("browse.js").read_text(encoding="utf-8")
    return document(title, "\n".join(body), _STYLE, script)


def video_record(seen: Seen, index: Mapping[str, int], tious: Sequence[float]) -> dict[str, Any]:
    """One video as the page's script takes it: times in seconds, classes by ``index``, curves as base64 bytes."""
    video = seen.video
    metrics = evaluate_results([video], {video.id: seen.detections}, seen.classes, tious)
    per_class = metrics.ap.mean(0)
    best = sorted(seen.detections, key=lambda item: -item["score"])[:MOST_DETECTIONS]
    shown = choose_classes(video, seen.classes, best, seen.class_scores)
    return {
        "id": video.id,
        "duration": round(video.duration, 3),
        "ap": _number(np.nanmean(per_class)) if metrics.num_instances.any() else None,
        "aps": {
            index[label]: _number(value)
            for label, value, count in zip(metrics.classes, per_class, metrics.num_instances, strict=True)
            if count
        },
        "truth": [[round(item.start, 2), round(item.end, 2), index[item.label]] for item in video.instances],
        "count": len(seen.detections),
        "found": [
            [*(round(time, 2) for time in item["segment"]), index[item["label"]], _number(item["score"])]
            for item in best
        ],
        "mask": None if seen.foreground is None else _curve(seen.foreground),
        "scores": [[index[label], _curve(seen.class_scores[seen.classes.index(label)])] for label in shown],
    }


def _number(value: float) -> float:
    return round(float(value), 4)


def _curve(values: np.ndarray) -> str:
    """Values from 0 to 1 (T) as T bytes in base64."""
    return base64.b64encode((np.clip(values, 0, 1) * 255).round().astype(np.uint8).tobytes()).decode()
