"""Tables for people, from the dictionaries that ``metrics.json`` holds. Values in per cent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stale.evaluation.assess import EXTERNAL_LABEL, ROW_NAMES


def report(metrics: Mapping[str, Any], per_class: bool = True) -> str:
    """The full report of one evaluation, headed by its protocol line."""
    parts = [main_table(metrics), other_measures(metrics)]
    if metrics["groups"]:
        parts.append(group_table(metrics))
    if per_class:
        parts.append(class_table(metrics))
    if metrics["problems"]:
        parts.append(problem_list(metrics["problems"]))
    return "\n\n".join(parts)


def main_table(metrics: Mapping[str, Any]) -> str:
    """mAP at each tIoU and on average, of the detections and of the rows to hold them against."""
    rows = result_rows(metrics)
    rows.append(("detected segments with true labels", metrics["detected_segments_true_labels"]))
    rows.append(("true segments with predicted labels", metrics["true_segments_predicted_labels"]))
    rows.append(("class-agnostic (localization alone)", metrics["class_agnostic"]))
    return map_table(metrics["protocol"]["line"], rows)


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The detections, the trivial and the untrained rows, each with its name."""
    external = EXTERNAL_LABEL in metrics["trivial"]
    rows = [("detections, external scores" if external else "detections", metrics)]
    for part in ("trivial", "untrained"):
        rows += [(ROW_NAMES.get(name, name), row) for name, row in metrics[part].items()]
    return rows


def group_table(metrics: Mapping[str, Any]) -> str:
    """Seen, unseen and all classes of a generalised run side by side."""
    rows = [("all classes", metrics), *metrics["groups"].items()]
    return map_table(metrics["protocol"]["line"], rows)


def other_measures(metrics: Mapping[str, Any]) -> str:
    """Recall and top-1 accuracy, headed by the protocol line."""
    recall = metrics["average_recall"]
    heads = [f"AR@{k}" for k in recall] + ["top-1"]
    values = [percent(value) for value in recall.values()] + [percent(metrics["top1_accuracy"])]
    return text_table(metrics["protocol"]["line"], ["", *heads], [["detections", *values]])


def class_table(metrics: Mapping[str, Any]) -> str:
    """AP of every class, best first."""
    classes = sorted(metrics["per_class"].items(), key=lambda item: -(item[1]["average"] or 0.0))
    rows = [(f"{label} ({row['num_ground_truth']})", {"average_mAP": row["average"], **row}) for label, row in classes]
    return map_table(metrics["protocol"]["line"], rows, first="class (instances)")


def problem_list(problems: Sequence[Mapping[str, Any]]) -> str:
    """What was odd in the detections, a line each."""
    lines = []
    for one in problems:
        names = one["names"]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"warning: {one['count']} with {one['kind']}: {', '.join(names[:5])}{more}; {one['treatment']}")
    return "\n".join(lines)


def map_table(line: str, rows: Sequence[tuple[str, Mapping[str, Any]]], first: str = "mAP, %") -> str:
    """Rows of ``{"mAP": {"0.50": fraction}, "average_mAP": fraction}`` under a protocol line."""
    keys = list(rows[0][1]["mAP"])
    cells = [[name, *(percent(row["mAP"][key]) for key in keys), percent(row["average_mAP"])] for name, row in rows]
    return text_table(line, [first, *keys, "average"], cells)


def text_table(line: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first left-aligned, under the protocol line."""
    table = [list(heads), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    return "\n".join([line, lines[0], "-" * len(lines[0]), *lines[1:]])


def percent(value: float | None) -> str:
    """A fraction as per cent with two decimals; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.2f}"
