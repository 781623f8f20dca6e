"""Pictures of single videos, drawn by matplotlib without a display and without its global state.

K classes, T snippets.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stale.data.annotations import Instance, Video
from stale.files import atomic_path

MOST_CLASSES = 10

# Okabe and Ito's palette, which colour-blind people can tell apart; what a class is, its row says and not a colour.
_TRUTH, _DETECTION, _FOREGROUND, _SCORE, _BAND = "#404040", "#D55E00", "#009E73", "#0072B2", "#EDEDED"
_THUMBNAIL = 0.85  # inches: as high as a tenth of the axis is wide
_BAR = 0.8  # height of a bar in a row of height 1
_LANE_GAP = 0.4  # between the rows of two classes


class Timeline(Figure):
    """A figure that a notebook shows by itself, which it otherwise does only for pyplot's."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()


@dataclass(frozen=True)
class Lane:
    """One class's rows of the upper panel: its ground truth, below it its detections where they do not overlap."""

    label: str
    truth: list[Instance]
    rows: list[list[Mapping[str, Any]]]


def draw_timeline(
    video: Video,
    classes: Sequence[str],
    detections: Sequence[Mapping[str, Any]],
    class_scores: np.ndarray,
    foreground: np.ndarray | None = None,
    threshold: float | None = None,
    title: str = "",
    top: int = 10,
    thumbnails: Sequence[tuple[float, np.ndarray]] = (),
) -> Figure:
    """One video's timeline: ground truth, detections, foreground mask and the snippets' class scores.

    Args:
        video: its duration and ground truth in seconds. Instances outside ``classes`` are drawn hatched.
        classes: the K labels under test; of more than ten those that matter most in this video are shown.
        detections: ``{"segment": [start, end] seconds, "label", "score"}``; the ``top`` best are shown.
        class_scores: (K, T), from 0 to 1.
        foreground: L (T,), from 0 to 1; None leaves its panel out.
        threshold: where L is cut.
        title: default the video's id.
        thumbnails: (time in seconds, image (H, W, 3) uint8), shown in their order above everything else.
    """
    best = sorted(detections, key=lambda item: -item["score"])[:top]
    shown = choose_classes(video, classes, best, class_scores)
    lanes = [lane for label in _with_strangers(video, classes, shown) if (lane := _lane(label, video, best))]
    num_rows = sum(bool(lane.truth) + len(lane.rows) + _LANE_GAP for lane in lanes)
    heights = [0.24 * max(num_rows, 1) + 0.1, *([] if foreground is None else [0.8]), 0.3 * len(shown)]
    heights = [*([_THUMBNAIL] if thumbnails else []), *heights]
    figure = Timeline(figsize=(10, sum(heights) + 1.7), layout="constrained", dpi=150)
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for ax in axes:
        _prepare(ax, video)
    if thumbnails:
        _draw_thumbnails(axes.pop(0), video.duration, thumbnails)
    _draw_lanes(axes[0], lanes, set(classes))
    if foreground is not None:
        _draw_foreground(axes[1], video.duration, foreground, threshold)
    scores = class_scores[[list(classes).index(label) for label in shown]]
    _draw_scores(axes[-1], video.duration, shown, scores)
    axes[-1].tick_params(axis="x", length=3)
    axes[-1].set_xlabel("time (seconds)", fontsize=9)
    figure.suptitle(plain_text(title or video.id, 100), x=0.012, ha="left", fontsize=12, fontweight="bold")
    keys = _legend(lanes, set(classes), foreground is not None, threshold is not None)
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 5), frameon=False, fontsize=8.5)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to ``path`` atomically; the ending (png, pdf, svg) chooses the format."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")


def plain_text(name: str, limit: int = 28) -> str:
    """A class name that matplotlib draws as it stands: dollars would start a formula."""
    short = name if len(name) <= limit else name[: limit - 1] + "…"
    return short.replace("$", r"\$")


def choose_classes(
    video: Video, classes: Sequence[str], detections: Sequence[Mapping[str, Any]], class_scores: np.ndarray
) -> list[str]:
    """At most ten of ``classes``: those that occur in ``video``, then those detected, then by highest score (K, T).

    Of more than ten classes, those that neither occur nor are detected must reach a score of a fifth.
    """
    occurring = [instance.label for instance in video.instances]
    detected = [item["label"] for item in detections]
    highest = class_scores.max(1)
    order = np.argsort(-highest, kind="stable").tolist()
    by_score = [classes[k] for k in order if len(classes) <= MOST_CLASSES or highest[k] >= 0.2 or k == order[0]]
    known = set(classes)
    return [label for label in dict.fromkeys([*occurring, *detected, *by_score]) if label in known][:MOST_CLASSES]


def pack(items: Sequence[Mapping[str, Any]], most_rows: int = 4) -> list[list[Mapping[str, Any]]]:
    """Detections, best first, into rows in which no two overlap; what finds no room in ``most_rows`` is left out."""
    rows: list[list[Mapping[str, Any]]] = []
    for item in items:
        start, end = item["segment"]
        for row in rows:
            if all(end <= other["segment"][0] or start >= other["segment"][1] for other in row):
                row.append(item)
                break
        else:
            if len(rows) < most_rows:
                rows.append([item])
    return rows


