"""Results over runs: mean, standard deviation, confidence interval and paired differences, one protocol only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from stale.errors import StaleError, name_some
from stale.evaluation.assess import ROW_NAMES
from stale.evaluation.report import text_table
from stale.files import read_json

SYSTEM, OTHER = "detections", "versus"
# What must be the same for two numbers to be comparable at all, and what one system keeps over its runs.
SHARED = [
    *("dataset", "setting", "split_source", "subset", "vocabulary"),
    *("tious", "duplicates", "external_scores", "checkpoint_chosen_on", "ground_truth"),
]
OWN = ["oracle", "checkpoint", "features"]
USUAL = {"oracle": "none", "ground_truth": "all"}  # not worth a word

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_STUDENT = (
    (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    + (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
    + (2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)
)


def read_runs(folders: Sequence[str | Path], name: str = "metrics.json") -> dict[str, dict[str, Any]]:
    """The metrics file ``name`` of each run folder, by folder.

    Raises:
        StaleError: one is missing or is not of this project.
    """
    runs: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = Path(folder) / name
        if not path.is_file():
            raise StaleError(f"{path} is missing; evaluate the run first: python eval.py --run {folder}")
        content = read_json(path, "metrics file")
        wanted = ("protocol", "mAP", "average_mAP", "untrained")
        if not isinstance(content, dict) or not all(key in content for key in wanted):
            raise StaleError(f"metrics file {path} lacks one of {', '.join(wanted)}; evaluate the run again")
        if str(folder) in runs:
            raise StaleError(f"run folder given twice: {folder}")
        runs[str(folder)] = content
    return runs


def aggregate(
    runs: Mapping[str, Mapping[str, Any]], versus: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Statistics of every column of every row, and paired differences to the first row.

    Args:
        runs: metrics files (as :func:`read_runs` gives) of one system, one run a split.
        versus: those of a second system over the same splits.

    Returns:
        ``protocol`` (what all runs share), ``splits``, ``rows`` (row → column → statistics) and ``paired`` (row →
        column → statistics of detections minus row). Fractions.

    Raises:
        StaleError: protocols differ, or the splits of two systems are not the same.
    """
    runs, versus = _by_split(runs), _by_split(versus or {})
    _refuse_mixture(runs, SHARED + OWN)
    _refuse_mixture({**runs, **versus}, SHARED)
    _refuse_mixture(versus, OWN)
    splits = [run["protocol"]["split"] for run in runs.values()]
    rows = {SYSTEM: _columns(list(runs.values()))}
    if versus:
        _check_pairs(runs, versus)
        rows[OTHER] = _columns(list(versus.values()))
    rows |= _common_rows(runs, "untrained")
    ours, groups = rows[SYSTEM], _common_rows(runs, "groups")
    paired = {
        name: {column: statistics(ours[column] - row[column]) for column in row}
        for name, row in rows.items()
        if name != SYSTEM
    }
    return {
        "protocol": {key: next(iter(runs.values()))["protocol"].get(key) for key in SHARED + OWN},
        "runs": list(runs),
        "versus": list(versus),
        "splits": splits,
        "rows": {
            name: {column: statistics(v) for column, v in row.items()} for name, row in {**rows, **groups}.items()
        },
        "paired": paired,
    }


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation of the sample, and 95 % confidence interval of the mean (Student's t).

    With one value there is a mean alone.
    """
    values = np.asarray(values, dtype=np.float64)
    count, mean = len(values), float(values.mean())
    if count < 2:
        return {"mean": mean, "std": None, "ci95": None, "values": values.tolist()}
    std = float(values.std(ddof=1))
    half = student_quantile(count - 1) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half], "values": values.tolist()}


def student_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; beyond 30 degrees of freedom by expansion about the normal."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def aggregate_report(content: Mapping[str, Any]) -> str:
    """Tables of :func:`aggregate`'s figures, in per cent, headed by the common protocol."""
    line = protocol_line(content)
    columns = list(content["rows"][SYSTEM])
    names = {SYSTEM: "detections", OTHER: "versus", **ROW_NAMES}
    rows = [
        [names.get(name, name), *(_spread(row[column]) for column in columns)] for name, row in content["rows"].items()
    ]
    parts = [text_table(line, ["mAP, %: mean ± std [95 % interval]", *columns], rows)]
    if content["paired"] and len(content["runs"]) > 1:
        differences = [
            [f"detections − {names.get(name, name)}", *(_spread(row[column]) for column in columns)]
            for name, row in content["paired"].items()
        ]
        parts.append(text_table(line, ["paired differences, points", *columns], differences))
    return "\n\n".join(parts)


def protocol_line(content: Mapping[str, Any]) -> str:
    """The protocol that all runs share, in one line."""
    shared = content["protocol"]
    splits = ", ".join(str(split) for split in content["splits"])
    words = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in shared.items()
        if key not in ("dataset", "tious") and value and USUAL.get(key) != value
    ]
    tious = ", ".join(f"{value:.2f}" for value in shared["tious"])
    runs = f"{len(content['runs'])} runs, splits {splits}"
    return "protocol: " + " | ".join([str(shared["dataset"]), runs, f"tIoU {tious}", *words])


