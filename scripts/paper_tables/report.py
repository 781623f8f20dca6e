"""Compare results with the published ones and with those measured before, in Markdown and in per cent."""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from paper_tables.catalog import SETTING_TITLES, Row, Table
from paper_tables.plan import Cell
from stale.config import MODELS, Config
from stale.data.datasets import facts
from stale.data.features import open_features
from stale.errors import StaleError
from stale.evaluation.aggregate import AVERAGE, OTHER, SYSTEM, aggregate, protocol_line, read_runs
from stale.evaluation.tables import markdown, percent, shown_thresholds, spread
from stale.io import read_json, read_text, write_json
from stale.run_folder import BASELINES, RunFolder

LEAST_TOLERANCE = 0.01  # one point of mAP: processors round differently, and training amplifies it


@dataclass(frozen=True)
class Line:
    """One row of a table under one setting of classes. Columns are tIoUs and the average; mAP are fractions."""

    setting: str
    row: Row
    runs: Mapping[int, Path]  # the folders of the finished splits, of ``planned`` ones
    planned: int
    ours: Mapping[str, Mapping[str, Any]]  # column → mean, std, values; empty if nothing is finished
    protocol: str  # of ``ours``
    paired: Mapping[str, Mapping[str, Any]]  # column → this row minus the row ``paired_with``, over the splits of both
    paired_with: str
    published: Mapping[str, float]  # column → result; empty if none was published or could be checked
    source: str  # of ``published``, and whether it used external scores
    obstacle: str  # why ours and ``published`` cannot be compared; empty if they can
    training_free: float | None = None  # the best mean average mAP of a training-free baseline on the same runs

    def difference(self, column: str) -> float | None:
        """Return ours minus the published result, None where they cannot be compared."""
        if self.obstacle or column not in self.ours or column not in self.published:
            return None
        return self.ours[column]["mean"] - self.published[column]


def columns_of(dataset: str, tious: Sequence[float] | None) -> tuple[str, ...]:
    """Return the columns of a data set's tables: thresholds of its protocol, or of ``tious`` (``data.tious``)."""
    return (*shown_thresholds({f"{tiou:.2f}": None for tiou in facts(dataset, tious).tious}), AVERAGE)


def make_lines(table: Table, cells: Sequence[Cell], dataset: str, published: Sequence[Mapping[str, str]]) -> list[Line]:
    """Collect the finished runs of ``cells``, with the published results of the same rows."""
    by_key = {(cell.setting, cell.row.key): cell for cell in cells}
    runs = {
        key: {job.config.data.number: job.folder for job in cell.jobs if cell.test not in job.unfinished()}
        for key, cell in by_key.items()
    }
    columns = columns_of(dataset, cells[0].jobs[0].config.data.tious)
    names = {column: "avg" if column == AVERAGE else f"m{column[2:]}" for column in columns}
    lines = []
    for (setting, key), cell in by_key.items():
        row, mine = cell.row, runs[setting, key]
        ours, paired, protocol, free = {}, {}, "", []
        if mine:
            content = aggregate(_read_metrics(cell, mine.values()))
            ours = content["rows"][SYSTEM]
            free = [content["rows"][name][AVERAGE]["mean"] for name in BASELINES if name in content["rows"]]
            # The epoch, and the number of videos without external scores, differ between runs.
            line = re.sub(r", epoch \d+|, nothing for \d+ of \d+ videos", "", protocol_line(content))
            protocol = line.removeprefix("protocol: ")
        other = by_key.get((setting, row.baseline)) if row.baseline != key else None
        theirs = runs.get((setting, row.baseline), {})
        both = [split for split in mine if split in theirs]
        if other and both:
            own = _read_metrics(cell, [mine[split] for split in both])
            versus = _read_metrics(other, [theirs[split] for split in both])
            paired = aggregate(own, versus)["paired"][OTHER]
        wanted = (row.published or table.published, dataset, SETTING_TITLES[setting], row.method, row.variant)
        columns = ("table", "dataset", "split", "method", "variant")
        known = next((entry for entry in published if tuple(entry[name] for name in columns) == wanted), {})
        results = {column: float(known[name]) / 100 for column, name in names.items() if known.get(name)}
        found = (setting, row, mine, len(cell.jobs), ours, protocol, paired, other.row.name if other else "")
        source = f"{known['source']}; external scores: {known['external_scores']}" if known else ""
        obstacle = _obstacle(row, cell.jobs[0].config, known) if known else ""
        lines.append(Line(*found, results, source, obstacle, training_free=max(free, default=None)))
    return lines


