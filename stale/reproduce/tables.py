"""Our figures beside the published ones: Markdown, CSV, and the comparison with what we measured before."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stale.errors import StaleError
from stale.evaluation.aggregate import OTHER, SYSTEM, aggregate, protocol_line, read_runs
from stale.evaluation.assess import ROW_NAMES
from stale.files import read_json, read_text
from stale.reproduce.catalog import Table
from stale.reproduce.plan import Cell
from stale.run import RunFolder

TIOUS = {"thumos14": ("0.30", "0.40", "0.50", "0.60", "0.70"), "activitynet": ("0.50", "0.75", "0.95")}
SETTINGS = {"75_25": "75/25", "50_50": "50/50", "closed": "closed set", "seen_cv": "pseudo-unseen classes"}
AVERAGE = "average"
LEAST_TOLERANCE = 0.01  # a point of mAP: other processors add up in another order, and training amplifies it


@dataclass(frozen=True)
class Line:
    """One row under one setting.

    Attributes:
        published: column → fraction, {} where nothing was published or it could not be checked.
        source: of the published figures.
        revisions: the code's commits that made the runs.
        comparable: whether ours are of the features that those are of; else there is no difference to speak of.
        ours: column → mean, std, values (see :func:`stale.evaluation.aggregate.statistics`), {} where nothing is done.
        splits: those that are done, of ``planned``.
        protocol: of our figures.
        baseline: the name of the row that this one is paired with.
        paired: column → statistics of this row minus the baseline over the splits that both have.
        untrained: row that needs no training → statistics of its average mAP over the same splits.
        gains: the same rows → statistics of ours minus theirs, split by split.
    """

    setting: str
    key: str
    name: str
    note: str
    published: Mapping[str, float]
    source: str
    ours: Mapping[str, Mapping[str, Any]]
    splits: tuple[int, ...]
    planned: int
    protocol: str
    baseline: str = ""
    paired: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    untrained: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    revisions: tuple[str, ...] = ()
    comparable: bool = True

    @property
    def complete(self) -> bool:
        """Whether every planned run is in."""
        return len(self.splits) == self.planned

    def difference(self, column: str) -> float | None:
        """Ours minus the published figure."""
        if not self.comparable or column not in self.ours or column not in self.published:
            return None
        return self.ours[column]["mean"] - self.published[column]


def columns_of(dataset: str) -> tuple[str, ...]:
    """The columns of a data set's published tables."""
    return (*TIOUS.get(dataset, TIOUS["activitynet"]), AVERAGE)


def make_lines(
    table: Table,
    cells: Sequence[Cell],
    dataset: str,
    published: Sequence[Mapping[str, str]],
    comparable: bool = True,
) -> list[Line]:
    """The table as far as its runs are finished.

    Args:
        comparable: whether the runs' features are those of the published figures.
    """
    finished = {(cell.setting, cell.row.key): (cell, _finished(cell)) for cell in cells}
    lines = []
    for cell, runs in finished.values():
        baseline = finished.get((cell.setting, cell.row.baseline))
        known = _published_row(table, cell, dataset, published)
        lines.append(_line(cell, runs, baseline, columns_of(dataset), known, comparable))
    return lines


def read_published(path: Path) -> list[dict[str, str]]:
    """The published figures, in per cent, each with its source.

    Raises:
        StaleError: the file is missing or lacks a column.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path, "published figures"))))
    wanted = {"table", "dataset", "split", "method", "variant", "source", "avg"}
    if not rows or not wanted <= set(rows[0]):
        raise StaleError(f"published figures {path}: the columns {', '.join(sorted(wanted))} are expected")
    return rows


def to_markdown(table: Table, lines: Sequence[Line], dataset: str) -> str:
    """The table for people: published, ours as mean ± std over splits, and the difference, in per cent."""
    columns = columns_of(dataset)
    parts = [f"## {table.title}: {dataset}"]
    for setting in dict.fromkeys(line.setting for line in lines):
        of_setting = [line for line in lines if line.setting == setting]
        parts.append(f"### {SETTINGS[setting]}\n\n{_grid(of_setting, columns)}\n\n{_protocols(of_setting)}")
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table, lines: Sequence[Line], dataset: str) -> str:
    """A row a figure, in per cent."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ("table", "dataset", "setting", "row", "column", "published", "source", "ours", "std", "difference")
    writer.writerow([*head, "runs", "planned", "note", "protocol"])
    for line in lines:
        for column in columns_of(dataset):
            ours = line.ours.get(column, {})
            figures = (ours.get("mean"), ours.get("std"), line.difference(column))
            mean, std, difference = map(_plain, figures)
            values = (_plain(line.published.get(column)), line.source, mean, std, difference)
            about = (len(line.splits), line.planned, line.note, line.protocol)
            writer.writerow([table.name, dataset, SETTINGS[line.setting], line.key, column, *values, *about])
    return file.getvalue()


