"""The error analysis for people: pictures, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stale.evaluation.analysis import KINDS, analyze
from stale.evaluation.assess import Assessment
from stale.evaluation.report import percent, result_rows
from stale.evaluation.web import document, html_table
from stale.files import atomic_path, write_json, write_text
from stale.plots import plain_text

COLORS = ("#2f8f4e", "#9ccf8e", "#2c6fbb", "#f2a48c", "#c8362b", "#b9c4d0")
BAR = "#2c6fbb"
SHOWN_CLASSES = 25
TITLES = {
    "false_positives": "False positives",
    "sensitivity": "Sensitivity to the kind of instance",
    "missed": "Missed ground truth",
    "confusion": "Confusion of classes",
}
CHARACTERISTICS = {
    "coverage": "coverage (share of the video)",
    "length": "length (seconds)",
    "instances": "instances of the class in the video",
}
EXPLANATIONS = {
    "false_positives": "Left: what the best G detections of every class are (G = its number of instances), the "
    "next G, and so on. Right: how much average mAP_N would rise if all false positives of one kind were gone.",
    "sensitivity": "Average mAP_N on the instances of each bucket alone; the dashed line is that of all instances. "
    "Under each bucket its upper edge and its number of instances.",
    "missed": "Share of the instances of each bucket that no detection takes, mean over the thresholds.",
    "confusion": "What the top G detections of each class really show, where they overlap an instance: shares of "
    "each row (true class) among the classes shown, which are those most often confused if there are many.",
}
DEFINITIONS = (
    "Definitions follow DETAD (Alwassel, Caba Heilbron, Escorcia, Ghanem: Diagnosing Error in Temporal Action "
    "Detectors, ECCV 2018). A false positive is a double detection (tIoU ≥ α with an instance of its label already "
    "taken), wrong label (tIoU ≥ α with another label), localization (0.1 ≤ tIoU < α, its label), confusion "
    "(0.1 ≤ tIoU < α, another label) or background, in this order; α runs over the protocol's thresholds and means "
    "are shown. mAP_N is mAP with precision normalized to the average number of instances a class."
)


def write_analysis(assessment: Assessment, folder: str | Path) -> Path:
    """Write ``analysis.json``, a PNG for each part, and ``index.html`` with all of it inside.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    protocol = assessment.protocol
    analysis = analyze(assessment.truth, assessment.found, protocol.tious, protocol.dataset)
    write_json(folder / "analysis.json", {"protocol": protocol.as_dict(), **analysis}, indent=1)
    pictures = {}
    for name, figure in draw(analysis).items():
        with atomic_path(folder / f"{name}.png") as path:
            figure.savefig(path, dpi=110)
        pictures[name] = (folder / f"{name}.png").read_bytes()
    write_text(folder / "index.html", page(assessment.as_dict(), analysis, pictures))
    return folder / "index.html"


def draw(analysis: Mapping[str, Any]) -> dict[str, Figure]:
    """The pictures of an analysis by name."""
    base = analysis["removal"]["average_mAP_N"]
    return {
        "false_positives": draw_false_positives(analysis),
        "sensitivity": draw_buckets(analysis["sensitivity"], "average mAP_N, %", base),
        "missed": draw_buckets(analysis["missed"], "missed, %"),
        "confusion": draw_confusion(analysis["confusion"]),
    }


