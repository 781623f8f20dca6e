"""A table as bars: the average mAP of every row, published and ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from stale.plots import save_figure
from stale.reproduce.catalog import Table
from stale.reproduce.tables import AVERAGE, SETTINGS, Line

_PUBLISHED, _OURS = "#b0b7bf", "#2563a8"


def draw_table(table: Table, lines: Sequence[Line], dataset: str, path: Path) -> None:
    """A panel a setting, a bar a row with our standard deviation over splits, the published one where comparable."""
    settings = list(dict.fromkeys(line.setting for line in lines))
    most = max(sum(line.setting == setting for line in lines) for setting in settings)
    figure = Figure(figsize=(1.5 + 4.2 * len(settings), 1.6 + 0.5 * most), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for ax, setting in zip(panels, settings, strict=True):
        of_setting = [line for line in lines if line.setting == setting]
        _draw_panel(ax, of_setting)
        ax.set_title(SETTINGS[setting], fontsize=10)
    figure.legend(*panels[-1].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle(f"{table.title}: {dataset}", fontsize=11)
    save_figure(figure, path)


def _draw_panel(ax, lines: Sequence[Line]) -> None:
    places = range(len(lines))
    ours = [100 * line.ours[AVERAGE]["mean"] if line.ours else 0 for line in lines]
    spread = [100 * (line.ours[AVERAGE]["std"] or 0) if line.ours else 0 for line in lines]
    if any(line.published and line.comparable for line in lines):
        published = [100 * line.published.get(AVERAGE, 0) for line in lines]
        ax.barh([place - 0.2 for place in places], published, 0.38, color=_PUBLISHED, label="published")
    ax.barh([place + 0.2 for place in places], ours, 0.38, xerr=spread, color=_OURS, label="ours, mean ± std")
    ax.set_yticks(list(places), [line.name for line in lines], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("average mAP, %", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
