"""The layouts that annotations come in, read and written: ActivityNet, ActionFormer, OpenTAD, T3AL, CSV.

* ``activitynet``: ``{"database": {video: {"subset", "duration", "annotations": [{"segment": [start, end],
  "label"}]}}}``;
* ``actionformer``: the same with ``fps`` a video and ``label_id`` an instance;
* ``opentad``: the same with ``frame``, the number of frames, and the classes in ``category_idx.txt`` beside it;
* ``t3al``: ``{video: {"duration_second", "duration_frame", "feature_frame", "annotations": [...]}}`` with the times as
  text and the subsets in ``video_info_new.csv`` beside it (STALE's released code and BSN's share this layout; of
  THUMOS14 the subset is in the video's name);
* ``csv``: a row an instance, ``video,subset,duration,fps,start,end,label``; a video without any has one row with the
  last three empty. The column ``fps`` may be missing.

Times are seconds everywhere. The layout of a file is told by its content.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stale.data.annotations import Instance, Video, all_labels, read_annotations
from stale.errors import StaleError, name_some
from stale.files import read_json, read_text, write_json, write_text
from stale.preparation.archives import refuse_gzip_bomb

LAYOUTS = ("activitynet", "actionformer", "opentad", "t3al", "csv")
T3AL_SUBSETS = "video_info_new.csv"
OPENTAD_CLASSES = "category_idx.txt"

_COLUMNS = ("video", "subset", "duration", "fps", "start", "end", "label")
_T3AL_COLUMNS = ("video", "numFrame", "seconds", "fps", "rfps", "subset", "featureFrame")


@dataclass(frozen=True)
class Annotations:
    """Videos by id, and frames a second of those of which it is known."""

    videos: dict[str, Video]
    fps: dict[str, float] = field(default_factory=dict)


def read_any(path: str | Path) -> Annotations:
    """Read an annotation file of any layout, plain or gzipped.

    Raises:
        StaleError: the file is missing, unreadable, of no known layout, or an id could not name a file.
    """
    path = Path(path)
    if path.is_file():
        refuse_gzip_bomb(path)
    found = _read_csv(path) if ".csv" in path.suffixes else _read_json_layout(path)
    check_ids(found.videos, f"annotation file {path}")
    return found


def write_as(layout: str, annotations: Annotations, path: str | Path) -> list[Path]:
    """Write ``annotations`` in one of :data:`LAYOUTS`.

    Returns:
        The files written: ``path``, and for some layouts a second one beside it.

    Raises:
        StaleError: the layout is unknown, or needs frame rates that are not known.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise StaleError(f"layout '{layout}' is unknown; use one of {', '.join(LAYOUTS)}")
    if layout == "csv":
        write_text(path, _csv_text(annotations))
        return [path]
    if layout == "t3al":
        write_json(path, _t3al(annotations), indent=1)
        write_text(path.with_name(T3AL_SUBSETS), _t3al_subsets(annotations))
        return [path, path.with_name(T3AL_SUBSETS)]
    write_json(path, _database(annotations, layout), indent=1)
    if layout != "opentad":
        return [path]
    write_text(path.with_name(OPENTAD_CLASSES), "".join(f"{label}\n" for label in _labels(annotations)))
    return [path, path.with_name(OPENTAD_CLASSES)]


def normalise(annotations: Annotations) -> Annotations:
    """One order whatever the source: videos by id, instances by time, then label. Nothing is left out."""

    def order(instance: Instance) -> tuple[float, float, str]:
        return instance.start, instance.end, instance.label

    videos = {
        name: Video(name, video.subset, video.duration, tuple(sorted(video.instances, key=order)))
        for name, video in sorted(annotations.videos.items())
    }
    return Annotations(videos, dict(sorted(annotations.fps.items())))


def check_ids(ids: Iterable[str], where: str) -> None:
    """Ids name files of features: none may lead out of a folder.

    Raises:
        StaleError: an id is empty, begins with a dot, or has a slash, a backslash or a control character.
    """
    bad = [name for name in ids if not name or name[0] == "." or any(c in "/\\" or ord(c) < 32 for c in name)]
    if bad:
        raise StaleError(f"{where}: ids that cannot name a file: {name_some(map(repr, bad))}; rename these videos")


def _labels(annotations: Annotations) -> list[str]:
    return all_labels(annotations.videos.values())


def _read_json_layout(path: Path) -> Annotations:
    content = read_json(path, "annotation file")
    if isinstance(content, dict) and "database" in content:
        videos = read_annotations(path)
        rates = {name: content["database"][name].get("fps") for name in videos}
        return Annotations(videos, {name: float(fps) for name, fps in rates.items() if _is_rate(fps)})
    entries = list(content.values()) if isinstance(content, dict) else []
    if entries and all(isinstance(entry, dict) and "duration_second" in entry for entry in entries):
        return _read_t3al(path, content)
    raise StaleError(f"annotation file {path}: of no known layout ({', '.join(LAYOUTS)})")


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def _database(annotations: Annotations, layout: str) -> dict[str, Any]:
    index = {label: number for number, label in enumerate(_labels(annotations))}
    database = {}
    for name, video in annotations.videos.items():
        entry: dict[str, Any] = {"subset": video.subset, "duration": video.duration}
        fps = annotations.fps.get(name)
        if fps is not None:
            entry["fps"] = fps
        if layout == "opentad" and fps is not None:
            entry["frame"] = round(video.duration * fps)
        entry["annotations"] = [_instance(item, index, layout) for item in video.instances]
        database[name] = entry
    return {"version": "stale", "database": database}


