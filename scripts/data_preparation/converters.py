"""Load annotations in the layouts of other projects, told by their content, and write the common ones.

* ``activitynet``: that of :mod:`stale.data.annotations`;
* ``actionformer``: the same with ``fps`` a video and ``label_id`` an instance;
* ``opentad``: the same with ``frame``, the number of frames, and the classes in ``category_idx.txt`` beside it;
* ``csv``: a row an instance, ``video,subset,duration,fps,start,end,label``. A video without instances has one row with
  the last three empty. The column ``fps`` may be missing.

Times are seconds everywhere.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from stale.data.annotations import Video, all_labels, parse_label_ids, parse_video, read_annotations
from stale.errors import StaleError, name_some
from stale.io import clean_name, read_json, read_text, write_json, write_text

WRITTEN = ("activitynet", "actionformer", "opentad", "csv")
OPENTAD_CLASSES = "category_idx.txt"

_COLUMNS = ("video", "subset", "duration", "fps", "start", "end", "label")


@dataclass(frozen=True)
class Annotations:
    """Videos by id, and what their file says besides."""

    videos: dict[str, Video]
    subsets: dict[str, str] = field(default_factory=dict, compare=False)  # lower case → as the file writes it
    label_ids: dict[str, int] = field(default_factory=dict, compare=False)  # numbers of labels


def load_any_layout(path: str | Path) -> Annotations:
    """Load an annotation file of any layout, plain or gzipped; a StaleError if it is missing or unusable."""
    path = Path(path)
    is_table, needed = ".csv" in path.suffixes, [column for column in _COLUMNS if column != "fps"]
    found = parse_rows(load_rows(path, needed), path) if is_table else _load_database(path)
    check_ids(found.videos, f"annotation file {path}")
    return found


def write_as(layout: str, annotations: Annotations, path: str | Path) -> None:
    """Write ``annotations`` in one of the layouts :data:`WRITTEN`.

    It is a StaleError if there is no such layout, or if it counts frames and the rate of a video is not known.
    """
    if layout not in WRITTEN:
        raise StaleError(f"layout '{layout}' is not written; use one of {', '.join(WRITTEN)}")
    if layout == "opentad" and (unknown := [name for name, video in annotations.videos.items() if not video.fps]):
        raise StaleError(f"layout {layout} counts frames, but no fps is known of {name_some(unknown)}; give --fps")
    if layout == "csv":
        rows: list[tuple[Any, ...]] = []
        for name, video in annotations.videos.items():
            head = name, annotations.subsets.get(video.subset, video.subset), video.duration, video.fps
            rows += [(*head, item.start, item.end, item.label) for item in video.instances] or [(*head, *3 * [None])]
        write_text(path, pd.DataFrame(rows, columns=_COLUMNS).to_csv(index=False, lineterminator="\n"))
        return
    labels, ids = all_labels(annotations.videos.values()), annotations.label_ids
    free = (number for number in count() if number not in {*ids.values()})
    index = {label: ids[label] if label in ids else next(free) for label in labels}
    database: dict[str, dict[str, Any]] = {}
    for name, video in annotations.videos.items():
        database[name] = {"subset": annotations.subsets.get(video.subset, video.subset), "duration": video.duration}
        if video.fps:
            database[name]["fps"] = video.fps
            if layout == "opentad":
                database[name]["frame"] = round(video.duration * video.fps)
        database[name]["annotations"] = [
            {"segment": [item.start, item.end], "label": item.label}
            | ({"label_id": index[item.label]} if layout == "actionformer" else {})
            for item in video.instances
        ]
    write_json(path, {"version": "stale", "taxonomy": [], "database": database}, indent=1)
    if layout == "opentad":
        lines = (f"{label}\n" for label in sorted(labels, key=index.__getitem__))
        write_text(Path(path).with_name(OPENTAD_CLASSES), "".join(lines))


def normalize(annotations: Annotations, ignored_labels: Iterable[str] = ()) -> Annotations:
    """Sort videos by id and instances by time and label, so that equal content gives equal files.

    Instances of ``ignored_labels`` are left out, and videos that have no other.
    """
    ignored, videos = set(ignored_labels), {}
    for name, video in sorted(annotations.videos.items()):
        kept = [instance for instance in video.instances if instance.label not in ignored]
        if kept or not video.instances:
            kept.sort(key=lambda instance: (instance.start, instance.end, instance.label))
            videos[name] = replace(video, instances=tuple(kept))
    return Annotations(videos)


def check_ids(ids: Iterable[str], where: str) -> None:
    """Raise a StaleError if an id cannot name a file of features inside its folder."""
    bad = [name for name in ids if not name or name[0] == "." or any(c in "/\\" or ord(c) < 32 for c in name)]
    if bad:
        raise StaleError(f"{where}: ids that cannot name a file: {name_some(map(repr, bad))}; rename these videos")


# Loading


def _number(text: Any) -> Any:
    """The number that is written as text, or ``text`` if it is none."""
    try:
        return float(text)
    except (TypeError, ValueError, OverflowError):
        return text


def _load_database(path: Path) -> Annotations:
    videos, database = read_annotations(path), read_json(path, "annotation file")["database"]
    ids, table = parse_label_ids(database, f"annotation file {path}"), path.with_name(OPENTAD_CLASSES)
    if not ids and any("frame" in entry for entry in database.values()) and table.is_file():
        ids = {clean_name(line): number for number, line in enumerate(read_text(table, "class list").splitlines())}
    return Annotations(videos, _spellings(entry["subset"] for entry in database.values()), ids)


def _spellings(subsets: Iterable[str]) -> dict[str, str]:
    return {name.lower(): name for name in map(clean_name, subsets)}


def parse_rows(rows: Iterable[tuple[int, dict[str, str]]], path: Path) -> Annotations:
    """The annotations of a table's :func:`load_rows`; a StaleError names the line that is wrong."""
    videos: dict[str, Video] = {}
    for number, row in rows:
        name, where = row["video"], f"annotation file {path}, line {number}"
        instance = {"segment": [_number(row["start"]), _number(row["end"])], "label": row["label"]}
        entry = {"subset": row["subset"], "duration": _number(row["duration"]), "fps": _number(row.get("fps"))}
        entry["annotations"] = [instance] if row["start"] or row["end"] or row["label"] else []
        parsed = parse_video(name, entry, where)
        known = videos.setdefault(name, replace(parsed, instances=()))
        if (known.subset, known.duration) != (parsed.subset, parsed.duration):
            raise StaleError(f"{where}: video '{name}' has another subset or duration than in an earlier line")
        videos[name] = replace(known, instances=known.instances + parsed.instances, fps=parsed.fps or known.fps)
    return Annotations(videos, _spellings(row["subset"] for _, row in rows))


def load_rows(path: Path, needed: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table with commas, semicolons or tabs: its line, and clean values by column, in lower case."""
    text = read_text(path, "table").replace("\r\n", "\n").replace("\r", "\n")
    delimiter = max(",;\t", key=text.strip().partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, values) for row in reader if any(values := list(map(clean_name, row)))]
    except csv.Error as error:
        raise StaleError(f"{path}: line {reader.line_num}: {error}") from None
    columns = [name.lower() for name in rows[0][1]] if rows else []
    missing = [column for column in needed if column not in columns]
    if missing:
        raise StaleError(f"{path}: no column {', '.join(missing)}; the first line must name the columns")
    uneven = [line for line, values in rows if len(values) != len(columns)]
    if uneven:
        raise StaleError(f"{path}: line {name_some(uneven)}: more or fewer values than columns")
    return [(line, dict(zip(columns, values, strict=True))) for line, values in rows[1:]]