def draw_false_positives(analysis: Mapping[str, Any]) -> Figure:
    """Stacked shares of the kinds in each band, and the gain from removing each kind."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    profile, impact = figure.subplots(1, 2, width_ratios=(3, 2))
    counts = np.array(analysis["false_positives"]["counts"])
    shares = 100 * np.array(analysis["false_positives"]["bands"])
    bottom = np.zeros(len(shares))
    for kind, name in enumerate(KINDS):
        profile.bar(range(1, len(shares) + 1), shares[:, kind], bottom=bottom, color=COLORS[kind], label=name)
        bottom += shares[:, kind]
    ticks = [f"{band} G\n{count}" for band, count in enumerate(counts, start=1)]
    profile.set_xticks(range(1, len(shares) + 1), ticks, fontsize=8)
    profile.set(xlabel="band of detections by score, and how many there are", ylabel="share, %", ylim=(0, 100))
    figure.legend(*profile.get_legend_handles_labels(), loc="outside upper center", ncol=6, frameon=False)
    gains = [100 * value for value in analysis["removal"]["gain"].values()]
    bars = impact.bar(range(len(gains)), gains, color=COLORS[1:])
    impact.bar_label(bars, fmt="%.1f")
    impact.set_xticks(range(len(gains)), [name.replace(" ", "\n") for name in KINDS[1:]], fontsize=8)
    impact.set(ylabel="gain in average mAP_N, points", ylim=(0, max(1.0, 1.15 * max(gains))))
    _tidy(profile, impact)
    return figure


def draw_buckets(parts: Mapping[str, Sequence[Mapping[str, Any]]], ylabel: str, base: float | None = None) -> Figure:
    """Bars for the buckets of each characteristic; ``base`` is drawn as a dashed line."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True)
    highest = max(one["value"] or 0.0 for buckets in parts.values() for one in buckets)
    for ax, (name, buckets) in zip(axes, parts.items(), strict=True):
        values = [100 * (one["value"] or 0.0) for one in buckets]
        bars = ax.bar(range(len(buckets)), values, color=BAR)
        labels = ["none" if one["value"] is None else f"{100 * one['value']:.1f}" for one in buckets]
        ax.bar_label(
            bars, labels, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8}, padding=2
        )
        ax.set_xticks(range(len(buckets)), [bucket_name(one) for one in buckets], fontsize=8)
        ax.set(xlabel=CHARACTERISTICS[name], ylim=(0, max(1.0, 118 * max(highest, base or 0.0))))
        if base is not None:
            ax.axhline(100 * base, color="#444", linestyle="--", linewidth=1)
    axes[0].set_ylabel(ylabel)
    _tidy(*axes)
    return figure


def draw_confusion(confusion: Mapping[str, Any]) -> Figure:
    """The confusion matrix, rows normalized; with many classes, those that are most often confused."""
    counts = np.array(confusion["counts"])
    off_diagonal = counts - np.diag(np.diag(counts))
    involved = off_diagonal.sum(axis=0) + off_diagonal.sum(axis=1)
    shown = np.sort(np.argsort(-involved, kind="stable")[:SHOWN_CLASSES])
    shares = counts[shown][:, shown] / np.maximum(counts[shown].sum(axis=1, keepdims=True), 1)
    side = 3.0 + 0.28 * len(shown)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [plain_text(confusion["classes"][index]) for index in shown]
    ax.set_xticks(range(len(shown)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(range(len(shown)), names, fontsize=8)
    ax.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=ax, shrink=0.7, label="share of the row")
    return figure


def page(metrics: Mapping[str, Any], analysis: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page; every text that comes from files is escaped.

    Args:
        metrics: as ``metrics.json``.
        pictures: PNGs by name.
    """
    parts = [
        f'<p class="protocol">{html.escape(metrics["protocol"]["line"])}</p>',
        _results_table(metrics),
    ]
    for name, title in TITLES.items():
        data = base64.b64encode(pictures[name]).decode()
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(EXPLANATIONS[name])}</p>")
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    parts += [_pairs_table(analysis["confusion"]["pairs"]), _class_table(metrics), "<h2>Definitions</h2>"]
    parts.append(f"<p>{html.escape(DEFINITIONS)}</p>")
    return document("Error analysis", "\n".join(parts))


def bucket_name(bucket: Mapping[str, Any]) -> str:
    """Three lines for an axis: name, range and count."""
    edge = f"> {bucket['above']:g}" if bucket["up_to"] is None else f"≤ {bucket['up_to']:g}"
    return f"{bucket['bucket']}\n{edge}\n({bucket['count']})"


def _results_table(metrics: Mapping[str, Any]) -> str:
    cells = [
        [name, *(percent(value) for value in row["mAP"].values()), percent(row["average_mAP"])]
        for name, row in result_rows(metrics)
    ]
    return html_table(["mAP, %", *metrics["mAP"], "average"], cells)


def _class_table(metrics: Mapping[str, Any]) -> str:
    classes = sorted(metrics["per_class"].items(), key=lambda item: -(item[1]["average"] or 0.0))
    cells = [[label, row["num_ground_truth"], percent(row["average"])] for label, row in classes]
    return "<h2>Classes</h2>" + html_table(["class", "instances", "average AP, %"], cells)


def _pairs_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return "<p>No detection overlaps an instance of another class.</p>"
    return html_table(["true", "predicted", "detections"], [[p["true"], p["predicted"], p["count"]] for p in pairs])


def _tidy(*axes: Axes) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", linestyle=":", color="#bbb")
        ax.set_axisbelow(True)
