"""Pictures of results: the curves of a training, and the bars of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from stale.plots import plain_text

_OURS, _TRAINING_FREE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette
_APART = ("epoch", "step", "seconds_per_step", "total", "gradient_norm", "held_out_mAP")


def draw_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The losses by step and the held-out mAP by epoch, of the records of ``history.jsonl``."""
    steps = [record for record in records if "step" in record]
    scores = {record["epoch"]: 100 * record["held_out_mAP"] for record in records if "held_out_mAP" in record}
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    for name in ("total", *(name for name in steps[-1] if name not in _APART)) if steps else ():
        known = [record for record in steps if name in record]
        width = 2.5 if name == "total" else 1
        left.plot([r["step"] for r in known], [r[name] for r in known], label=name.replace("_", " "), linewidth=width)
    left.set(xlabel="step", title="losses and statistics", yscale="log")
    left.legend(fontsize=7)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.plot(list(scores), list(scores.values()), marker="o", color=_OURS)
    right.set(xlabel="epoch", ylabel="mAP, %", title="held-out videos, seen classes")
    right.set_ylim(0, 1.1 * max([*scores.values(), 1.0]))
    return figure


def draw_bars(title: str, rows: Sequence[tuple[str, float, float, int]], training_free: float | None) -> Figure:
    """A horizontal bar a row: (name, mean, standard deviation, number of runs), with the value written beside it.

    ``training_free`` is the value of the best training-free baseline, drawn as a line. All values are per cent.
    """
    figure = Figure(figsize=(9, 1.3 + 0.4 * len(rows)), layout="constrained", dpi=100)
    ax = figure.subplots()
    names = [plain_text(f"{name} (n = {runs})", 60) for name, _, _, runs in rows]
    means, errors = [row[1] for row in rows], [row[2] for row in rows]
    ax.barh(range(len(rows)), means, xerr=errors, color=_OURS, alpha=0.8, ecolor="#404040")
    for place, (_, mean, error, runs) in enumerate(rows):
        spread = f" ± {error:.1f}" if runs > 1 else ""
        ax.text(mean + error, place, f" {mean:.1f}{spread}", va="center", fontsize=9)
    if training_free is not None:
        label = f"best training-free: {training_free:.1f}"
        ax.axvline(training_free, color=_TRAINING_FREE, linestyle="--", label=label)
        figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    ax.set_yticks(range(len(rows)), names, fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="average mAP, %", title=title, xlim=(0, 1.15 * max([*map(sum, zip(means, errors, strict=True)), 1])))
    ax.spines[["top", "right"]].set_visible(False)
    return figure
