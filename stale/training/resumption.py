"""Which run a folder holds, and whether it is the one that is to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stale.build import TrainingData
from stale.checkpoint import git_revision, load_checkpoint
from stale.config import Config, differing_keys, load_config
from stale.data.tower import Tower, require_same_tower, require_same_width
from stale.errors import StaleError, name_some
from stale.files import read_json, write_json
from stale.run import RunFolder

# What a run that goes on may have otherwise than it began: how far it goes, and where.
_FREE = {
    "train.epochs",
    "train.device",
    "train.compile",
    "train.log_interval",
    "train.save_minutes",
    "data.resident",
    "detection.batch_size",
}


def take_folder(config: Config, run: RunFolder, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The state of the run to go on from, None for a new run; nothing is changed.

    Raises:
        StaleError: the folder is another's, or holds a run that is neither to be resumed nor to be overwritten, or one
            of other settings.
    """
    taken = run.own_files()
    if taken and not run.config.is_file():
        raise StaleError(
            f"{run.path} holds {taken[0].name} but no config.yaml: no run of ours; choose another --output"
        )
    if taken and not (resume or overwrite):
        raise StaleError(
            f"{run.path} already holds a run: continue it with --resume, replace it with --overwrite, or choose "
            "another --output"
        )
    if not resume or not taken:
        return None
    _check_same(config, load_config([run.config]), run.path)
    last = run.checkpoint("last")
    return load_checkpoint(last) if last.exists() else None


def check_same_data(state: Mapping[str, Any], data: TrainingData, run: RunFolder) -> None:
    """Features and annotations may have changed behind unchanged paths: then it would be another run.

    Raises:
        StaleError: they have.
    """
    require_same_tower(Tower.of(state.get("features", {})), data.tower, "the features now")
    mend = "use those, or another --output"
    require_same_width(state["feature_width"], data.feature_width, f"{run.path}: the features now", mend)
    earlier = read_json(run.split, "split of the run") if run.split.exists() else {}
    changed = [name for name, value in _split_record(data).items() if earlier and earlier.get(name) != value]
    if changed:
        raise StaleError(
            f"{run.split}: the data have changed since the run began ({name_some(changed)} differ): restore them, or "
            "choose another --output"
        )


def write_split(run: RunFolder, data: TrainingData) -> None:
    """Record the classes, the held-out videos and the code's revision."""
    write_json(run.split, {**_split_record(data), "revision": git_revision()}, indent=1)


def _check_same(config: Config, earlier: Config, path: Path) -> None:
    changed = [key for key in differing_keys(config, earlier) if key not in _FREE]
    if changed:
        raise StaleError(f"{path} holds a run with another {name_some(changed)}; use its value, or another --output")


def _split_record(data: TrainingData) -> dict[str, Any]:
    held_out = [video.id for video in data.held_out.videos]
    split = data.split
    return {"source": split.source, "seen": list(split.seen), "unseen": list(split.unseen), "held_out": held_out}