def to_expected(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """What later runs are held against: complete rows by ``setting/row``, each with its tolerance.

    The tolerance is twice the standard error over splits, and a point at least.
    """
    rows = {}
    for line in lines:
        if line.complete and line.ours:
            cell = line.ours[AVERAGE]
            error = (cell["std"] or 0.0) / math.sqrt(len(line.splits))
            rows[f"{line.setting}/{line.key}"] = {
                "average_mAP": cell["mean"],
                "std": cell["std"],
                "tolerance": max(LEAST_TOLERANCE, 2 * error),
                "splits": list(line.splits),
                "values": cell["values"],
                "protocol": line.protocol,
                "commit": ", ".join(line.revisions),
            }
    return rows


def read_expected(path: Path) -> dict[str, Any]:
    """The content of a file of expected figures.

    Raises:
        StaleError: there is none, or it is of another kind.
    """
    if not path.is_file():
        raise StaleError(f"nothing to check against: {path} is not there; --record writes it from finished runs")
    content = read_json(path, "expected figures")
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        raise StaleError(f"expected figures {path}: an object with 'rows' is expected")
    return content


def compare(lines: Sequence[Line], expected: Mapping[str, Any]) -> list[str]:
    """What is out of tolerance, a line each: also a row measured then and not now, or on other splits."""
    faults = []
    for line in lines:
        known = expected.get(f"{line.setting}/{line.key}")
        if known is None:
            continue
        name = f"{SETTINGS[line.setting]} {line.key}"
        if list(line.splits) != known["splits"]:
            faults.append(f"{name}: splits {list(line.splits)} are done, {known['splits']} are expected")
            continue
        found, wanted = line.ours[AVERAGE]["mean"], known["average_mAP"]
        if abs(found - wanted) > known["tolerance"]:
            faults.append(
                f"{name}: average mAP {100 * found:.2f}, expected {100 * wanted:.2f} ± {100 * known['tolerance']:.2f}"
            )
    return faults


def _line(
    cell: Cell,
    runs: Mapping[int, Path],
    baseline: tuple[Cell, Mapping[int, Path]] | None,
    columns: Sequence[str],
    known: Mapping[str, str],
    comparable: bool,
) -> Line:
    ours: Mapping[str, Any] = {}
    untrained: Mapping[str, Any] = {}
    gains: Mapping[str, Any] = {}
    protocol = ""
    if runs:
        content = aggregate(read_runs(runs.values(), cell.test.metrics))
        ours = content["rows"][SYSTEM]
        untrained = {name: content["rows"][name][AVERAGE] for name in ROW_NAMES if name in content["rows"]}
        gains = {name: content["paired"][name][AVERAGE] for name in untrained}
        protocol = re.sub(r", epoch \d+", "", protocol_line(content)).removeprefix("protocol: ")  # another in each run
    row = cell.row
    return Line(
        cell.setting,
        row.key,
        row.name,
        row.note,
        {column: float(known[_key(column)]) / 100 for column in columns if known.get(_key(column))},
        known.get("source", ""),
        ours,
        tuple(runs),
        len(cell.jobs),
        protocol,
        baseline[0].row.name if baseline else "",
        _paired((cell, runs), baseline) if baseline else {},
        untrained,
        gains,
        _revisions(runs.values()),
        comparable,
    )


def _revisions(folders: Iterable[Path]) -> tuple[str, ...]:
    records = [read_json(RunFolder(folder).split, "split of the run") for folder in folders]
    return tuple(sorted({str(record.get("revision")) for record in records}))


def _finished(cell: Cell) -> dict[int, Path]:
    """Split → run folder of the jobs whose test is done."""
    return {job.config.data.number: job.folder for job in cell.jobs if cell.test not in job.unfinished()}


def _paired(row: tuple[Cell, Mapping[int, Path]], baseline: tuple[Cell, Mapping[int, Path]]) -> Mapping[str, Any]:
    """Column → statistics of the differences over the splits that both rows, each with its runs, have."""
    both = [split for split in row[1] if split in baseline[1]]
    if not both:
        return {}
    mine, others = (read_runs([runs[split] for split in both], cell.test.metrics) for cell, runs in (row, baseline))
    return aggregate(mine, others)["paired"][OTHER]


def _published_row(table: Table, cell: Cell, dataset: str, published: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    wanted = (table.published, dataset, SETTINGS[cell.setting], cell.row.method, cell.row.variant)
    keys = ("table", "dataset", "split", "method", "variant")
    return next((row for row in published if tuple(row[key] for key in keys) == wanted), {})


def _key(column: str) -> str:
    """``0.50`` → ``m50``, the published file's name of a column."""
    return "avg" if column == AVERAGE else f"m{column[2:]}"


def _grid(lines: Sequence[Line], columns: Sequence[str]) -> str:
    rows = [
        ["", "average mAP, %" if columns == (AVERAGE,) else "mAP, %", *columns],
        ["---", "---", *["---:"] * len(columns)],
    ]
    for line in lines:
        if line.published:
            source = line.source if line.comparable else f"{line.source}; CLIP features, not comparable"
            cells = [_percent(line.published.get(column)) for column in columns]
            rows.append([f"**{line.name}**", f"published ({source})", *cells])
        count = f"{line.planned} run{'s' if line.planned > 1 else ''}"
        count = count if line.complete else f"{len(line.splits)} of {count}"
        spread = [_spread(line.ours.get(column)) for column in columns]
        rows.append(["" if line.published else f"**{line.name}**", f"ours ({count})", *spread])
        if line.published and line.ours and line.comparable:
            rows.append(["", "difference", *[_signed(line.difference(column)) for column in columns]])
        if line.paired:
            rows.append(["", f"paired with {line.baseline}", *[_gain(line.paired.get(column)) for column in columns]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _protocols(lines: Sequence[Line]) -> str:
    """Each protocol once with the rows it is of, and the notes of the rows."""
    rows: dict[str, list[str]] = {}
    for line in lines:
        if line.protocol:
            rows.setdefault(line.protocol, []).append(line.name)
    texts = [f"{', '.join(names)}: {protocol}" for protocol, names in rows.items()]
    texts += _untrained(lines)
    texts += [f"{line.name}: {line.note}" for line in lines if line.note]
    return "\n".join(f"* {text}" for text in texts) or "* nothing is done yet"


def _untrained(lines: Sequence[Line]) -> list[str]:
    """What needs no training, each row with what ours have above it, split by split."""
    above: dict[str, list[str]] = {}
    for line in lines:
        for name, cell in line.untrained.items():
            row = f"{ROW_NAMES[name]}, splits {', '.join(map(str, line.splits))}: average mAP {_spread(cell)}"
            above.setdefault(row, []).append(f"{line.name} {_gain(line.gains[name])}")
    return [f"{row}; above it: {', '.join(gains)}" for row, gains in above.items()]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}"


def _spread(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return "–"
    return _percent(cell["mean"]) + ("" if cell["std"] is None else f" ± {100 * cell['std']:.1f}")


def _gain(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return "–"
    return _signed(cell["mean"]) + ("" if cell["std"] is None else f" ± {100 * cell['std']:.1f}")


def _plain(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4f}"
