"""Detections, ``{"segment": [start, end] seconds, "label", "score"}``, as files: results JSON, CSV, WebVTT."""

import csv
import html
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from stale.errors import StaleError, counted, printable
from stale.io import atomic_path, file_name, remove_leftovers, require_writable, write_json, write_text
from stale.version import __version__

Detection = Mapping[str, Any]
LEAST_SHARE = 1 / 3  # of a video's best score, below which a detection makes no subtitle


def results_json(results: Mapping[str, Sequence[Detection]], **extra: Any) -> dict[str, Any]:
    """ActivityNet's results format; ``extra`` keys say how the results were made, and other readers ignore them."""
    external = {"used": False, "details": ""}
    return {"version": f"stale {__version__}", "external_data": external, **extra, "results": dict(results)}


@contextmanager
def results_file(path: Path, **extra: Any) -> Iterator[Callable[[Mapping[str, Sequence[Detection]]], None]]:
    """Yield a function that writes :func:`results_json` part by part; the file appears at the end, or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(results_json({}, **extra), ensure_ascii=False).removesuffix("}}"))
        separator = ""

        def write(results: Mapping[str, Sequence[Detection]]) -> None:
            nonlocal separator
            for name, detections in results.items():
                file.write(f"{separator}{json.dumps(name)}: {json.dumps(detections, ensure_ascii=False)}")
                separator = ", "

        yield write
        file.write("}}\n")


def table(title: str, detections: Sequence[Detection]) -> str:
    """A table with a line for each detection, in the order given: start, end, class, score."""
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


def subtitles(detections: Sequence[Detection]) -> str:
    """WebVTT (W3C) of :func:`best_at_a_time`."""

    def stamp(seconds: float) -> str:
        minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
        return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}"

    cues = ["WEBVTT\n"]
    for item in best_at_a_time(detections):
        start, end = item["segment"]
        times = f"{stamp(start)} --> {stamp(max(end, start + 0.001))}"  # the resolution of the format
        cues.append(f"{times}\n{html.escape(item['label'], quote=False)} {item['score']:.2f}\n")
    return "\n".join(cues)


def clock(seconds: float) -> str:
    """``1:02.5``: minutes, seconds and tenths; hours where there are any."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes}:{rest / 10:04.1f}"
    return f"{hours}:{text:0>7}" if hours else text


def best_at_a_time(detections: Sequence[Detection]) -> Sequence[Detection]:
    """The parts of ``detections``, from a third of the best score, in which each is the best of its moment."""
    least = LEAST_SHARE * max((item["score"] for item in detections), default=0.0)
    kept = [item for item in detections if item["score"] >= least]
    times = sorted({time for item in kept for time in item["segment"]})
    parts: list[dict[str, Any]] = []
    for start, end in pairwise(times):
        covering = [item for item in kept if item["segment"][0] <= start and end <= item["segment"][1]]
        if not covering:
            continue
        best = max(covering, key=lambda item: item["score"])
        if parts and parts[-1]["segment"][1] == start and parts[-1]["label"] == best["label"]:
            best = {**best, "score": max(best["score"], parts[-1]["score"])}
            start = parts.pop()["segment"][0]
        parts.append({**best, "segment": [start, end]})
    return parts


@dataclass(frozen=True)
class OutputFiles:
    """Which files to write; None writes none.

    Attributes:
        results: results JSON of all detections.
        csv, picture: the ``top`` best detections of a video that score at least ``min_score``.
        vtt: of these :func:`best_at_a_time`. Like ``picture`` a file for a ``single`` video, else a folder.
    """

    results: Path
    csv: Path | None = None
    vtt: Path | None = None
    picture: Path | None = None
    single: bool = False
    top: int = 10
    min_score: float = 0.0

    def check(self) -> None:
        """Raise a StaleError if one of them cannot be written, and remove what killed commands left of them."""
        for path in filter(None, (self.results, self.csv, self.vtt, self.picture)):
            is_file = self.single or path in (self.results, self.csv)
            require_writable(path if is_file else path / "video")
            remove_leftovers(path)


def write_detections(
    found: Iterable[tuple[str, Any]],
    files: OutputFiles,
    made_by: Mapping[str, Any],
    show: Callable[[str], None] = print,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Show each video's table and write its files as soon as it is done, and the files of all videos at the end.

    ``found`` are (video id, :class:`stale.detection.run.VideoDetections` or the error of a broken one). Returns all
    detections by video, and video → reason of those that failed.
    """
    files.check()
    results: dict[str, list[dict[str, Any]]] = {}
    broken: dict[str, str] = {}
    best: dict[str, list[Detection]] = {}
    try:
        for name, detections in found:
            video_id = name.encode("utf-8", "backslashreplace").decode()  # of a file whose name is not UTF-8
            if isinstance(detections, StaleError):
                broken[video_id] = str(detections)
            elif video_id in results:
                broken[video_id] = f"a second video is named '{video_id}': detect in it by itself"
            else:
                results[video_id] = detections.detections
                ranked = sorted(detections, key=lambda item: -item["score"])
                best[video_id] = [item for item in ranked if item["score"] >= files.min_score][: files.top]
                by_time = sorted(best[video_id], key=lambda item: item["segment"])
                show(table(f"{video_id}: the best {len(by_time)}, by time" if by_time else video_id, by_time))
                _write_video(detections, best[video_id], files, str(made_by.get("run", "")))
    finally:  # what was found before an error or Ctrl-C is kept
        if results:
            write_json(files.results, results_json(results, made_by=dict(made_by)), indent=1)
            if files.csv:
                write_text(files.csv, csv_text(best))
    return results, broken


def _write_video(detections: Any, best: Sequence[Detection], files: OutputFiles, run: str) -> None:
    """Write one video's subtitles and picture."""
    for folder, suffix in ((files.vtt, ".vtt"), (files.picture, ".png")):
        if folder is None:
            continue
        path = folder if files.single else folder / f"{file_name(detections.video.id)}{suffix}"
        remove_leftovers(path)
        if suffix == ".png":
            from stale import plot  # matplotlib is imported only where a picture is drawn

            title = f"{detections.video.id}: {Path(run).resolve().name}, {counted(len(detections.classes), 'class')}"
            plot(detections, path, len(best), title)
        else:
            write_text(path, subtitles(best))
