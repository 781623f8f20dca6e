"""Report on a data set: whether everything that training needs is there, and whether it is sound."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from data_preparation.converters import check_ids
from data_preparation.prepare import count_faults
from stale.data.annotations import Video, all_labels, by_subset, read_annotations, repair, unit_fault
from stale.data.classes import same_text
from stale.data.datasets import DatasetFacts
from stale.data.features import duration_mismatch, open_features
from stale.data.splits import NUM_SPLITS, SPLIT_FOLDERS, load_split
from stale.errors import StaleError, name_some
from stale.progress import progress_bar

EXIT_CODES = {"ready": 0, "incomplete": 1, "faulty": 3}  # 2 is a wrong call


@dataclass
class Report:
    """What was found in a data set."""

    name: str
    subsets: dict[str, dict[str, Any]] = field(default_factory=dict)  # numbers of each subset
    features: dict[str, Any] = field(default_factory=dict)  # what is known of all; empty where there are none
    missing: list[str] = field(default_factory=list)  # what has yet to be fetched or made
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One of ready, incomplete and faulty."""
        return "faulty" if self.faults else "incomplete" if self.missing else "ready"

    def as_text(self) -> str:
        """The report as lines of text."""
        lines = [f"{self.name}: {self.verdict.upper()}"]
        if self.subsets:
            lines.append(pd.DataFrame.from_dict(self.subsets, orient="index").to_string(na_rep=""))
        if found := self.features:
            lines.append(f"{found['path']}: {found['videos']:,} videos, {found['width']} wide")
        for heading, items in (("MISSING", self.missing), ("FAULTY", self.faults), ("note", self.remarks)):
            lines += [f"{heading}: {item}" for item in items]
        return "\n".join(lines)


def check(
    name: str,
    annotations: Path,
    *,
    features: Path | None = None,
    splits: Path | None = None,
    public: DatasetFacts | None = None,
    sample: int | None = None,
    id_pattern: str = "{id}",
) -> Report:
    """Check annotations, splits and features (with ``sample`` of only so many videos a subset), and how they fit."""
    report = Report(name)
    if not annotations.exists():
        report.missing.append(f"annotations: no {annotations}")
        return report
    try:
        videos = read_annotations(annotations)
        check_ids(videos, f"annotation file {annotations}")
        _check_annotations(report, videos, public)
        _check_splits(report, all_labels(videos.values()), splits, public)
        if features is None or not features.exists():
            report.missing.append(f"features: none at {features}" if features else "features: none found")
        else:
            _check_features(report, videos, features, id_pattern=id_pattern, sample=sample)
    except StaleError as error:
        report.faults.append(str(error))
    return report


def _check_annotations(report: Report, videos: dict[str, Video], public: DatasetFacts | None) -> None:
    labels = all_labels(videos.values())
    for subset, chosen in by_subset(videos.values()).items():
        present = all_labels(chosen)
        report.subsets[subset] = {
            "videos": len(chosen),
            "with segments": sum(bool(video.instances) for video in chosen),
            "segments": sum(len(video.instances) for video in chosen),
            "classes": len(present),
            "hours": round(sum(video.duration for video in chosen) / 3600, 2),
        }
        if present and (absent := sorted({*labels} - {*present})):
            report.remarks.append(f"no {subset} video of {name_some(absent)}")
    if not labels:
        report.faults.append("annotations: no segment of any class")
    for group in same_text(labels):
        report.remarks.append(f"labels that are one class to the text encoder: {', '.join(map(repr, group))}")
    if public is not None:
        report.faults += [f"annotations: {fault}" for fault in count_faults(public, videos)]
    if fault := unit_fault(videos.values()):
        report.faults.append(f"annotations: {fault}")
    elif changes := repair(videos.values())[1]:
        counts = ", ".join(f"{count} {change}" for change, count in changes.items())
        report.remarks.append(f"segments in training: {counts}; evaluation counts them as the file has them")


def _check_splits(report: Report, labels: list[str], folder: Path | None, public: DatasetFacts | None) -> None:
    """Check the split lists against the labels: all twenty of a public data set, those that are there of another."""
    title = public.title if public else report.name
    found = set() if folder is None else set(folder.glob("train_*_test_*/*/*/split_*.list"))
    present = {(path.parts[-4], path.name) for path in found if path.parts[-3].lower() == title.lower()}
    if not present:
        if public:
            report.missing.append(f"splits: no lists of {title} in {folder}; splits would be drawn by seed")
        else:
            report.remarks.append("no split lists: splits are drawn by seed (data.splits: null)")
        if same_text(labels):
            report.faults.append("splits: one that is drawn can have a class on both sides; rename the labels")
    for setting, lists in SPLIT_FOLDERS.items():
        for index in range(NUM_SPLITS):
            if (lists, f"split_{index}.list") in present or (public and present):
                try:
                    load_split(labels, setting, index, folder, dataset=title)
                except StaleError as error:
                    report.faults.append(f"splits: {setting}, split {index}: {error}")


def _check_features(
    report: Report, videos: dict[str, Video], path: Path, *, id_pattern: str, sample: int | None
) -> None:
    """Check that all videos with segments have features, load them, and compare them with the annotated durations."""
    store = open_features(path, id_pattern).annotate(videos)
    report.features = {"path": str(path), "videos": len(store.ids), "width": store.width, "simulated": store.simulated}
    missing = report.features["missing"] = {}
    unusable = report.features["unusable"] = {}
    mismatches = report.features["duration_mismatches"] = {}
    lengths: list[int] = []
    for subset, chosen in by_subset(videos.values()).items():
        numbers = report.subsets[subset]
        there = [video for video in chosen if store.find(video.id) is not None]
        absent = [video for video in chosen if video.instances and store.find(video.id) is None]
        missing[subset] = [video.id for video in absent]
        if absent:
            classes = Counter(label for video in absent for label in all_labels([video]))
            by_class = name_some(f"{label}: {count}" for label, count in classes.most_common())
            counts = f"{len(absent):,} of {numbers['with segments']:,} {subset} videos"
            report.missing.append(f"features: {counts}: {name_some(missing[subset])} ({by_class})")
        count = min(sample or len(there), len(there))
        rates = []
        for at in progress_bar(np.linspace(0, len(there) - 1, count), subset, leave=False, disable=count < 50):
            video = there[round(at)]
            try:
                features, mismatch = store.read(video.id), duration_mismatch(store, video)
            except StaleError as error:
                unusable[video.id] = str(error)
                continue
            if mismatch:
                mismatches[video.id] = mismatch
            lengths.append(len(features))
            rates.append(len(features) / video.duration)
        numbers |= {"without features": len(absent), "loaded": len(rates)}
        if rates:
            numbers["snippets a second"] = round(median(rates), 2)
    if store.simulated:
        report.remarks.append("the features are SIMULATED: results on them say nothing about the data set")
    if unknown := sorted({*store.ids} - {store.find(name) for name in videos}):
        report.remarks.append(f"features of {len(unknown)} videos are not annotated: {name_some(unknown)}")
    if len(lengths) > 1 == len({*lengths}):
        report.remarks.append(f"every video has {lengths[0]} snippets: rescaled already")
    if unusable:
        report.faults.append(f"{len(unusable)} unusable: {next(iter(unusable.values()))}")
    if mismatches:
        some = name_some(f"{name} in {mismatch}" for name, mismatch in mismatches.items())
        report.faults.append(f"{len(mismatches)} are far longer or shorter than the annotated duration: {some}")
