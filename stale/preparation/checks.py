"""Report on a data set: whether everything that training needs is there, and whether it is sound."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stale.data.annotations import (
    CLIPPED,
    EMPTY,
    OUTSIDE,
    Video,
    all_labels,
    by_subset,
    read_annotations,
    repair,
    unit_fault,
)
from stale.data.classes import same_text
from stale.data.features import FeatureStore, duration_mismatch, open_features
from stale.data.splits import NUM_SPLITS, SPLIT_FOLDERS, load_split
from stale.errors import StaleError, name_some
from stale.preparation.converters import check_ids
from stale.preparation.prepare import Source, count_faults
from stale.progress import progress_bar

EXIT_CODES = {"ready": 0, "incomplete": 1, "faulty": 3}  # 2 is a wrong call


@dataclass
class Report:
    """What was found in a data set."""

    name: str
    annotations: dict[str, Any] = field(default_factory=dict)  # numbers for JSON; empty where there is nothing
    splits: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # what has yet to be fetched or made
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One of ready, incomplete and faulty."""
        return "faulty" if self.faults else "incomplete" if self.missing else "ready"

    def as_dict(self) -> dict[str, Any]:
        """The whole report for JSON."""
        return {"verdict": self.verdict, **asdict(self)}


def check(
    name: str,
    annotations: Path,
    *,
    features: Path | None = None,
    splits: Path | None = None,
    source: Source | None = None,
    sample: int | None = None,
    id_pattern: str = "{id}",
) -> Report:
    """Check annotations, splits and features (with ``sample`` of only so many videos a subset), and how they fit.

    ``id_pattern`` is as in :func:`stale.data.features.open_features`.
    """
    report = Report(name)
    if not annotations.exists():
        report.missing.append(f"annotations: no {annotations}")
        return report
    try:
        videos = read_annotations(annotations)
        check_ids(videos, f"annotation file {annotations}")
    except StaleError as error:
        report.faults.append(str(error))
        return report
    _check_annotations(report, videos, annotations, source)
    _check_splits(report, all_labels(videos.values()), splits, source)
    if features is None or not features.exists():
        report.missing.append(f"features: none at {features}" if features else "features: none found")
        return report
    try:
        store = open_features(features, id_pattern).annotate(videos)
    except StaleError as error:
        report.faults.append(str(error))
        return report
    _check_features(report, videos, store, path=features, sample=sample)
    return report


def _check_annotations(report: Report, videos: dict[str, Video], path: Path, source: Source | None) -> None:
    changes = repair(videos.values())[1]
    labels = all_labels(videos.values())
    report.annotations = {
        "path": str(path),
        "videos": len(videos),
        "segments": sum(len(video.instances) for video in videos.values()),
        "classes": len(labels),
        "subsets": {},
        "segments_beyond_the_video": changes[CLIPPED],
        "segments_outside_the_video": changes[OUTSIDE],
        "segments_empty": changes[EMPTY],
    }
    for subset, chosen in by_subset(videos.values()).items():
        present = set(all_labels(chosen))
        report.annotations["subsets"][subset] = {
            "videos": len(chosen),
            "with_segments": sum(bool(video.instances) for video in chosen),
            "segments": sum(len(video.instances) for video in chosen),
            "classes": len(present),
            "classes_absent": [label for label in labels if present and label not in present],
            "hours": round(sum(video.duration for video in chosen) / 3600, 2),
        }
    if not labels:
        report.faults.append("annotations: no segment of any class")
    for group in same_text(labels):
        report.remarks.append(f"labels that are one class to the text encoder: {', '.join(map(repr, group))}")
    if source is not None:
        report.faults += [f"annotations: {fault}" for fault in count_faults(source, videos)]
    if fault := unit_fault(videos.values()):
        report.faults.append(f"annotations: {fault}")
    elif changes:
        counts = ", ".join(f"{count} {change}" for change, count in changes.items())
        report.remarks.append(f"segments in training: {counts}; evaluation counts them as the file has them")


def _check_splits(report: Report, labels: list[str], folder: Path | None, source: Source | None) -> None:
    """Check the split lists against the labels: all forty of a public data set, those that are there of another."""
    title = source.facts.title if source else report.name
    found = set() if folder is None else set(folder.glob("train_*_test_*/*/*/split_*.list"))
    present = {(path.parts[-4], path.name) for path in found if path.parts[-3].lower() == title.lower()}
    if not present:
        if source:
            report.missing.append(f"splits: no lists of {title} in {folder}; splits would be drawn by seed")
        else:
            report.remarks.append("no split lists: splits are drawn by seed (data.splits: null)")
        if same_text(labels):
            report.faults.append("splits: one that is drawn can have a class on both sides; rename the labels")
        return
    report.splits = {"path": str(folder), "sound": [], "faulty": {}}
    for setting, lists in SPLIT_FOLDERS.items():
        for index in range(NUM_SPLITS):
            name = f"{setting}, split {index}"
            if source is None and (lists, f"split_{index}.list") not in present:
                continue
            try:
                load_split(labels, setting, index, folder, dataset=title)
                report.splits["sound"].append(name)
            except StaleError as error:
                report.splits["faulty"][name] = str(error)
                report.faults.append(f"splits: {name}: {error}")


