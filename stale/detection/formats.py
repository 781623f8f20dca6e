"""Detections for people and other programs: a table, CSV, subtitles, ActivityNet's results.

A detection is ``{"segment": [start, end] seconds, "label", "score"}``.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stale import __version__
from stale.errors import StaleError, printable
from stale.files import atomic_path

Detection = Mapping[str, Any]


def results_json(results: Mapping[str, Sequence[Detection]], **extra: Any) -> dict[str, Any]:
    """ActivityNet's results form; ``extra`` keys say how they were made, and other readers ignore them."""
    external = {"used": False, "details": ""}
    return {"version": f"stale {__version__}", "external_data": external, **extra, "results": dict(results)}


def entries_json(results: Mapping[str, Sequence[Detection]]) -> str:
    """Videos' detections as JSON without the braces around them, for :func:`results_file`."""
    return json.dumps(dict(results), ensure_ascii=False)[1:-1]


@contextmanager
def results_file(path: str | Path, **extra: Any) -> Iterator[Callable[[str], None]]:
    """Write :func:`results_json` part by part: the same text to the byte, never held as a whole.

    The file appears finished at the end, or not at all.

    Yields:
        What takes the next videos, as :func:`entries_json`.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(results_json({}, **extra), ensure_ascii=False).removesuffix("}}"))
        separator = ""

        def write(entries: str) -> None:
            nonlocal separator
            try:
                file.write(separator + entries if entries else "")
            except OSError as error:  # named here, as several files may be open
                raise StaleError(f"cannot write {path}: {error.strerror or error}") from error
            separator = ", " if entries else separator

        yield write
        file.write("}}\n")


def choose(detections: Sequence[Detection], top: int, min_score: float = 0.0) -> list[Detection]:
    """The ``top`` best detections, of those that score at least ``min_score``."""
    return [item for item in sorted(detections, key=lambda item: -item["score"]) if item["score"] >= min_score][:top]


def table(title: str, detections: Sequence[Detection]) -> str:
    """A line a detection, in the order given: start, end, class, score; minutes and seconds."""
    if not detections:
        return printable(f"{title}: nothing found")
    width = max(5, *(len(item["label"]) for item in detections))
    lines = [f"{'start':>9}  {'end':>9}  {'class':<{width}}  score"]
    for item in detections:
        start, end = map(clock, item["segment"])
        lines.append(f"{start:>9}  {end:>9}  {item['label']:<{width}}  {item['score']:.3f}")
    return "\n".join(map(printable, [title, *lines]))


def csv_text(results: Mapping[str, Sequence[Detection]]) -> str:
    """Columns video, start and end (seconds), class, score; quoted where a name needs it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["video", "start", "end", "class", "score"])
    for video, detections in results.items():
        for item in detections:
            start, end = item["segment"]
            writer.writerow([video, f"{start:.3f}", f"{end:.3f}", item["label"], f"{item['score']:.6f}"])
    return text.getvalue()


def vtt_text(detections: Sequence[Detection]) -> str:
    """WebVTT (W3C), a cue a detection; what the format would read as markup is escaped."""
    cues = [
        f"{_stamp(start, '.')} --> {_stamp(end, '.')}\n{html.escape(text, quote=False)}\n"
        for start, end, text in _cues(detections)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def srt_text(detections: Sequence[Detection]) -> str:
    """SubRip, a cue a detection. The format has no escapes: a word joiner keeps < and { from opening a tag."""
    cues = [
        f"{number}\n{_stamp(start, ',')} --> {_stamp(end, ',')}\n" + re.sub(r"([<{])", "\\1\u2060", text) + "\n"
        for number, (start, end, text) in enumerate(_cues(detections), start=1)
    ]
    return "\n".join(cues)


def clock(seconds: float) -> str:
    """``1:02.5``: minutes, seconds and tenths; hours where there are any."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes}:{rest / 10:04.1f}"
    return f"{hours}:{text:0>7}" if hours else text


def _cues(detections: Sequence[Detection]) -> list[tuple[float, float, str]]:
    """(start, end, text) by rising start; a cue lasts at least the millisecond that the formats can tell."""
    rows = []
    for item in detections:
        start, end = item["segment"]
        rows.append((start, max(end, start + 0.001), f"{item['label']} {item['score']:.2f}"))
    return sorted(rows)


def _stamp(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
