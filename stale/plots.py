"""Pictures of single videos (K classes, T snippets) and of a training, drawn without matplotlib's global state."""

import io
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

from stale.data.annotations import Instance, Video
from stale.errors import printable
from stale.io import atomic_path
from stale.segments import paired_tiou

MOST_CLASSES = 10
_TIOU = 0.5  # of a right detection with the instance that it takes

# Okabe and Ito's palette, which color-blind people can tell apart.
_TRUTH, _RIGHT, _WRONG, _FOREGROUND, _SCORE, _BAND = "#404040", "#0072B2", "#D55E00", "#009E73", "#AA4499", "#EDEDED"
_MISSED: dict[str, Any] = {"facecolor": "none", "edgecolor": _TRUTH, "linestyle": "--"}
_OTHER: dict[str, Any] = {"facecolor": "white", "edgecolor": _TRUTH, "hatch": "////"}  # classes not under test
_THUMBNAIL = 0.85  # inches: as high as a tenth of the axis is wide
_BAR = 0.8  # height of a bar in a row of height 1
_LANE_GAP = 0.4  # between the rows of two classes
_NUMBER = 0.06  # of the axis: the width of a score, which is printed in bars that have room for it

# For Chinese, Japanese, Korean, Hindi and emoji, where they are installed.
_FONTS = {"Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei"}
_FONTS |= {"Noto Sans Devanagari", "Nirmala UI", "Kohinoor Devanagari", "Noto Emoji", "Segoe UI Emoji", "Symbola"}
# What the history of a training holds beside losses and statistics.
_APART = ("epoch", "step", "seconds_per_step", "total", "gradient_norm", "held_out_mAP")

_log = logging.getLogger(__name__)


