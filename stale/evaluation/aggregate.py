"""Results over runs of one protocol: mean, standard deviation, confidence interval, paired differences."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stale.config import WITHOUT_EFFECT, read_settings
from stale.errors import StaleError, name_some
from stale.evaluation.tables import (
    ROW_NAMES,
    Table,
    format_tious,
    interval,
    percent,
    protocol_lines,
    shown_thresholds,
    spread,
)
from stale.io import read_json
from stale.records import MetricsFile, check_record
from stale.run_folder import RunFolder

SYSTEM, OTHER, AVERAGE = "detections", "versus", "average"
# Two numbers are comparable only where these are the same; the second list may differ between two systems.
SHARED = [
    *("dataset", "setting", "split_source", "subset", "vocabulary"),
    *("tious", "duplicates", "external_scores", "checkpoint_chosen_on", "ground_truth"),
]
OWN = ["oracle", "checkpoint", "features"]
USUAL = {"oracle": "none", "ground_truth": "all"}  # not mentioned
# Settings that may differ between the runs of one system; features and the source of the splits are in the protocol.
FREE = {
    *("data.split", "data.fold", "data.annotations", "data.features", "data.localizer_features"),
    *("data.splits", "train.seed", *WITHOUT_EFFECT),
}

# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom.
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def read_runs(folders: Sequence[str | Path], name: str = "metrics.json") -> dict[str, dict[str, Any]]:
    """The metrics file ``name`` of each run folder, by folder; a StaleError if one is missing or of another kind."""
    runs: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = Path(folder) / name
        if not path.is_file():
            more = "".join(f" --vocabulary {word}" for word in ("seen", "all") if name == f"metrics_{word}.json")
            raise StaleError(f"{path} is missing; evaluate the run first: python eval.py --run {folder}{more}")
        content = check_record(
            MetricsFile, read_json(path, "metrics file"), f"metrics file {path}", "evaluate the run again"
        )
        if str(folder) in runs:
            raise StaleError(f"run folder given twice: {folder}")
        config = RunFolder(Path(folder)).config  # as text: it may be of an earlier version
        runs[str(folder)] = {**content, "settings": read_settings(config) if config.is_file() else {}}
    return runs


def aggregate(
    runs: Mapping[str, Mapping[str, Any]], versus: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Compute statistics of every column of every row, and paired differences of the detections to the other rows.

    ``runs`` are metrics files (as :func:`read_runs` gives) of one system, and ``versus`` those of a second one. The
    runs of a system must have the same configuration but for :data:`FREE`, and must differ in split or seed.

    Returns:
        ``protocol`` (what all runs share), ``runs``, ``splits``, ``rows`` (row → column → statistics) and ``paired``
        (row → column → statistics of detections minus row). Fractions.
    """
    runs, versus = _by_split(runs), _by_split(versus or {})
    for mixed, keys in ((runs, SHARED + OWN), ({**runs, **versus}, SHARED), (versus, OWN)):
        known = [set(run.get("settings", {})) for run in mixed.values()]
        # A setting that only some runs have is of another version of this project.
        settings = sorted(set.intersection(*known) - FREE) if known and keys is not SHARED else []
        _refuse_mixture(mixed, keys + settings)
    protocols = [run["protocol"] for run in runs.values()]
    mine, theirs = ([run["protocol"].get("split") for run in each.values()] for each in (runs, versus))
    if versus and mine != theirs:
        raise StaleError(f"paired differences need the same splits: {mine} against {theirs}")
    for one, other in zip(runs.items(), versus.items(), strict=bool(versus)):
        _refuse_mixture(dict([one, other]), ["num_videos", "num_instances", "num_classes"])
    rows = {SYSTEM: _columns(list(runs.values()))}
    if versus:
        rows[OTHER] = _columns(list(versus.values()))
    rows |= _common_rows(runs, "baselines")
    paired = {
        name: {column: statistics(rows[SYSTEM][column] - row[column]) for column in row}
        for name, row in rows.items()
        if name != SYSTEM
    }
    rows |= _common_rows(runs, "groups")
    return {
        "protocol": {key: protocols[0].get(key) for key in SHARED + OWN},
        "runs": list(runs),
        "splits": mine,
        "rows": {name: {column: statistics(v) for column, v in row.items()} for name, row in rows.items()},
        "paired": paired,
    }


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation of the sample, and 95 % confidence interval of the mean; of one value the mean alone."""
    values = np.asarray(values, dtype=np.float64)
    count, mean = len(values), float(values.mean())
    if count < 2:
        return {"mean": mean, "std": None, "ci95": None, "values": values.tolist()}
    std, freedom, z = float(values.std(ddof=1)), count - 1, 1.959964
    # Beyond the table, the expansion about the normal distribution.
    beyond = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    half = (STUDENT[freedom - 1] if freedom <= len(STUDENT) else beyond) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half], "values": values.tolist()}


def aggregate_report(content: Mapping[str, Any], verbose: bool = False) -> list[str | Table]:
    """Report what :func:`aggregate` returned: a line a run, means (``verbose``: and intervals), paired differences."""
    ours, names = content["rows"][SYSTEM], {OTHER: "versus", **ROW_NAMES}
    columns = [*shown_thresholds({key: None for key in ours if key != AVERAGE}), AVERAGE]
    paths = [Path(run).absolute() for run in content["runs"]]
    shared = os.path.commonpath([path.parent for path in paths])
    rows = [
        [os.path.relpath(path, shared), *(percent(ours[key]["values"][i]) for key in columns)]
        for i, path in enumerate(paths)
    ]
    rows += [[label, *(percent(ours[key][label]) for key in columns)] for label in ("mean", "std")]
    statistic_rows = []
    for name, row in content["rows"].items():
        difference = content["paired"].get(name, {}).get(AVERAGE)
        cells = [spread(row[AVERAGE]), *([interval(row[AVERAGE]["ci95"])] if verbose else [])]
        cells += [spread(difference), interval(difference["ci95"])] if difference else ["", ""]
        statistic_rows.append([names.get(name, name), *cells])
    heads = ["average mAP, %", "mean ± std", *(["95 % interval"] if verbose else [])]
    return [
        protocol_lines(protocol_line(content)),
        (["mAP, %", *columns], rows),
        ([*heads, "detections − row", "95 % interval"], statistic_rows),
    ]


def protocol_line(content: Mapping[str, Any]) -> str:
    """The protocol that all runs share, in one line."""
    shared = content["protocol"]
    stated = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in shared.items()
        if key not in ("dataset", "tious") and value and USUAL.get(key) != value
    ]
    runs = f"{len(content['runs'])} runs, splits {', '.join(map(str, content['splits']))}"
    tious = f"tIoU {format_tious(shared['tious'] or ())}"
    return "protocol: " + " | ".join([str(shared["dataset"]), runs, tious, *stated])


def _by_split(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Runs by rising split and seed. The same split and seed twice would count as independent."""
    seeds = {name: run.get("settings", {}).get("train.seed", "unknown") for name, run in runs.items()}
    keys = {name: f"split {run['protocol'].get('split')} with seed {seeds[name]}" for name, run in runs.items()}
    counts = Counter(keys.values())
    twice = [name for name, key in keys.items() if counts[key] > 1]
    if twice:
        raise StaleError(f"{keys[twice[0]]} given more than once: {name_some(twice)}")
    return {name: runs[name] for name in sorted(runs, key=keys.__getitem__)}


