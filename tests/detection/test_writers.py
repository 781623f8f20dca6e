"""Files of detections: results JSON, WebVTT, CSV, tables."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from stale.data.annotations import Video
from stale.detection.writers import OutputFiles, best_at_a_time, csv_text, subtitles, write_detections
from stale.errors import StaleError
from stale.evaluation import read_results
from stale.io import read_json

NASTY = 'a "b", <i>c</i> & {\\an8} $x$'


class Found(list):
    """The detections of a video."""

    def __init__(self, detections: list, name: str = "clip") -> None:
        super().__init__(detections)
        self.detections, self.video = detections, Video(name, "", 9.0, ())


def detection(start: float, end: float, label: str = "x", score: float = 0.5) -> dict:
    return {"segment": [start, end], "label": label, "score": score}


def test_webvtt_is_as_the_standard_says() -> None:
    text = subtitles([detection(61.25, 3725.0, NASTY), detection(1, 2, "--> x", 0.25)])
    assert text == (
        "WEBVTT\n\n"
        "00:00:01.000 --> 00:00:02.000\n--&gt; x 0.25\n\n"
        '00:01:01.250 --> 01:02:05.000\na "b", &lt;i&gt;c&lt;/i&gt; &amp; {\\an8} $x$ 0.50\n'
    )
    assert subtitles([]) == "WEBVTT\n"


def test_subtitles_show_the_best_class_of_each_moment() -> None:
    items = [detection(0, 10, "a", 0.6), detection(4, 8, "b", 0.9), detection(8, 12, "b", 0.4)]
    items += [detection(12, 20, "c", 0.29), detection(30, 31, "a", 0.3), detection(31, 32, "a", 0.5)]
    assert best_at_a_time(items) == [
        detection(0, 4, "a", 0.6),
        detection(4, 8, "b", 0.9),
        detection(8, 10, "a", 0.6),
        detection(10, 12, "b", 0.4),
        detection(30, 32, "a", 0.5),
    ]
    assert best_at_a_time([]) == []


def test_csv_gives_names_back_as_they_are() -> None:
    rows = list(csv.reader(io.StringIO(csv_text({'v "1", a': [detection(1, 2.5, NASTY)]}))))
    assert rows == [["video", "start", "end", "class", "score"], ['v "1", a', "1.000", "2.500", NASTY, "0.500000"]]


def test_the_best_are_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    items = [detection(0, 1, label, score) for label, score in (("weak", 0.2), ("best", 0.9), ("good", 0.5))]
    files = OutputFiles(tmp_path / "all.json", tmp_path / "all.csv", top=2)
    for options in (files, replace(files, top=9, min_score=0.5)):
        found = [("clip", Found(items)), ("clip", Found(items)), ("none", Found([])), ("bad", StaleError("why"))]
        results, broken = write_detections(found, options, {"run": "r"})
        assert results == {"clip": items, "none": []}
        assert broken == {"clip": "a second video is named 'clip': detect in it by itself", "bad": "why"}
        assert read_json(files.results, "results")["results"] == results, "the JSON holds all of them"
        assert [row["class"] for row in csv.DictReader(files.csv.open())] == ["best", "good"]
        assert capsys.readouterr().out.endswith(
            "best   0.900\n   0:00.0     0:01.0  good   0.500\nnone: nothing found\n"
        )
    with pytest.raises(ZeroDivisionError):  # as Ctrl-C in the second video
        write_detections((("clip", Found(items)) if ready else 1 / 0 for ready in (1, 0)), files, {})
    assert read_json(files.results, "results")["results"] == {"clip": items}, "what was found before is kept"


def test_names_that_are_not_utf8_are_escaped_in_every_file(tmp_path: Path) -> None:
    files = OutputFiles(*(tmp_path / name for name in ("all.json", "all.csv", "vtt")))
    found = Found([detection(1, 2)], "clip\udcff")
    write_detections([(found.video.id, found)], files, {"templates": []})
    assert read_results(files.results).videos == ("clip\\udcff",)
    assert [row["video"] for row in csv.DictReader(files.csv.open())] == ["clip\\udcff"]
    assert [path.stem for path in files.vtt.iterdir()] == ["clip%ED%B3%BF"]


@pytest.mark.parametrize("option", ["results", "csv", "vtt"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    files = replace(OutputFiles(tmp_path / "all.json"), **{option: tmp_path / "file" / "out"})
    with pytest.raises(StaleError, match="cannot write .*file/out.*: Not a directory"):
        write_detections(iter(lambda: pytest.fail("it began"), None), files, {})


def test_files_that_killed_commands_left_are_removed(tmp_path: Path) -> None:
    for name in (".all.abcdefgh.json", ".clip.abcdefgh.vtt"):
        (tmp_path / name).touch()
    write_detections([("clip", Found([detection(1, 2)]))], OutputFiles(tmp_path / "all.json", vtt=tmp_path), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "clip.vtt"]
