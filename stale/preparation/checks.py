"""A report on data of any kind: is all there that training needs, and is it sound?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from stale.data.annotations import Video, all_labels, match_video_id, read_annotations, repair
from stale.data.features import FeatureStore, open_features
from stale.errors import StaleError, name_some
from stale.preparation.catalog import DataSet, count_faults
from stale.preparation.converters import check_ids
from stale.preparation.splits import find_lists, fingerprint, is_complete, judge_splits, read_lists

EXIT_CODES = {"ready": 0, "incomplete": 1, "faulty": 3}  # 2 is a wrong call

FEATURES = ("features.h5", "features.hdf5", "features", "features_simulated.h5")  # below the data set's folder


@dataclass(frozen=True)
class Places:
    """Where to look. ``features`` and ``splits`` may be None: there are none."""

    annotations: Path
    features: Path | None
    splits: Path | None


@dataclass
class Report:
    """What was found.

    Attributes:
        name: the data set.
        annotations, splits, features: figures, as they go into the JSON report; empty where there is nothing.
        missing: what has yet to be fetched or made.
        faults: what is wrong.
        remarks: what is worth knowing.
    """

    name: str
    annotations: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ready, incomplete or faulty."""
        return "faulty" if self.faults else "incomplete" if self.missing else "ready"

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {"verdict": self.verdict, **asdict(self)}


def find_features(folder: str | Path) -> Path | None:
    """The features in a data set's folder: the first of :data:`FEATURES` that is there, real ones first."""
    return next((path for name in FEATURES if (path := Path(folder) / name).exists()), None)


def check(name: str, places: Places, known: DataSet | None = None, sample: int | None = None) -> Report:
    """Look at annotations, splits and features, and at how they fit.

    Args:
        name: of the data set, which is also the name of its splits' folder.
        known: what a public data set should have.
        sample: look into the features of this many videos of each subset only; None: of all.
    """
    report = Report(name)
    if not places.annotations.exists():
        report.missing.append(f"annotations: no {places.annotations}")
        return report
    try:
        videos = read_annotations(places.annotations)
        check_ids(videos, f"annotation file {places.annotations}")
    except StaleError as error:
        report.faults.append(str(error))
        return report
    _check_annotations(report, videos, places.annotations, known)
    _check_splits(report, videos, places.splits, known)
    _check_features(report, videos, places.features, sample)
    return report


def _check_annotations(report: Report, videos: dict[str, Video], path: Path, known: DataSet | None) -> None:
    repairs = repair(videos.values())[1]
    labels = all_labels(videos.values())
    report.annotations = {
        "path": str(path),
        "videos": len(videos),
        "segments": sum(len(video.instances) for video in videos.values()),
        "classes": len(labels),
        "subsets": {subset: _subset_figures(chosen, labels) for subset, chosen in _by_subset(videos).items()},
        "segments_beyond_the_video": repairs.clipped,
        "segments_empty": repairs.dropped,
        "labels_that_differ_in_case_or_spaces": _near_twins(labels),
    }
    if not labels:
        report.faults.append("annotations: no segment of any class")
    for twins in report.annotations["labels_that_differ_in_case_or_spaces"]:
        report.faults.append(f"annotations: labels that are one class, it seems: {', '.join(map(repr, twins))}")
    if known is not None:
        report.faults += [f"annotations: {fault}" for fault in count_faults(known, videos)]
    if repairs.clipped or repairs.dropped:
        report.remarks.append(
            f"{repairs.clipped} segments leave their video (clipped in training) and {repairs.dropped} are empty "
            "(dropped in training); evaluation counts them as the file has them"
        )


def _by_subset(videos: dict[str, Video]) -> dict[str, list[Video]]:
    found: dict[str, list[Video]] = {}
    for video in videos.values():
        found.setdefault(video.subset, []).append(video)
    return dict(sorted(found.items()))


def _subset_figures(videos: Sequence[Video], labels: Sequence[str]) -> dict[str, Any]:
    present = set(all_labels(videos))
    return {
        "videos": len(videos),
        "with_segments": sum(bool(video.instances) for video in videos),
        "segments": sum(len(video.instances) for video in videos),
        "classes": len(present),
        "classes_absent": [label for label in labels if present and label not in present],
        "hours": round(sum(video.duration for video in videos) / 3600, 2),
    }


