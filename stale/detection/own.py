"""Detections in anybody's videos written out: results JSON, and on request CSV, subtitles and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stale
from stale.detection.explain import VideoDetections
from stale.detection.formats import Detection, choose, csv_text, results_json, srt_text, table, vtt_text
from stale.errors import StaleError
from stale.files import file_name, write_json, write_text


@dataclass(frozen=True)
class Writing:
    """What to write, and where.

    Attributes:
        output: results JSON of all detections.
        csv, vtt, srt, picture: the chosen detections; None writes none. ``vtt``, ``srt`` and ``picture`` are a file
            of a single video, and a folder of several.
        top, min_score: which detections are chosen, in a video.
    """

    output: Path
    csv: Path | None = None
    vtt: Path | None = None
    srt: Path | None = None
    picture: Path | None = None
    top: int = 20
    min_score: float = 0.0


@dataclass
class Summary:
    """All detections by video, and video → reason of those that failed."""

    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def write_detections(
    found: Iterable[tuple[str, VideoDetections | StaleError]],
    writing: Writing,
    single: bool,
    made_by: Mapping[str, Any],
    show: Callable[[str], None],
) -> Summary:
    """Write every video's files as it is done, and the files of all videos at the end.

    Args:
        single: there is one video only.
        made_by: how the detections were made, for the results JSON.
        show: takes the table of each video.
    """
    summary = Summary()
    chosen: dict[str, list[Detection]] = {}
    for video_id, seen in found:
        if isinstance(seen, StaleError):
            summary.broken[video_id] = str(seen)
            continue
        if video_id in summary.results:
            summary.broken[video_id] = f"a second video is named '{video_id}': give it a run of its own"
            continue
        summary.results[video_id] = seen.detections
        chosen[video_id] = choose(seen, writing.top, writing.min_score)
        show(table(video_id, chosen[video_id]))
        _write_video(seen, chosen[video_id], writing, single)
    if summary.results:
        write_json(writing.output, results_json(summary.results, made_by=dict(made_by)), indent=1)
        if writing.csv:
            write_text(writing.csv, csv_text(chosen))
    return summary


def _write_video(seen: VideoDetections, chosen: list[Detection], writing: Writing, single: bool) -> None:
    def place(path: Path, suffix: str) -> Path:
        return path if single else path / f"{file_name(seen.video.id)}{suffix}"

    if writing.vtt:
        write_text(place(writing.vtt, ".vtt"), vtt_text(chosen))
    if writing.srt:
        write_text(place(writing.srt, ".srt"), srt_text(chosen))
    if writing.picture:
        stale.plot(seen, place(writing.picture, ".png"), top=len(chosen))
