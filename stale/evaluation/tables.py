"""What a reader sees of an evaluation: the protocol that decides what a number means, and tables in per cent.

A report is a list of texts and tables, which :func:`render` makes text of at most 100 columns, Markdown, LaTeX or CSV
of. ``metrics`` is always the content of ``metrics.json``.
"""

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from stale.errors import StaleError, counted, name_some, printable

WIDTH = 100
MOST_THRESHOLDS = 7  # of more thresholds a table shows the first, the middle and the last
NOT_STATED = "not stated"
RANDOM, TOP1_LABEL, EXTERNAL_LABEL = "random", "top1_label_whole_video", "external_label_whole_video"
ROW_NAMES = {
    "whole_video": "training-free: top-1 label, whole video",
    "whole_video_all_classes": "training-free: all labels, whole video",
    "snippets": "training-free: top-1 label, thresholded snippets",
    "snippets_all_classes": "training-free: all labels, thresholded snippets",
    RANDOM: "random",
    TOP1_LABEL: "top-1 label of the detections, whole video",
    EXTERNAL_LABEL: "top-1 external label, whole video",
}
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # heads and rows
FORMATS = ("text", "markdown", "latex", "csv")


def describe(protocol: Mapping[str, Any]) -> str:
    """A protocol (see :func:`stale.evaluation.assess.assess`) in one line, with ``|`` between its parts."""
    split = "" if protocol["split"] is None else f", split {protocol['split']}"
    source = f" ({protocol['split_source']})" if protocol["split_source"] else ""
    skipped = f", {protocol['skipped_videos']} skipped" if protocol["skipped_videos"] else ""
    checkpoint = f"{protocol['checkpoint']}, chosen on {protocol['checkpoint_chosen_on']}"
    counts = f"{counted(protocol['num_videos'], 'video')}{skipped}, {counted(protocol['num_instances'], 'instance')}"
    vocabulary = "all seen in training" if protocol["setting"] == "closed" else protocol["vocabulary"]
    classes = f"{counted(protocol['num_classes'], 'class')} ({vocabulary})"
    parts = [
        f"{protocol['dataset']}, {protocol['name']}",
        f"setting {protocol['setting']}{split}{source}",
        f"subset {protocol['subset']}: {counts}, {classes}",
        f"tIoU {format_tious(protocol['tious'])}",
        f"duplicates {protocol['duplicates']}",
        f"external scores {protocol['external_scores']}",
        *([] if protocol["oracle"] == "none" else [f"ORACLE: {protocol['oracle']}"]),
        *([] if protocol["ground_truth"] == "all" else [f"ground truth {protocol['ground_truth']}"]),
        *([] if protocol["features"] == NOT_STATED else [f"features {protocol['features']}"]),
        f"checkpoint {NOT_STATED if protocol['checkpoint'] == NOT_STATED else checkpoint}",
    ]
    return "protocol: " + " | ".join(parts)


def protocol_lines(line: str) -> str:
    """The parts of a protocol line, each on a line of its own."""
    first, *parts = line.split(" | ")
    wrapped = [textwrap.wrap(part, WIDTH - 2, subsequent_indent="  ") for part in parts]
    return "\n".join([first, *(f"  {piece}" for pieces in wrapped for piece in pieces)])


def format_tious(tious: Sequence[float]) -> str:
    """``0.50:0.05:0.95`` for even steps, else the thresholds one by one."""
    steps = {round(after - before, 6) for before, after in zip(tious, tious[1:], strict=False)}
    if len(tious) > 2 and len(steps) == 1:
        return f"{tious[0]:.2f}:{steps.pop():.2f}:{tious[-1]:.2f}"
    return ", ".join(f"{value:.2f}" for value in tious)


def check_tious(tious: Sequence[float]) -> tuple[float, ...]:
    """The thresholds; a StaleError if there are none, one is not in (0, 1], or one is given twice."""
    wrong = [value for value in tious if not isinstance(value, (int, float)) or not 0 < value <= 1]
    if wrong or not tious:
        raise StaleError(f"tIoU thresholds lie in (0, 1], not {wrong[:1]}; 30 % is 0.3")
    if len({threshold_key(value) for value in tious}) < len(tious):
        raise StaleError(f"a tIoU threshold is given twice (two decimals count): {list(tious)}")
    return tuple(float(value) for value in tious)


def threshold_key(tiou: float) -> str:
    """A threshold as the key of a JSON object: ``0.50``."""
    return f"{tiou:.2f}"


