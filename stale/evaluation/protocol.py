"""The protocol of an evaluation: the default thresholds, and one line that heads every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stale.errors import StaleError

THUMOS14_TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOUS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

NOT_STATED = "not stated"


def default_tious(dataset: str) -> tuple[float, ...]:
    """The tIoU thresholds customary for a data set: 0.3:0.1:0.7 for THUMOS14, else 0.5:0.05:0.95."""
    return THUMOS14_TIOUS if "thumos" in dataset.lower() else ACTIVITYNET_TIOUS


@dataclass(frozen=True)
class Protocol:
    """Everything that decides what a number means. ``num_instances`` counts ground truth."""

    dataset: str
    setting: str
    split: int | None
    split_source: str
    subset: str
    vocabulary: str
    num_classes: int
    num_videos: int
    num_instances: int
    tious: tuple[float, ...]
    duplicates: str = "kept"
    external_scores: str = NOT_STATED
    checkpoint: str = NOT_STATED
    checkpoint_chosen_on: str = NOT_STATED
    features: str = NOT_STATED
    skipped_videos: int = 0
    oracle: str = "none"
    ground_truth: str = "all"

    def line(self) -> str:
        """The protocol in one line, with which every table begins."""
        split = "" if self.split is None else f", split {self.split}"
        source = f" ({self.split_source})" if self.split_source else ""
        skipped = f", {self.skipped_videos} skipped" if self.skipped_videos else ""
        parts = [
            self.dataset,
            f"setting {self.setting}{split}{source}",
            f"subset {self.subset}: {self.num_videos} videos{skipped}, {self.num_instances} instances, "
            f"{self.num_classes} classes ({self.vocabulary})",
            f"tIoU {format_tious(self.tious)}",
            f"duplicates {self.duplicates}",
            f"external scores {self.external_scores}",
            *([] if self.oracle == "none" else [f"ORACLE: {self.oracle}"]),
            *([] if self.ground_truth == "all" else [f"ground truth {self.ground_truth}"]),
            *([] if self.features == NOT_STATED else [f"features {self.features}"]),
            f"checkpoint {self.checkpoint}, chosen on {self.checkpoint_chosen_on}"
            if self.checkpoint != NOT_STATED
            else "checkpoint not stated",
        ]
        return "protocol: " + " | ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The protocol as JSON takes it, in the keys of ``metrics.json``."""
        return {**asdict(self), "tious": list(self.tious), "line": self.line()}


def format_tious(tious: Sequence[float]) -> str:
    """``0.50:0.05:0.95`` for even steps, else the thresholds one by one."""
    steps = [round(after - before, 6) for before, after in zip(tious, tious[1:], strict=False)]
    if len(steps) > 1 and len(set(steps)) == 1:
        return f"{tious[0]:.2f}:{steps[0]:.2f}:{tious[-1]:.2f}"
    return ", ".join(f"{value:.2f}" for value in tious)


def check_tious(tious: Sequence[float]) -> tuple[float, ...]:
    """The thresholds, if they can be used.

    Raises:
        StaleError: there are none, one is not in (0, 1], or one is given twice.
    """
    if not tious:
        raise StaleError("no tIoU threshold is given")
    wrong = [value for value in tious if not isinstance(value, (int, float)) or not 0 < value <= 1]
    if wrong:
        raise StaleError(f"tIoU thresholds lie in (0, 1], not {wrong[0]}; 30 % is 0.3")
    if len({threshold_key(value) for value in tious}) < len(tious):
        raise StaleError(f"a tIoU threshold is given twice (two decimals count): {list(tious)}")
    return tuple(float(value) for value in tious)


def threshold_key(tiou: float) -> str:
    """A threshold as the key of a JSON object: ``0.50``."""
    return f"{tiou:.2f}"


def external_scores(external_data: Mapping[str, Any], applied: str | None = None) -> str:
    """What is known of external scores: those applied here, and what the detections file says of its own."""
    used = external_data.get("used")
    if used:
        stated = f"used, says the file: {external_data.get('details') or 'no details'}"
        return f"{applied}; also {stated}" if applied else stated
    if applied:
        return applied
    return "none" if used is False else "none here, the file does not state its own"