def _check_features(
    report: Report, videos: dict[str, Video], store: FeatureStore, path: Path, sample: int | None
) -> None:
    """Check that all videos with segments have features, load them, and compare them with the annotated durations."""
    unknown = sorted({*store.ids} - {store.find(name) for name in videos})
    unusable: dict[str, str] = {}
    mismatches: dict[str, str] = {}
    subsets, rates = {}, {}
    lengths: Counter[int] = Counter()
    precisions: Counter[str] = Counter()
    for subset, chosen in by_subset(videos.values()).items():
        there = [video for video in chosen if store.find(video.id) is not None]
        needed = [video.id for video in chosen if video.instances]
        absent = sorted({*needed} - {video.id for video in there}, key=needed.index)
        subsets[subset] = {"needed": len(needed), "missing": len(absent), "missing_videos": absent}
        if absent:
            counts = f"{len(absent):,} of {len(needed):,}"
            report.missing.append(f"features: {counts} {subset} videos: {name_some(absent)}")
        count = min(sample or len(there), len(there))
        rates[subset] = Counter[str]()
        for at in progress_bar(range(count), subset, unit="video", leave=False, disable=count < 50):
            video = there[round(at * (len(there) - 1) / max(count - 1, 1))]  # evenly spaced
            try:
                features, mismatch = store.read(video.id), duration_mismatch(store, video)
            except StaleError as error:
                unusable[video.id] = str(error)
                continue
            if mismatch:
                mismatches[video.id] = mismatch
            lengths[len(features)] += 1
            precisions[str(features.dtype)] += 1
            rate = len(features) / video.duration
            rates[subset][f"{max(round(rate * 2) / 2, 0.5) if rate >= 1 else max(round(rate, 1), 0.1):g}"] += 1
    if store.simulated:
        report.remarks.append("the features are SIMULATED: results on them say nothing about the data set")
    if unknown:
        report.remarks.append(f"features of {len(unknown)} videos are not annotated: {name_some(unknown)}")
    if unusable:
        report.faults.append(f"{len(unusable)} unusable: {next(iter(unusable.values()))}")
    if mismatches:
        some = name_some(f"{name} in {mismatch}" for name, mismatch in mismatches.items())
        report.faults.append(f"{len(mismatches)} are far longer or shorter than the annotated duration: {some}")
    fixed = len(lengths) == 1 and lengths.total() > 1
    report.features = {
        "path": str(path),
        "videos": len(store.ids),
        "width": store.width,
        "simulated": store.simulated,
        "not_annotated": len(unknown),
        "subsets": subsets,
        "loaded": lengths.total() + len(unusable),
        "precision": dict(precisions),
        "unusable": unusable,
        "duration_mismatches": mismatches,
        "fixed_length": next(iter(lengths)) if fixed else None,
        "snippets_a_second": {} if fixed else {name: dict(n.most_common(10)) for name, n in rates.items() if n},
    }


def as_text(report: Report) -> str:
    """The report as lines of text."""
    lines = [f"{report.name}: {report.verdict.upper()}"]
    if found := report.annotations:
        lines.append(f"annotations  {found['path']}")
        lines.append(f"{'subset':<14}{'videos':>8}{'with segments':>15}{'segments':>10}{'classes':>9}{'hours':>8}")
        for subset, row in found["subsets"].items():
            numbers = f"{row['videos']:>8,}{row['with_segments']:>15,}{row['segments']:>10,}{row['classes']:>9}"
            lines.append(f"{subset:<14}{numbers}{row['hours']:>8.1f}")
            if row["classes_absent"]:
                lines.append(f"  not in {subset}: {name_some(row['classes_absent'])}")
    if found := report.splits:
        lines.append(f"splits       {found['path']}: {len(found['sound'])} sound, {len(found['faulty'])} faulty")
    if found := report.features:
        label = " SIMULATED," if found["simulated"] else ""
        lines.append(f"features     {found['path']}:{label} {found['videos']:,} videos, {found['width']} wide")
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["precision"].items())
        lines.append(f"  loaded {found['loaded']:,}: {kinds}; {len(found['unusable'])} unusable")
        if found["fixed_length"]:
            lines.append(f"  every video has {found['fixed_length']} snippets: rescaled already")
        for subset, row in found["subsets"].items():
            if row["needed"]:
                lines.append(f"  {subset}: {row['missing']:,} of {row['needed']:,} videos with segments lack features")
        for subset, counts in found["snippets_a_second"].items():
            rates = ", ".join(f"{rate}: {count:,} videos" for rate, count in counts.items())
            lines.append(f"  {subset}: snippets a second  {rates}")
    for heading, items in (("MISSING", report.missing), ("FAULTY", report.faults), ("note", report.remarks)):
        lines += [f"{heading}: {item}" for item in items]
    return "\n".join(lines)