def _instance(instance: Instance, index: dict[str, int], layout: str) -> dict[str, Any]:
    item: dict[str, Any] = {"segment": [instance.start, instance.end], "label": instance.label}
    if layout == "actionformer":
        item["label_id"] = index[instance.label]
    return item


def _t3al(annotations: Annotations) -> dict[str, Any]:
    without = [name for name in annotations.videos if name not in annotations.fps]
    if without:
        raise StaleError(f"t3al's layout counts frames, but no fps is known of {name_some(without)}; give --fps")
    content = {}
    for name, video in annotations.videos.items():
        frames = round(video.duration * annotations.fps[name])
        content[name] = {
            "duration_second": video.duration,
            "duration_frame": frames,
            "feature_frame": frames,
            "annotations": [
                {"segment": [str(item.start), str(item.end)], "label": item.label} for item in video.instances
            ],
        }
    return content


def _t3al_subsets(annotations: Annotations) -> str:
    rows = []
    for name, video in annotations.videos.items():
        fps = annotations.fps[name]
        frames = round(video.duration * fps)
        rows.append((name, frames, video.duration, fps, fps, video.subset, frames))
    return _rows_text(_T3AL_COLUMNS, rows)


def _read_t3al(path: Path, content: dict[str, Any]) -> Annotations:
    table = path.with_name(T3AL_SUBSETS)
    rows = _read_rows(table, ("video", "subset")) if table.is_file() else []
    subsets = {row["video"]: row["subset"].lower() for row in rows}
    known_rates = {row["video"]: row.get("fps") for row in rows}
    videos, rates = {}, {}
    for name, entry in content.items():
        where = f"annotation file {path}: video '{name}'"
        duration = _number(entry["duration_second"], f"{where}: duration_second")
        subset = subsets.get(name) or _subset_in_name(name, f"{where}: no subset; {table} must give it")
        items = entry.get("annotations")
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise StaleError(f"{where}: 'annotations' must be a list of objects")
        instances = tuple(_checked(item.get("segment"), item.get("label"), where) for item in items)
        videos[name] = Video(name, subset, _positive(duration, where), instances)
        if known_rates.get(name):
            rates[name] = _positive(_number(known_rates[name], f"{where}: fps in {table}"), where)
        elif _is_rate(entry.get("duration_frame")):
            rates[name] = round(entry["duration_frame"] / duration, 2)
    return Annotations(videos, rates)


def _subset_in_name(name: str, fault: str) -> str:
    parts = name.split("_")
    if len(parts) == 3 and parts[0] == "video" and parts[1] in ("validation", "test"):
        return parts[1]
    raise StaleError(fault)


def _csv_text(annotations: Annotations) -> str:
    rows: list[tuple[Any, ...]] = []
    for name, video in annotations.videos.items():
        head = (name, video.subset, video.duration, annotations.fps.get(name, ""))
        rows += [(*head, item.start, item.end, item.label) for item in video.instances] or [(*head, "", "", "")]
    return _rows_text(_COLUMNS, rows)


def _rows_text(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue()


def _read_csv(path: Path) -> Annotations:
    heads: dict[str, tuple[str, float]] = {}
    instances: dict[str, list[Instance]] = {}
    rates: dict[str, float] = {}
    rows = _read_rows(path, [column for column in _COLUMNS if column != "fps"])
    for number, row in enumerate(rows, start=2):
        where = f"annotation file {path}, line {number}"
        name, duration = row["video"], _positive(_number(row["duration"], f"{where}: duration"), where)
        head = (row["subset"].lower(), duration)
        if not head[0] or heads.setdefault(name, head) != head:
            raise StaleError(f"{where}: video '{name}' has no subset, or another subset or duration than further up")
        found = instances.setdefault(name, [])
        if row["start"] or row["end"] or row["label"]:
            found.append(_checked([row["start"], row["end"]], row["label"], where))
        if row.get("fps"):
            rates[name] = _positive(_number(row["fps"], f"{where}: fps"), where)
    return Annotations({name: Video(name, *head, tuple(instances[name])) for name, head in heads.items()}, rates)


def _read_rows(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, every value stripped."""
    reader = csv.DictReader(io.StringIO(read_text(path, "table")))
    missing = [column for column in needed if column not in (reader.fieldnames or [])]
    if missing:
        raise StaleError(f"{path}: no column {', '.join(missing)}; the first line must name the columns")
    rows = list(reader)
    uneven = [number for number, row in enumerate(rows, start=2) if None in row or None in row.values()]
    if uneven:
        raise StaleError(f"{path}: line {name_some(uneven)}: more or fewer values than columns")
    return [{key: value.strip() for key, value in row.items()} for row in rows]


def _checked(segment: Any, label: Any, where: str) -> Instance:
    if not isinstance(segment, list) or len(segment) != 2:
        raise StaleError(f"{where}: 'segment' must be start and end, not {segment!r}")
    if not isinstance(label, str) or not label.strip():
        raise StaleError(f"{where}: each instance needs a label, not {label!r}")
    start, end = (_number(value, f"{where}: segment") for value in segment)
    if start > end:
        raise StaleError(f"{where}: segment {segment} ends before it starts")
    return Instance(start, end, label)


def _number(value: Any, where: str) -> float:
    """A finite number, also one that is written as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise StaleError(f"{where}: a number is expected, not {value!r}") from None
    if not abs(number) < 1e12 or isinstance(value, bool):
        raise StaleError(f"{where}: a number of seconds is expected, not {value!r}")
    return number


def _positive(value: float, where: str) -> float:
    if value <= 0:
        raise StaleError(f"{where}: {value} is not above 0")
    return value
