"""The curves of a training."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

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
    right.plot(list(scores), list(scores.values()), marker="o", color="#0072B2")
    right.set(xlabel="epoch", ylabel="mAP, %", title="held-out videos, seen classes")
    right.set_ylim(0, 1.1 * max([*scores.values(), 1.0]))
    return figure