def _by_split(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Runs by rising split; a split twice would count as independent what is not.

    Raises:
        StaleError: some splits occur twice (runs that all have one split, as seeds do, are fine).
    """
    order = sorted(runs, key=lambda name: (str(type(runs[name]["protocol"].get("split"))), _split(runs[name])))
    splits = [_split(runs[name]) for name in order]
    twice = sorted({split for split in splits if splits.count(split) > 1})
    if twice and len(set(splits)) > 1:
        folders = [name for name in order if _split(runs[name]) in twice]
        raise StaleError(f"split {name_some(twice)} given more than once: {name_some(folders)}")
    return {name: runs[name] for name in order}


def _split(run: Mapping[str, Any]) -> Any:
    split = run["protocol"].get("split")
    return -1 if split is None else split


def _refuse_mixture(runs: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> None:
    first_name = next(iter(runs), "")
    for name, key in product(runs, keys):
        one, other = (_comparable(key, runs[each]["protocol"].get(key)) for each in (first_name, name))
        if one != other:
            raise StaleError(
                f"protocols differ in {key}: {first_name} has {one!r}, {name} has {other!r}; "
                "aggregate runs of one protocol only"
            )


def _comparable(key: str, value: Any) -> Any:
    """A protocol entry without what rightly varies from run to run: counts of duplicates, the epoch chosen."""
    if key in ("duplicates", "ground_truth", "oracle"):
        return str(value or USUAL.get(key)).split(" (")[0]
    if key == "checkpoint_chosen_on":
        return re.sub(r",? *\(?epoch \d+\)?", "", str(value))
    return value


def _check_pairs(runs: Mapping[str, Mapping[str, Any]], versus: Mapping[str, Mapping[str, Any]]) -> None:
    mine, theirs = [_split(run) for run in runs.values()], [_split(run) for run in versus.values()]
    if mine != theirs:
        raise StaleError(f"paired differences need the same splits: {mine} against {theirs}")
    for (name, one), (other_name, other) in zip(runs.items(), versus.items(), strict=True):
        for key in ("num_videos", "num_instances", "num_classes"):
            if one["protocol"].get(key) != other["protocol"].get(key):
                raise StaleError(
                    f"{name} and {other_name} were not tested on the same: {key} is "
                    f"{one['protocol'].get(key)} and {other['protocol'].get(key)}"
                )


def _columns(runs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Column → one value a run: mAP by threshold, then the average."""
    table = {key: np.array([run["mAP"][key] for run in runs], dtype=np.float64) for key in runs[0]["mAP"]}
    table["average"] = np.array([run["average_mAP"] for run in runs], dtype=np.float64)
    return table


def _common_rows(runs: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, dict[str, np.ndarray]]:
    """The columns of those rows of a part of the metrics files (untrained, groups) that every run has."""
    first, *others = (run.get(part, {}) for run in runs.values())
    names = [name for name in first if all(name in other for other in others)]
    return {name: _columns([run[part][name] for run in runs.values()]) for name in names}


def _spread(cell: Mapping[str, Any]) -> str:
    mean = f"{100 * cell['mean']:.2f}"
    if cell["std"] is None:
        return mean
    low, high = (100 * value for value in cell["ci95"])
    return f"{mean} ± {100 * cell['std']:.2f} [{low:.2f}, {high:.2f}]"
