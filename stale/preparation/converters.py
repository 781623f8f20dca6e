"""Load annotations in the layouts of other projects, told by their content, and write the common ones.

* ``activitynet``: ``{"database": {video: {"subset", "duration", "annotations": [{"segment": [start, end],
  "label"}]}}}``;
* ``actionformer``: the same with ``fps`` a video and ``label_id`` an instance;
* ``opentad``: the same with ``frame``, the number of frames, and the classes in ``category_idx.txt`` beside it;
* ``t3al``: ``{video: {"duration_second", "duration_frame", "feature_frame", "annotations": [...]}}``, times as text,
  and the subsets in ``video_info_new.csv`` beside it, or in the names of THUMOS14's videos (STALE's released code and
  BSN share this layout);
* ``csv``: a row an instance, ``video,subset,duration,fps,start,end,label``. A video without instances has one row with
  the last three empty. The column ``fps`` may be missing.

Times are seconds everywhere.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, ValidationError

from stale.data.annotations import Instance, Video, all_labels, read_annotations
from stale.errors import StaleError, name_some
from stale.io import read_json, read_text, write_json, write_text

LAYOUTS = ("activitynet", "actionformer", "opentad", "t3al", "csv")
OPENTAD_CLASSES = "category_idx.txt"
T3AL_SUBSETS = "video_info_new.csv"

_COLUMNS = ("video", "subset", "duration", "fps", "start", "end", "label")


@dataclass(frozen=True)
class Annotations:
    """Videos by id, and the frames a second of those for which they are known."""

    videos: dict[str, Video]
    fps: dict[str, float] = field(default_factory=dict)


def load_any_layout(path: str | Path) -> Annotations:
    """Load an annotation file of any layout, plain or gzipped; a StaleError if it is missing or unusable."""
    path = Path(path)
    if ".csv" in path.suffixes:
        found = _load_csv(path)
    else:
        content = read_json(path, "annotation file")
        entries = list(content.values()) if isinstance(content, dict) else []
        if isinstance(content, dict) and "database" in content:
            found = _load_database(path, content)
        elif entries and all(isinstance(entry, dict) and "duration_second" in entry for entry in entries):
            found = _load_t3al(path, content)
        else:
            raise StaleError(f"annotation file {path}: of no known layout ({', '.join(LAYOUTS)})")
    check_ids(found.videos, f"annotation file {path}")
    return found


def write_as(layout: str, annotations: Annotations, path: str | Path) -> None:
    """Write ``annotations`` in one of :data:`LAYOUTS`.

    It is a StaleError if there is no such layout, or if it counts frames and the rate of a video is not known.
    """
    if layout not in LAYOUTS:
        raise StaleError(f"layout '{layout}' is unknown; use one of {', '.join(LAYOUTS)}")
    if layout in ("opentad", "t3al") and (
        unknown := [name for name in annotations.videos if name not in annotations.fps]
    ):
        raise StaleError(f"layout {layout} counts frames, but no fps is known of {name_some(unknown)}; give --fps")
    if layout == "t3al":
        _write_t3al(annotations, Path(path))
        return
    if layout == "csv":
        rows: list[Sequence[Any]] = [_COLUMNS]
        for name, video in annotations.videos.items():
            times: list[Sequence[Any]] = [(item.start, item.end, item.label) for item in video.instances]
            head = (name, video.subset, video.duration, annotations.fps.get(name, ""))
            rows += [(*head, *item) for item in times or [("", "", "")]]
        _write_rows(rows, path)
        return
    index = {label: number for number, label in enumerate(all_labels(annotations.videos.values()))}
    database: dict[str, dict[str, Any]] = {}
    for name, video in annotations.videos.items():
        database[name] = {"subset": video.subset, "duration": video.duration}
        if name in annotations.fps:
            database[name]["fps"] = annotations.fps[name]
        if layout == "opentad":
            database[name]["frame"] = round(video.duration * annotations.fps[name])
        database[name]["annotations"] = [
            {"segment": [item.start, item.end], "label": item.label}
            | ({"label_id": index[item.label]} if layout == "actionformer" else {})
            for item in video.instances
        ]
    write_json(path, {"version": "stale", "database": database}, indent=1)
    if layout == "opentad":
        write_text(Path(path).with_name(OPENTAD_CLASSES), "".join(f"{label}\n" for label in index))


def _write_t3al(annotations: Annotations, path: Path) -> None:
    content: dict[str, Any] = {}
    rows: list[Sequence[Any]] = [("video", "numFrame", "seconds", "fps", "rfps", "subset", "featureFrame")]
    for name, video in annotations.videos.items():
        fps, frames = annotations.fps[name], round(video.duration * annotations.fps[name])
        instances = [{"segment": [str(item.start), str(item.end)], "label": item.label} for item in video.instances]
        times = {"duration_second": video.duration, "duration_frame": frames, "feature_frame": frames}
        content[name] = {**times, "annotations": instances}
        rows.append((name, frames, video.duration, fps, fps, video.subset, frames))
    write_json(path, content, indent=1)
    _write_rows(rows, path.with_name(T3AL_SUBSETS))


def _write_rows(rows: Iterable[Sequence[Any]], path: str | Path) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def normalise(annotations: Annotations, ignored_labels: Iterable[str] = ()) -> Annotations:
    """Sort videos by id and instances by time and label, so that equal content gives equal files.

    Instances of ``ignored_labels`` are left out, and videos that have no other.
    """
    ignored, videos = set(ignored_labels), {}
    for name, video in sorted(annotations.videos.items()):
        kept = [instance for instance in video.instances if instance.label not in ignored]
        if kept or not video.instances:
            kept.sort(key=lambda instance: (instance.start, instance.end, instance.label))
            videos[name] = Video(name, video.subset, video.duration, tuple(kept))
    return Annotations(videos, {name: fps for name, fps in sorted(annotations.fps.items()) if name in videos})


def check_ids(ids: Iterable[str], where: str) -> None:
    """Raise a StaleError if an id cannot name a file of features inside its folder."""
    bad = [name for name in ids if not name or name[0] == "." or any(c in "/\\" or ord(c) < 32 for c in name)]
    if bad:
        raise StaleError(f"{where}: ids that cannot name a file: {name_some(map(repr, bad))}; rename these videos")


# Loading


def _in_order(segment: tuple[float, float]) -> tuple[float, float]:
    if segment[0] > segment[1]:
        raise ValueError("the segment ends before it starts")
    return segment


class _Annotation(BaseModel):
    segment: Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_in_order)]
    label: str = Field(pattern=r"\S")


class _Entry(BaseModel):
    """One video as T3AL's layout and CSV give it; numbers may be written as text."""

    subset: str = Field(pattern=r"\S")
    duration: FiniteFloat = Field(gt=0)
    fps: FiniteFloat | None = Field(None, gt=0)
    annotations: list[_Annotation]

    @classmethod
    def parse(cls, where: str, **values: Any) -> _Entry:
        """Validate ``values``; the first fault becomes one line that begins with ``where``."""
        try:
            return cls(**values)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(str(part) for part in fault["loc"])
            raise StaleError(f"{where}: {key}: {fault['msg']}, not {fault['input']!r}") from None

    def video(self, name: str) -> Video:
        instances = tuple(Instance(*item.segment, item.label) for item in self.annotations)
        return Video(name, self.subset.lower(), self.duration, instances)