def _refuse_mixture(runs: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> None:
    def comparable(run: Mapping[str, Any], key: str) -> Any:
        """The entry without what may vary from run to run: counts of duplicates and of videos, epochs, folders."""
        value = run["settings"][key] if "." in key else run["protocol"].get(key)
        if key in ("duplicates", "ground_truth", "oracle"):
            return str(value or USUAL.get(key)).split(" (")[0]
        varying = {
            "checkpoint_chosen_on": r",? *\(?epoch \d+\)?",
            "external_scores": r", nothing for \d+ of \d+ videos",
            "model.text.weights": r".*/",
        }
        return re.sub(varying[key], "", str(value)) if key in varying else value

    first_name = next(iter(runs), "")
    for name in runs:
        pairs = {key: [comparable(runs[each], key) for each in (first_name, name)] for key in keys}
        differing = [f"{key} ({one!r} and {other!r})" for key, (one, other) in pairs.items() if one != other]
        if differing:
            raise StaleError(f"{first_name} and {name}: protocols differ in {name_some(differing)}")


def _columns(runs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Column → one value a run: mAP by threshold, then the average."""
    table = {key: np.array([run["mAP"].get(key) for run in runs], dtype=np.float64) for key in runs[0]["mAP"]}
    return {**table, AVERAGE: np.array([run["average_mAP"] for run in runs], dtype=np.float64)}


def _common_rows(runs: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, dict[str, np.ndarray]]:
    """The columns of those rows of a part of the metrics files (baselines, groups) that every run has."""
    first, *others = (run.get(part, {}) for run in runs.values())
    names = [name for name in first if all(name in other for other in others)]
    return {name: _columns([run[part][name] for run in runs.values()]) for name in names}
