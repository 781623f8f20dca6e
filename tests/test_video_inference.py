"""``inference.py --video`` and ``--features``: table, JSON, CSV, subtitles, pictures, and what is broken."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

import inference as command
from stale.detection.formats import choose, clock, csv_text, srt_text, table, vtt_text
from stale.errors import StaleError
from stale.evaluation import read_results
from stale.files import write_json
from stale.video.encoder import ImageEncoder
from tests.clips import image_tower_weights, make_clip, write_classes
from tests.tiny import WIDTH

pytest.importorskip("av")
VIDEOS = SHARED / "data" / "videos"
NASTY = 'a "b", <i>c</i> & {\\an8} $x$'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default outputs go to the current folder."""
    monkeypatch.chdir(tmp_path)


def run(run_folder: Path, *arguments: object) -> int:
    """The command's exit code."""
    try:
        command.main(["--run", str(run_folder), *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def detection(start: float, end: float, label: str = "x", score: float = 0.5) -> dict:
    return {"segment": [start, end], "label": label, "score": score}


# The command


def test_a_video_and_two_names_are_enough(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_clip(tmp_path / "clip.mkv")
    assert run(clip_run, "--video", "clip.mkv", "--classes", "high jump", "tennis swing", "--top", 3) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "clip"
    assert printed[1].split() == ["start", "end", "class", "score"]
    assert len(printed) == 2 + 3 + 2
    assert re.fullmatch(r" +0:0\d\.\d +0:0\d\.\d  (high jump|tennis swing) +0\.\d{3}", printed[2])
    assert printed[-1].endswith("in 1 videos: clip.detections.json")
    content = json.loads((tmp_path / "clip.detections.json").read_text())
    assert content["external_data"] == {"used": False, "details": ""}
    assert content["made_by"]["classes"] == {"high jump": ["high jump"], "tennis swing": ["tennis swing"]}
    assert len(content["results"]["clip"]) > 3, "the JSON holds all of them"
    assert len(read_results(tmp_path / "clip.detections.json")) == len(content["results"]["clip"])


def test_everything_at_once(clip_run: Path, tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mkv")
    write_classes(tmp_path / "classes.txt", NASTY, "diving | a jump into water")
    outputs = ["--output", "o.json", "--csv", "o.csv", "--vtt", "o.vtt", "--srt", "o.srt", "--picture", "o.png"]
    options = ["--template", "a video of {}", "a clip of {}.", "--fps", 3, "--top", 4, *outputs]
    assert run(clip_run, "--video", "clip.mkv", "--classes-file", "classes.txt", *options) == 0
    made_by = json.loads((tmp_path / "o.json").read_text())["made_by"]
    assert made_by["templates"] == ["a video of {}", "a clip of {}."]
    assert len(list(csv.reader((tmp_path / "o.csv").open()))) == 1 + 4
    assert (tmp_path / "o.vtt").read_text().count("-->") == (tmp_path / "o.srt").read_text().count("-->") == 4
    assert Image.open(tmp_path / "o.png").size[0] > 1000


def test_a_folder_gives_a_file_a_video(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "clips").mkdir()
    for name in "ab":
        make_clip(tmp_path / f"clips/{name}.mkv")
    (tmp_path / "clips/broken.mp4").write_bytes(b"broken")
    options = ["--csv", "all.csv", "--vtt", "subs", "--picture", "pictures"]
    assert run(clip_run, "--video", "clips", "--classes", "diving", *options) == 1
    printed = capsys.readouterr()
    assert re.search(r"broken: broken: .*broken\.mp4: Invalid data", printed.err)
    assert "in 2 videos: clips.detections.json" in printed.out
    assert sorted(path.name for path in (tmp_path / "subs").iterdir()) == ["a.vtt", "b.vtt"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["a.png", "b.png"]
    assert {row["video"] for row in csv.DictReader((tmp_path / "all.csv").open())} == {"a", "b"}


def test_features_in_all_their_forms(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    features = np.random.default_rng(0).standard_normal((20, WIDTH)).astype(np.float32)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder/clip.npy", features)
    with h5py.File(tmp_path / "clips.h5", "w") as file:
        file["clip"] = features
        file["clip"].attrs.update(fps=5.0, duration=4.0)
    for number, source in enumerate((["folder/clip.npy", "--fps", 5], ["folder", "--fps", 5], ["clips.h5"])):
        assert run(clip_run, "--features", *source, "--classes", "diving", "--output", f"{number}.json") == 0
    found = [json.loads((tmp_path / f"{number}.json").read_text())["results"] for number in range(3)]
    assert found[0] == found[1] == found[2]
    assert max(item["segment"][1] for item in found[0]["clip"]) <= 4.0
    capsys.readouterr()
    assert run(clip_run, "--features", "folder", "--classes", "diving") == 1
    assert "say how many a second with --fps" in capsys.readouterr().err


def test_extracted_features_give_what_the_video_gives(clip_run: Path, tmp_path: Path) -> None:
    from scripts import extract_features

    make_clip(tmp_path / "clip.mkv")
    torch.save(image_tower_weights(), tmp_path / "clip.pt")
    extract_features.main(["clip.mkv", "--weights", "clip.pt", "--output", "features"])
    assert run(clip_run, "--video", "clip.mkv", "--classes", "diving", "--output", "v.json") == 0
    assert run(clip_run, "--features", "features", "--classes", "diving", "--output", "f.json") == 0
    contents = [json.loads((tmp_path / name).read_text())["results"] for name in ("v.json", "f.json")]
    assert contents[0] == contents[1]


def test_another_image_tower_is_refused(clip_run: Path, tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mkv")
    torch.save(image_tower_weights(1), tmp_path / "other.pt")
    with pytest.raises(StaleError, match="use the same image tower"):
        run(clip_run, "--video", "clip.mkv", "--classes", "a", "--image-weights", "other.pt")
    assert not (tmp_path / "clip.detections.json").exists()


def test_features_of_another_tower_are_named_at_the_end(clip_run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "f").mkdir()
    towers = {
        "good": ImageEncoder(image_tower_weights(), torch.device("cpu")).tower.as_dict(),
        "other": {"backbone": "RN50"},
    }
    for name, tower in towers.items():
        np.save(tmp_path / f"f/{name}.npy", np.random.default_rng(0).standard_normal((9, WIDTH)))
        write_json(tmp_path / f"f/{name}.json", {"fps": 2.0, **tower})
    assert run(clip_run, "--features", "f", "--classes", "diving") == 1
    printed = capsys.readouterr()
    assert "in 1 videos" in printed.out
    assert "broken: other: the features of 'other' in f come from RN50" in printed.err


@pytest.mark.parametrize(
    "options",
    [
        ["--classes", "a"],
        ["--csv", "o.csv"],
        ["--video", "a.mp4"],
        ["--video", "a.mp4", "--features", "a.npy", "--classes", "a"],
        ["--video", "a.mp4", "--classes", "a", "--classes-file", "f"],
        ["--video", "a.mp4", "--classes", "a", "--vocabulary", "seen"],
        ["--features", "a.npy", "--classes", "a", "--image-weights", "w.pt"],
        ["--video", "a.mp4", "--classes", "a", "--top", "0"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_refused(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        command.parse_arguments(["--run", "r", *options])
    assert stop.value.code == 2
    assert "--" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "absent.mp4", "--classes", "a"], "absent.mp4"),
        (["--video", "clip.mkv", "--classes", "a", "a"], "twice"),
        (["--video", "clip.mkv", "--classes", "a", "--template", "x"], "'x' has no"),
        (["--video", "clip.mkv", "--classes", "a", "--picture", "p.bmp"], "p.bmp"),
        (["--video", "clip.mkv", "--classes", "a", "--fps", "-1"], "above 0"),
        (["--video", "clip.mkv", "--classes-file", "none.txt"], "none.txt"),
        (["--features", "none.h5", "--classes", "a"], "none.h5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_stops_before_anything_is_written(
    clip_run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    make_clip(tmp_path / "clip.mkv")
    with pytest.raises(StaleError, match=message):
        run(clip_run, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mkv"]


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no reference data beside the checkout")
def test_real_clips(clip_run: Path, tmp_path: Path) -> None:
    assert run(clip_run, "--video", VIDEOS, "--classes", "high jump", "tennis swing", "--picture", "p") == 0
    results = json.loads((tmp_path / "videos.detections.json").read_text())["results"]
    assert set(results) == {"high_jump", "tennis"}
    assert max(item["segment"][1] for item in results["tennis"]) <= 11.27
    assert (tmp_path / "p/high_jump.png").stat().st_size > 50_000


# Formats


def test_webvtt_is_as_the_standard_says() -> None:
    text = vtt_text([detection(61.25, 3725.0, NASTY), detection(1, 2, "--> x", 0.25), detection(1, 1)])
    assert text == (
        "WEBVTT\n\n"
        "00:00:01.000 --> 00:00:01.001\nx 0.50\n\n"
        "00:00:01.000 --> 00:00:02.000\n--&gt; x 0.25\n\n"
        '00:01:01.250 --> 01:02:05.000\na "b", &lt;i&gt;c&lt;/i&gt; &amp; {\\an8} $x$ 0.50\n'
    )


def test_subrip_is_numbered_and_opens_no_tag() -> None:
    text = srt_text([detection(61.25, 3725.0, NASTY), detection(0.0004, 2)])
    blocks = text.split("\n\n")
    assert blocks[0] == "1\n00:00:00,000 --> 00:00:02,000\nx 0.50"
    assert blocks[1].startswith("2\n00:01:01,250 --> 01:02:05,000\na")
    assert not re.search(r"<[a-z/]|\{\\", text)
    assert blocks[1].replace("\u2060", "").splitlines()[2] == f"{NASTY} 0.50"


def test_no_detections_are_valid_files_too() -> None:
    assert vtt_text([]) == "WEBVTT\n"
    assert srt_text([]) == ""
    assert table("clip", []) == "clip: nothing found"


def test_csv_gives_names_back_as_they_are() -> None:
    rows = list(csv.reader(io.StringIO(csv_text({'v "1", a': [detection(1, 2.5, NASTY)]}))))
    assert rows == [
        ["video", "start", "end", "class", "score"],
        ['v "1", a', "1.000", "2.500", NASTY, "0.500000"],
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00.0"), (59.96, "1:00.0"), (62.54, "1:02.5"), (3599.99, "1:00:00.0"), (36125.0, "10:02:05.0")],
)
def test_a_clock_carries_over(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_best_are_chosen() -> None:
    items = [detection(0, 1, score=score) for score in (0.2, 0.9, 0.5)]
    assert [item["score"] for item in choose(items, 2)] == [0.9, 0.5]
    assert [item["score"] for item in choose(items, 9, 0.5)] == [0.9, 0.5]