class Timeline(Figure):
    """A figure that a notebook shows by itself, which it otherwise does only for pyplot's."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()

    def savefig(self, *arguments: Any, **options: Any) -> None:
        """Save it; characters that no font has are one line in place of a warning each."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().savefig(*arguments, **options)
        codes = (re.match(r"Glyph (\d+)", str(warning.message)) for warning in caught)
        if missing := "".join(sorted({chr(int(code[1])) for code in codes if code})):
            _log.warning("no font that is installed has %s; Noto's fonts do", printable(missing))


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
    shown, known = choose_classes(video, classes, best, class_scores), set(classes)
    unknown = dict.fromkeys(instance.label for instance in video.instances if instance.label not in known)
    taken = match(video, best)
    lanes = []  # of each class its instances and its rows of detections
    for label in [*shown, *list(unknown)[:MOST_CLASSES]]:
        truth = [instance for instance in video.instances if instance.label == label]
        rows = stack_rows([item for item in best if item["label"] == label])
        lanes += [(label, truth, rows)] if truth or rows else []
    num_rows = sum(bool(truth) + len(rows) + _LANE_GAP for _, truth, rows in lanes)
    heights = [_THUMBNAIL] if thumbnails else []
    heights += [0.24 * max(num_rows, 1) + 0.1, *([] if foreground is None else [0.8]), 0.3 * len(shown)]
    figure = Timeline(figsize=(10, sum(heights) + 1.9), layout="constrained", dpi=150)
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for ax in axes:
        ax.set_xlim(0, video.duration)
        ax.tick_params(axis="both", labelsize=9, length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        for instance in video.instances:
            ax.axvspan(instance.start, instance.end, color=_BAND, linewidth=0, zorder=0)
    if thumbnails:
        _draw_thumbnails(axes.pop(0), video.duration, thumbnails)
    _draw_lanes(axes[0], lanes, known, None if known.isdisjoint(item.label for item in video.instances) else taken)
    if foreground is not None:
        _draw_foreground(axes[1], video.duration, foreground, threshold)
    _draw_scores(axes[-1], video.duration, shown, class_scores[[list(classes).index(label) for label in shown]])
    axes[-1].tick_params(axis="x", length=3)
    axes[-1].set_xlabel("time (seconds)", fontsize=9)
    figure.suptitle(plain_text(title or video.id, 100), x=0.012, ha="left", fontsize=12, fontweight="bold")
    keys: list[Patch | Line2D] = []
    if len(unknown) < len({instance.label for instance in video.instances}):
        keys += [Patch(color=_TRUTH, label="ground truth, found"), Patch(**_MISSED, label="ground truth, missed")]
        keys += [Patch(fc=(_RIGHT, 0.7), ec=_RIGHT, label=f"✓ right, tIoU ≥ {_TIOU}")]
        keys += [Patch(fc=(_WRONG, 0.7), ec=_WRONG, label="✗ wrong (lower bar)")]
    else:
        keys.append(Patch(fc=(_RIGHT, 0.7), ec=_RIGHT, label="detections"))
    if unknown:
        keys.append(Patch(**_OTHER, label="ground truth of other classes"))
    if foreground is not None:
        keys.append(Patch(color=_FOREGROUND, alpha=0.6, label="foreground mask L"))
        keys += [Line2D([], [], color=_FOREGROUND, ls="--", lw=0.9, label="threshold of L")] if threshold else []
    keys.append(Patch(color=_SCORE, label="class scores"))
    keys.append(Patch(alpha=0, label="opacity: scores from 0 to 1"))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    fallback = sorted(_FONTS & set(font_manager.get_font_names()))
    for text in figure.findobj(Text):
        text.set_fontfamily([*text.get_fontfamily(), *fallback])
    return figure


def draw_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The losses by step and the held-out mAP by epoch, of the records of ``history.jsonl``."""
    steps = [record for record in records if "step" in record]
    scores = {record["epoch"]: 100 * record["held_out_mAP"] for record in records if "held_out_mAP" in record}
    figure = Figure(figsize=(10, 4), dpi=100)  # fixed margins: to look for good ones takes as long as to draw
    left, right = figure.subplots(1, 2, gridspec_kw={"left": 0.06, "right": 0.99, "bottom": 0.12, "top": 0.92})
    for name in ("total", *(name for name in steps[-1] if name not in _APART)) if steps else ():
        known = [record for record in steps if name in record]
        width = 2.5 if name == "total" else 1
        left.plot([r["step"] for r in known], [r[name] for r in known], label=name.replace("_", " "), linewidth=width)
    left.set(xlabel="step", title="losses and statistics", yscale="log")
    left.yaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_locator=NullLocator())
    left.legend(fontsize=7)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.plot(list(scores), list(scores.values()), marker="o", color="#0072B2")
    right.set(xlabel="epoch", ylabel="mAP, %", title="held-out videos, seen classes")
    right.set_ylim(0, 1.1 * max([*scores.values(), 1.0]))
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to ``path`` atomically; the suffix (png, pdf, svg) chooses the format."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")


def plain_text(name: str, limit: int = 28) -> str:
    """A class name that matplotlib draws as it stands: dollars would start a formula, lone surrogates stop it."""
    name = printable(name)
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


def match(video: Video, detections: Sequence[Mapping[str, Any]]) -> dict[int, Instance]:
    """Which detection (by ``id``) takes which instance, if they are visited by falling score as in the evaluation."""
    free, taken = list(video.instances), {}
    for item in sorted(detections, key=lambda item: -item["score"]):
        own = [instance for instance in free if instance.label == item["label"]]
        segments = np.array([(instance.start, instance.end) for instance in own]).reshape(-1, 2)
        overlaps = paired_tiou(np.broadcast_to(np.asarray(item["segment"], float), segments.shape), segments)
        if len(own) and overlaps.max() >= _TIOU:
            taken[id(item)] = own[int(overlaps.argmax())]
            free = [instance for instance in free if instance is not taken[id(item)]]
    return taken


def stack_rows(items: Sequence[Mapping[str, Any]], most_rows: int = 4) -> list[list[Mapping[str, Any]]]:
    """Arrange detections, best first, in rows in which no two overlap; what does not fit is left out."""
    rows: list[list[Mapping[str, Any]]] = []
    for item in items:
        start, end = item["segment"]
        free = (row for row in rows if all(end <= o["segment"][0] or start >= o["segment"][1] for o in row))
        row = next(free, None)
        if row is not None:
            row.append(item)
        elif len(rows) < most_rows:
            rows.append([item])
    return rows


def _draw_lanes(
    ax: Axes, lanes: Sequence[tuple[str, list, list]], known: set[str], taken: Mapping[int, Instance] | None
) -> None:
    """Rows of ground truth and of detections, which are right if they have ``taken`` an instance (None: no truth)."""
    found = [id(instance) for instance in (taken or {}).values()]
    y, ticks = 0.0, {}
    for label, truth, rows in lanes:
        name = plain_text(label)
        if truth:
            ticks[y] = f"{name}: ground truth"
            limit = ax.get_xlim()[1]
            if outside := sum(instance.start >= limit for instance in truth):
                ax.text(limit, y, f" → {outside} past the end", va="center", fontsize=7)
            for instance in truth:
                look = _OTHER if label not in known else {"color": _TRUTH} if id(instance) in found else _MISSED
                ax.barh(y, instance.end - instance.start, _BAR, left=instance.start, linewidth=0.8, **look)
            y += 1
        if rows:
            ticks[y] = "detections" if truth else f"{name}: detections"
        for row in rows:
            for item in row:  # as opaque as its score, on the same scale in every picture
                (start, end), score = item["segment"], item["score"]
                alpha, is_wrong = 0.1 + 0.9 * min(max(score, 0.0), 1.0), taken is not None and id(item) not in taken
                mark, color = ("✗ ", _WRONG) if is_wrong else ("✓ " if taken is not None else "", _RIGHT)
                ax.barh(
                    y, end - start, _BAR * (0.6 if is_wrong else 1), left=start, fc=(color, alpha), ec=color, lw=0.6
                )
                if end - start > _NUMBER * ax.get_xlim()[1]:
                    ink: dict[str, Any] = {"fontsize": 7, "color": "white" if alpha > 0.75 else "black"}
                    ax.text((start + end) / 2, y, f"{mark}{score:.2f}", ha="center", va="center_baseline", **ink)
            y += 1
        y += _LANE_GAP
    ax.set_ylim(max(y, 1) - _LANE_GAP - 0.4, -0.6)
    ax.set_yticks(list(ticks), list(ticks.values()))


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
    """Draw frames in equal cells, side by side in the order of time."""
    width = duration / len(thumbnails)
    for cell, (_, image) in enumerate(thumbnails):
        ax.imshow(image, extent=((cell + 0.02) * width, (cell + 0.98) * width, 0, 1), aspect="auto")
    ax.set(xlim=(0, duration), ylim=(0, 1), yticks=[])
    ax.spines["bottom"].set_visible(False)