def report(metrics: Mapping[str, Any], verbose: bool = False) -> list[str | Table]:
    """The report of one evaluation: protocol, tables, problems; ``verbose`` adds intervals and the classes' AP."""
    recall = {f"AR@{k}": value for k, value in metrics["average_recall"].items()}
    measures = {**recall, "top-1": metrics["top1_accuracy"]}
    parts: list[str | Table] = [
        protocol_lines(metrics["protocol"]["line"]),
        map_table("mAP, %", result_rows(metrics), verbose),
        (["recall and accuracy, %", *measures], [["detections", *map(percent, measures.values())]]),
    ]
    if metrics["groups"]:
        parts.append(map_table("mAP, %", [("all classes", metrics), *metrics["groups"].items()]))
    if verbose:
        ranked = sorted(metrics["per_class"].items(), key=lambda item: -(item[1]["average"] or 0.0))
        named = [
            (f"{label} ({one['num_ground_truth']})", {**one, "average_mAP": one["average"]}) for label, one in ranked
        ]
        parts.append(map_table("AP, %, by class (instances)", named))
    if silent := metrics["num_videos_without_detections"]:
        parts.append(f"note: {silent} of {metrics['num_videos']} videos have no detection: their instances are missed")
    for one in metrics["problems"]:
        names = printable(name_some(one["names"]))
        share = f"{one['count']} of {counted(metrics['num_listed'], 'detection')}"
        text = f"warning: {share} with {one['kind']}: {names}; {one['treatment']}"
        parts.append(textwrap.fill(text, WIDTH, subsequent_indent="  "))
    return parts


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The detections, the rows to compare them with, and where the error sits, each with its name."""
    external = ", external scores" if EXTERNAL_LABEL in metrics["trivial"] else ""
    rows = {**metrics["trivial"], **metrics["baselines"]}
    return [
        (f"detections{external}", metrics),
        *((ROW_NAMES.get(name, name), row) for name, row in rows.items()),
        ("detected segments with true labels", metrics["detected_segments_true_labels"]),
        ("true segments with predicted labels", metrics["true_segments_predicted_labels"]),
        ("class-agnostic", metrics["class_agnostic"]),
    ]


def map_table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], intervals: bool = False) -> Table:
    """A table of named summaries (see :func:`stale.evaluation.assess.summary`)."""
    keys = shown_thresholds(rows[0][1]["mAP"])
    cells = [[name, *(percent(row["mAP"][key]) for key in keys), percent(row["average_mAP"])] for name, row in rows]
    if intervals:
        cells = [[*cell, interval(row.get("ci95"))] for cell, (_, row) in zip(cells, rows, strict=True)]
    return [title, *keys, "average", *(["95 %, over classes"] if intervals else [])], cells


def shown_thresholds(by_threshold: Mapping[str, Any]) -> list[str]:
    """The thresholds that a table has room for."""
    keys = list(by_threshold)
    return keys if len(keys) <= MOST_THRESHOLDS else [keys[0], keys[len(keys) // 2], keys[-1]]


def render(parts: Sequence[str | Table], form: str = "text") -> str:
    """Format a report in one of :data:`FORMATS`; texts are comments in LaTeX and CSV."""
    makers = {"text": text_table, "markdown": markdown, "latex": _latex, "csv": _csv}
    prefix = {"latex": "% ", "csv": "# "}.get(form, "")
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = part.replace("\n  ", "\n- ") if form == "markdown" else part
            texts.append("\n".join(prefix + line for line in part.splitlines()))
        else:
            heads, rows = part
            table = [[printable(cell) for cell in row] for row in (heads, *rows)]
            texts.append(makers[form](table[0], table[1:]))
    return "\n\n".join(texts)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _latex(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular of the booktabs package."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    special |= {"–": "--", "−": "$-$", **{each: f"\\{each}" for each in "&%$#_{}"}}
    first, *others = (
        " & ".join("".join(special.get(each, each) for each in cell) for cell in row) + r" \\" for row in (heads, *rows)
    )
    columns = "l" + "r" * (len(heads) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", first, r"\midrule", *others, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


def _csv(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([heads, *rows])
    return file.getvalue().rstrip("\n")


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first left-aligned and cut to fit."""
    table = [[printable(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    widths[0] = max(8, min(widths[0], WIDTH - sum(2 + width for width in widths[1:])))
    lines = []
    for name, *cells in table:
        short = name if len(name) <= widths[0] else name[: widths[0] - 1] + "…"
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([short.ljust(widths[0]), *aligned]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def percent(value: float | None, form: str = ".2f") -> str:
    """A fraction in per cent; a dash where there is none."""
    return "–" if value is None else f"{100 * value:{form}}"


def spread(cell: Mapping[str, Any] | None, form: str = ".2f") -> str:
    """Mean and standard deviation of fractions in per cent; a dash where there are none."""
    if cell is None:
        return "–"
    mean = percent(cell["mean"], form)
    return mean if cell["std"] is None else f"{mean} ± {percent(cell['std'], form.lstrip('+'))}"


def interval(ends: Sequence[float] | None) -> str:
    """A confidence interval of fractions, in per cent."""
    return "–" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"