def _read_metrics(cell: Cell, folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Load the metrics of a cell's runs; the row may ask for a trivial row in place of the detections."""
    runs, trivial = read_runs(list(folders), cell.test.metrics), cell.row.trivial
    return {name: {**run, **run["trivial"][trivial]} if trivial else run for name, run in runs.items()}


def _obstacle(row: Row, config: Config, known: Mapping[str, str]) -> str:
    """Say why a result cannot be compared with the published one: other features, or external scores on one side."""
    backbone = backbone_of(config) or "unknown"
    if known["features"] not in ("", backbone):
        return f"it used {known['features']} features, ours are {backbone}"
    if known["external_scores"] == ("no" if row.external else "yes"):
        return f"ours {'used' if row.external else 'did not use'} external scores"
    return ""


def backbone_of(config: Config) -> str:
    """Name the backbone of a configuration's features, as recorded in them, else by the text weights; "" if unknown."""
    paths = [config.data.features] if isinstance(config.data.features, str) else config.data.features
    if paths and all(path and Path(path).exists() for path in paths):
        store = open_features(paths)
        if store.simulated or store.backbone().backbone:
            return "simulated" if store.simulated else store.backbone().backbone
    weights, other = config.model.text.weights, config.model.text.embeddings or config.model.visual_projection
    return weights if weights in MODELS and not other else ""


def read_published(path: Path) -> list[dict[str, str]]:
    """Load the published results, in per cent, each with its source."""
    return list(csv.DictReader(read_text(path, "published results").splitlines()))


def to_markdown(table: Table, lines: Sequence[Line], dataset: str, tious: Sequence[float] | None = None) -> str:
    """Format the table in per cent: published, ours as mean ± std over splits, and the difference."""
    columns = columns_of(dataset, tious)
    parts = [f"## {table.title}: {dataset}"]
    for setting in dict.fromkeys(line.setting for line in lines):
        of_setting = [line for line in lines if line.setting == setting]
        rows = [row for line in of_setting for row in _markdown_rows(line, columns)]
        grid = markdown(["", "mAP, %", *columns], rows)
        parts.append(f"### {SETTING_TITLES[setting]}\n\n{grid}\n\n{_notes(of_setting)}")
    return "\n\n".join(parts) + "\n"


def _markdown_rows(line: Line, columns: Sequence[str]) -> list[list[str]]:
    name, rows = f"**{line.row.name}**", []
    if line.published:
        source = f"{line.source}; not comparable: {line.obstacle}" if line.obstacle else line.source
        rows.append(
            [name, f"published ({source})", *[percent(line.published.get(column), ".1f") for column in columns]]
        )
    runs = f"{line.planned} run{'s' if line.planned > 1 else ''}"
    runs = runs if len(line.runs) == line.planned else f"{len(line.runs)} of {runs}"
    rows.append(["" if rows else name, f"ours ({runs})", *[spread(line.ours.get(column), ".1f") for column in columns]])
    if line.published and line.ours and not line.obstacle:
        rows.append(["", "difference", *[percent(line.difference(column), "+.1f") for column in columns]])
    if line.paired:
        cells = [spread(line.paired.get(column), "+.1f") for column in columns]
        rows.append(["", f"paired with {line.paired_with}", *cells])
    return rows


def _notes(lines: Sequence[Line]) -> str:
    """List each protocol with its rows, and the remarks on rows."""
    protocols: dict[str, list[str]] = {}
    for line in lines:
        if line.protocol:
            protocols.setdefault(line.protocol, []).append(line.row.name)
    texts = [f"{', '.join(names)}: {protocol}" for protocol, names in protocols.items()]
    texts += [f"{line.row.name}: {line.row.note}" for line in lines if line.row.note]
    return "\n".join(f"* {text}" for text in texts) or "* no run is finished"


def to_expected(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Return complete rows by ``setting/row``, each with its tolerance: two standard errors, at least one point."""
    rows = {}
    for line in lines:
        if line.ours and len(line.runs) == line.planned:
            cell = line.ours[AVERAGE]
            commits = {RunFolder(run).read_split().get("revision", "") for run in line.runs.values()}
            rows[f"{line.setting}/{line.row.key}"] = {
                "average_mAP": cell["mean"],
                "std": cell["std"],
                "tolerance": max(LEAST_TOLERANCE, 2 * (cell["std"] or 0.0) / math.sqrt(len(line.runs))),
                "splits": list(line.runs),
                "values": cell["values"],
                "protocol": line.protocol,
                "commit": ", ".join(sorted(commits)),
            }
    return rows


def record(lines: Sequence[Line], known: Mapping[str, Any], path: Path, about: Mapping[str, Any]) -> int:
    """Save complete rows as expected results, with ``about`` where a row changed; return the number of those.

    It is a StaleError if a row of more splits is recorded: delete it first.
    """
    earlier, found = known["rows"], to_expected(lines)
    for name, row in found.items():
        if missing := {*earlier.get(name, {}).get("splits", ())} - {*row["splits"]}:
            raise StaleError(f"{path}: {name} is recorded with splits {sorted(missing)} too; delete it there first")
    changed = {
        name: {**row, **about}
        for name, row in found.items()
        if any(earlier.get(name, {}).get(key) != value for key, value in row.items())
    }
    write_json(path, {**known, "rows": {**earlier, **changed}}, indent=1)
    return len(changed)


def read_expected(path: Path) -> dict[str, Any]:
    """Load a file of expected results."""
    if not path.is_file():
        raise StaleError(f"nothing to check against: {path} does not exist; --record writes it from finished runs")
    content = read_json(path, "expected results")
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        raise StaleError(f"expected results {path}: an object with 'rows' is expected")
    return content


def compare(lines: Sequence[Line], expected: Mapping[str, Any]) -> list[str]:
    """Describe each row that is out of tolerance on its splits, unfinished, or of splits beyond the expected ones."""
    faults = []
    for line in lines:
        known = expected.get(f"{line.setting}/{line.row.key}")
        name = f"{SETTING_TITLES[line.setting]} {line.row.key}"
        if known is None:
            continue
        if len(line.runs) < line.planned or not line.runs.keys() <= {*known["splits"]}:
            faults.append(f"{name}: splits {list(line.runs)} are finished, {known['splits']} are expected")
            continue
        found, wanted, allowed = line.ours[AVERAGE]["mean"], known["average_mAP"], known["tolerance"]
        if len(line.runs) < len(known["splits"]):  # chosen by --splits
            values = dict(zip(known["splits"], known["values"], strict=True))
            wanted = fmean(values[split] for split in line.runs)
        if abs(found - wanted) > allowed:
            faults.append(f"{name}: average mAP {100 * found:.2f}, expected {100 * wanted:.2f} ± {100 * allowed:.2f}")
    return faults