def _near_twins(labels: Iterable[str]) -> list[list[str]]:
    """Labels that are the same but for case, spaces at the ends and underscores."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(label.replace("_", " ").lower().split()), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def _check_splits(report: Report, videos: dict[str, Video], folder: Path | None, known: DataSet | None) -> None:
    title = known.title if known else report.name
    base = find_lists(folder, title) if folder is not None else None
    if base is None:
        if known:
            report.missing.append(f"splits: no lists of {title} in {folder}; splits would be drawn by seed")
        else:
            report.remarks.append("no split lists: splits are drawn by seed (data.splits: null)")
        return
    verdicts = judge_splits(base, title, all_labels(videos.values()), complete=known is not None)
    faults = {split: fault for split, fault in verdicts.items() if fault}
    report.faults += [f"splits: {split}: {fault}" for split, fault in faults.items()]
    report.splits = {
        "path": str(base),
        "sound": [split for split in verdicts if split not in faults],
        "faulty": faults,
        "official": _is_official(base, known, title),
    }
    if report.splits["official"] is False:
        report.remarks.append("the split lists are not the official ones")


def _is_official(base: Path, known: DataSet | None, title: str) -> bool | None:
    """None: there are no official ones, or lists are missing."""
    if known is None or not is_complete(base, title):
        return None
    return fingerprint(read_lists(base, title)) == known.splits_reference


def _check_features(report: Report, videos: dict[str, Video], path: Path | None, sample: int | None) -> None:
    if path is None or not path.exists():
        report.missing.append(f"features: none at {path}" if path else "features: none found")
        return
    try:
        store = open_features(path)
    except StaleError as error:
        report.faults.append(str(error))
        return
    report.features = {"path": str(path), "videos": len(store.ids), "width": store.width, "simulated": _simulated(path)}
    if report.features["simulated"]:
        report.remarks.append("the features are SIMULATED: results on them say nothing about the data set")
    strangers = [name for name in store.ids if match_video_id(name, videos) is None]
    report.features["not_annotated"] = len(strangers)
    if strangers:
        report.remarks.append(f"features of {len(strangers)} videos are not annotated: {name_some(sorted(strangers))}")
    _find_missing(report, videos, store)
    _look_into(report, videos, store, sample)


def _simulated(path: Path) -> bool:
    """Whether the file says of itself that it was made by :mod:`stale.preparation.simulate`."""
    if path.is_dir():
        return False
    with h5py.File(path, "r") as file:
        return bool(file.attrs.get("simulated", False))


def _find_missing(report: Report, videos: dict[str, Video], store: FeatureStore) -> None:
    """Only videos with segments are needed: neither training nor evaluation uses another."""
    by_subset: dict[str, dict[str, Any]] = {}
    for subset, chosen in _by_subset(videos).items():
        needed = [video for video in chosen if video.instances]
        absent = [video for video in needed if store.find(video.id) is None]
        by_class = Counter(label for video in absent for label in sorted({item.label for item in video.instances}))
        by_subset[subset] = {
            "needed": len(needed),
            "missing": len(absent),
            "missing_by_class": dict(sorted(by_class.items(), key=lambda item: (-item[1], item[0]))),
            "missing_videos": [video.id for video in absent],
        }
        if absent:
            share = f"{len(absent):,} of {len(needed):,} {subset} videos"
            report.missing.append(f"features: {share}: {name_some(video.id for video in absent)}")
    report.features["subsets"] = by_subset


def _look_into(report: Report, videos: dict[str, Video], store: FeatureStore, sample: int | None) -> None:
    chosen = [video for part in _by_subset(videos).values() for video in _some(part, store, sample)]
    rates: dict[str, dict[str, float]] = {}
    lengths: Counter[int] = Counter()
    precisions: Counter[str] = Counter()
    unusable: dict[str, str] = {}
    for video in tqdm(chosen, "features", unit="video", leave=False, disable=len(chosen) < 50):
        try:
            features = store.read(video.id)
        except StaleError as error:
            unusable[video.id] = str(error)
            continue
        lengths[len(features)] += 1
        precisions[str(features.dtype)] += 1
        rates.setdefault(video.subset, {})[video.id] = len(features) / video.duration
    report.faults += [f"{len(unusable)} unusable: {next(iter(unusable.values()))}"] if unusable else []
    report.features |= {
        "looked_into": len(chosen),
        "precision": dict(precisions),
        "unusable": unusable,
        "fixed_length": next(iter(lengths)) if len(lengths) == 1 and len(chosen) > 1 else None,
        "snippets": {"least": min(lengths, default=0), "most": max(lengths, default=0)},
    }
    if report.features["fixed_length"] is None:
        _describe_rates(report, rates)


def _some(videos: Sequence[Video], store: FeatureStore, sample: int | None) -> list[Video]:
    """Videos of one subset with features: all, or ``sample`` of them spread evenly."""
    there = [video for video in videos if store.find(video.id) is not None]
    if sample is None or sample >= len(there):
        return there
    return [there[i] for i in np.linspace(0, len(there) - 1, sample).round().astype(int)]


def _describe_rates(report: Report, rates: dict[str, dict[str, float]]) -> None:
    """Snippets a second: which are common, and which videos have quite another (cut short, or other frames)."""
    common = {subset: Counter(map(_rounded, found.values())) for subset, found in rates.items()}
    total = sum(common.values(), Counter())
    usual = [rate for rate, count in total.items() if count >= max(0.01 * sum(total.values()), 2)]
    odd = {
        name: round(rate, 3)
        for found in rates.values()
        for name, rate in found.items()
        if usual and min(abs(rate - other) / other for other in usual) > 0.2
    }
    report.features["snippets_a_second"] = {
        subset: {f"{rate:g}": count for rate, count in found.most_common(10)} for subset, found in common.items()
    }
    report.features["odd_rates"] = odd
    distinct = _merged(usual)
    if len(distinct) > 1:
        seen = " and ".join(f"{rate:g}" for rate in distinct)
        report.remarks.append(
            f"the features mix {seen} snippets a second; training can use them, for it rescales every video by itself"
        )
    if odd:
        some = name_some(f"{name} ({rate:g}/s)" for name, rate in odd.items())
        report.remarks.append(f"{len(odd)} videos have another number of snippets a second than usual: {some}")


def _rounded(rate: float) -> float:
    return max(round(rate * 2) / 2, 0.5) if rate >= 1 else max(round(rate, 1), 0.1)


def _merged(rates: Iterable[float]) -> list[float]:
    """Rates more than a quarter apart; of near ones the first."""
    kept: list[float] = []
    for rate in sorted(rates):
        if not kept or rate > 1.25 * kept[-1]:
            kept.append(rate)
    return kept


def as_text(report: Report) -> str:
    """The report for people."""
    lines = [f"{report.name}: {report.verdict.upper()}"]
    lines += _annotation_lines(report.annotations) if report.annotations else []
    lines += _split_lines(report.splits) if report.splits else []
    lines += _feature_lines(report.features) if report.features else []
    for heading, items in (("MISSING", report.missing), ("FAULTY", report.faults), ("note", report.remarks)):
        lines += [f"{heading}: {item}" for item in items]
    return "\n".join(lines)


def _annotation_lines(figures: dict[str, Any]) -> list[str]:
    lines = [f"annotations  {figures['path']}"]
    lines.append(f"{'subset':<14}{'videos':>8}{'with segments':>15}{'segments':>10}{'classes':>9}{'hours':>8}")
    for subset, row in figures["subsets"].items():
        numbers = f"{row['videos']:>8,}{row['with_segments']:>15,}{row['segments']:>10,}{row['classes']:>9}"
        lines.append(f"{subset:<14}{numbers}{row['hours']:>8.1f}")
        if row["classes_absent"]:
            lines.append(f"  not in {subset}: {name_some(row['classes_absent'])}")
    return lines


def _split_lines(figures: dict[str, Any]) -> list[str]:
    official = {True: ", the official lists", False: ", not the official lists", None: ""}[figures["official"]]
    return [f"splits       {figures['path']}: {len(figures['sound'])} sound, {len(figures['faulty'])} faulty{official}"]


def _feature_lines(figures: dict[str, Any]) -> list[str]:
    label = " SIMULATED," if figures["simulated"] else ""
    lines = [f"features     {figures['path']}:{label} {figures['videos']:,} videos, {figures['width']} wide"]
    if "looked_into" not in figures:
        return lines
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in figures["precision"].items())
    lines.append(f"  looked into {figures['looked_into']:,}: {kinds}; {len(figures['unusable'])} unusable")
    if figures["fixed_length"]:
        lines.append(f"  every video has {figures['fixed_length']} snippets: rescaled already")
    for subset, row in figures["subsets"].items():
        if row["needed"]:
            lines.append(f"  {subset}: {row['missing']:,} of {row['needed']:,} videos with segments lack features")
        if row["missing_by_class"]:
            classes = name_some(f"{label} {count}" for label, count in row["missing_by_class"].items())
            lines.append(f"    by class: {classes}")
    for subset, counts in figures.get("snippets_a_second", {}).items():
        seen = ", ".join(f"{rate}: {count:,} videos" for rate, count in counts.items())
        lines.append(f"  {subset}: snippets a second  {seen}")
    return lines