def _load_database(path: Path, content: dict[str, Any]) -> Annotations:
    videos = read_annotations(path)
    rates = {name: content["database"][name].get("fps") for name in videos}
    known = {name: float(fps) for name, fps in rates.items() if isinstance(fps, (int, float)) and 0 < fps < 1e6}
    return Annotations(videos, known)


def _load_t3al(path: Path, content: dict[str, Any]) -> Annotations:
    table = path.with_name(T3AL_SUBSETS)
    rows = {row["video"]: row for row in _load_rows(table, ("video", "subset"))} if table.is_file() else {}
    videos, rates = {}, {}
    for name, entry in content.items():
        where = f"annotation file {path}: video '{name}'"
        in_name = re.fullmatch(r"video_(validation|test)_\d+", name)  # THUMOS14
        if name not in rows and not in_name:
            raise StaleError(f"{where}: no subset; {table} must give it")
        parsed = _Entry.parse(
            where,
            subset=rows[name]["subset"] if name in rows else in_name and in_name[1],
            duration=entry["duration_second"],
            fps=rows.get(name, {}).get("fps") or None,
            annotations=entry.get("annotations"),
        )
        videos[name] = parsed.video(name)
        frames = entry.get("duration_frame")
        if parsed.fps:
            rates[name] = parsed.fps
        elif isinstance(frames, (int, float)) and frames > 0:
            rates[name] = round(frames / parsed.duration, 2)
    return Annotations(videos, rates)


def _load_csv(path: Path) -> Annotations:
    first: dict[str, _Entry] = {}
    instances: dict[str, tuple[Instance, ...]] = {}
    rates: dict[str, float] = {}
    rows = _load_rows(path, [column for column in _COLUMNS if column != "fps"])
    for number, row in enumerate(rows, start=2):
        name, where = row["video"], f"annotation file {path}, line {number}"
        has_instance = row["start"] or row["end"] or row["label"]
        parsed = _Entry.parse(
            where,
            subset=row["subset"],
            duration=row["duration"],
            fps=row.get("fps") or None,
            annotations=[{"segment": (row["start"], row["end"]), "label": row["label"]}] if has_instance else [],
        )
        head = first.setdefault(name, parsed)
        if (head.subset, head.duration) != (parsed.subset, parsed.duration):
            raise StaleError(f"{where}: video '{name}' has another subset or duration than in an earlier line")
        instances[name] = instances.get(name, ()) + parsed.video(name).instances
        if parsed.fps:
            rates[name] = parsed.fps
    videos = {name: Video(name, head.subset.lower(), head.duration, instances[name]) for name, head in first.items()}
    return Annotations(videos, rates)


def _load_rows(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file by column, every value stripped."""
    reader = csv.DictReader(io.StringIO(read_text(path, "table")))
    missing = [column for column in needed if column not in (reader.fieldnames or [])]
    if missing:
        raise StaleError(f"{path}: no column {', '.join(missing)}; the first line must name the columns")
    rows = list(reader)
    uneven = [number for number, row in enumerate(rows, start=2) if None in row or None in row.values()]
    if uneven:
        raise StaleError(f"{path}: line {name_some(uneven)}: more or fewer values than columns")
    return [{key: value.strip() for key, value in row.items()} for row in rows]