def _with_strangers(video: Video, classes: Sequence[str], shown: Sequence[str]) -> list[str]:
    known = set(classes)
    strangers = dict.fromkeys(instance.label for instance in video.instances if instance.label not in known)
    return [*shown, *list(strangers)[:MOST_CLASSES]]


def _lane(label: str, video: Video, detections: Sequence[Mapping[str, Any]]) -> Lane | None:
    truth = [instance for instance in video.instances if instance.label == label]
    rows = pack([item for item in detections if item["label"] == label])
    return Lane(label, truth, rows) if truth or rows else None


def _prepare(ax: Axes, video: Video) -> None:
    ax.set_xlim(0, video.duration)
    ax.tick_params(axis="y", labelsize=9, length=0)
    ax.tick_params(axis="x", labelsize=9, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    for instance in video.instances:
        ax.axvspan(instance.start, instance.end, color=_BAND, linewidth=0, zorder=0)


def _draw_lanes(ax: Axes, lanes: Sequence[Lane], known: set[str]) -> None:
    highest = max((item["score"] for lane in lanes for row in lane.rows for item in row), default=1.0)
    y, ticks = 0.0, []
    for lane in lanes:
        ticks.append(y)
        for instance in lane.truth:
            _draw_truth(ax, instance, y, lane.label in known)
        y += bool(lane.truth)
        for row in lane.rows:
            for item in row:
                _draw_detection(ax, item, y, item["score"] / (highest or 1.0))
            y += 1
        y += _LANE_GAP
    ax.set_ylim(max(y, 1) - _LANE_GAP - 0.4, -0.6)
    ax.set_yticks(ticks, [plain_text(lane.label) for lane in lanes])


def _draw_truth(ax: Axes, instance: Instance, y: float, known: bool) -> None:
    look = {"color": _TRUTH} if known else {"facecolor": "white", "edgecolor": _TRUTH, "hatch": "////"}
    ax.barh(y, instance.end - instance.start, _BAR, left=instance.start, linewidth=0.8, **look)


def _draw_detection(ax: Axes, item: Mapping[str, Any], y: float, strength: float) -> None:
    start, end = item["segment"]
    alpha = 0.12 + 0.88 * strength
    ax.barh(y, end - start, _BAR, left=start, facecolor=(_DETECTION, alpha), edgecolor=_DETECTION, linewidth=0.6)
    if end - start > 0.045 * ax.get_xlim()[1]:
        colour = "white" if alpha > 0.75 else "black"
        ax.text((start + end) / 2, y, f"{item['score']:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _draw_foreground(ax: Axes, duration: float, foreground: np.ndarray, threshold: float | None) -> None:
    edges = np.linspace(0, duration, len(foreground) + 1)
    ax.stairs(foreground, edges, fill=True, color=_FOREGROUND, alpha=0.45)
    ax.stairs(foreground, edges, color=_FOREGROUND, linewidth=1.2)
    if threshold is not None:
        ax.axhline(threshold, color=_FOREGROUND, linewidth=0.9, linestyle="--")
    ax.set_ylim(0, 1.02)
    ax.set_yticks([0, 1], ["0", "1"])
    ax.set_ylabel("foreground\nmask L", rotation=0, ha="right", va="center", fontsize=9)


def _draw_scores(ax: Axes, duration: float, labels: Sequence[str], scores: np.ndarray) -> None:
    """A heat map with a row a class: opaque where the score is 1, clear where it is 0."""
    image = np.empty((*scores.shape, 4))
    image[..., :3], image[..., 3] = to_rgb(_SCORE), scores.clip(0, 1)
    ax.imshow(image, extent=(0, duration, len(labels), 0), aspect="auto", interpolation="nearest")
    for row in range(1, len(labels)):
        ax.axhline(row, color="white", linewidth=2)
    ax.set_ylim(len(labels), 0)
    ax.set_yticks(np.arange(len(labels)) + 0.5, [plain_text(label) for label in labels])


def _draw_thumbnails(ax: Axes, duration: float, thumbnails: Sequence[tuple[float, np.ndarray]]) -> None:
    """Frames in equal cells, side by side in the order of time; a tick under each would only repeat the axis."""
    width = duration / len(thumbnails)
    for cell, (_, image) in enumerate(thumbnails):
        ax.imshow(image, extent=((cell + 0.02) * width, (cell + 0.98) * width, 0, 1), aspect="auto")
    ax.set_xlim(0, duration)
    ax.set_ylim(0, 1)
    ax.set_yticks([])
    ax.spines["bottom"].set_visible(False)


def _legend(lanes: Sequence[Lane], known: set[str], foreground: bool, threshold: bool) -> list[Patch | Line2D]:
    keys: list[Patch | Line2D] = []
    if any(lane.truth for lane in lanes):
        keys.append(Patch(color=_TRUTH, label="ground truth"))
    if any(lane.label not in known for lane in lanes):
        keys.append(Patch(facecolor="white", edgecolor=_TRUTH, hatch="////", label="… of a class not asked for"))
    keys.append(Patch(facecolor=(_DETECTION, 0.7), edgecolor=_DETECTION, label="detections, opacity by score"))
    if foreground:
        keys.append(Patch(color=_FOREGROUND, alpha=0.6, label="foreground mask L"))
        if threshold:
            keys.append(Line2D([], [], color=_FOREGROUND, linestyle="--", linewidth=0.9, label="its threshold"))
    return [*keys, Patch(color=_SCORE, label="snippet class scores, opacity from 0 to 1")]
