"""``inference.py --video`` and ``--features``: table, JSON, CSV, subtitles, pictures, and what is broken."""

import csv
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import inference as command
from stale.errors import StaleError
from stale.evaluation import read_results
from stale.io import write_json
from stale.video.image_encoder import ImageEncoder
from tests.helpers import SHARED, WIDTH, exit_code, make_clip, random_image_encoder_weights, write_folder

pytest.importorskip("av")
VIDEOS = SHARED / "data" / "videos"
NASTY = 'a "b", <i>c</i> & {\\an8} $x$'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default outputs go to runs/ in the current folder."""
    monkeypatch.chdir(tmp_path)


def run(run_folder: Path, *arguments: object) -> int:
    return exit_code(command.main, "--run", run_folder, *arguments)


def test_a_video_and_two_names_are_enough(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_clip(tmp_path / "clip.mkv")
    made = tmp_path / "runs/clip"
    options = ["--classes", "high jump", "tennis swing", "--top", 3, "--csv", "--vtt", "--picture"]
    assert run(clip_run, "--video", "clip.mkv", *options) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "clip: the best 3, by time"
    assert printed[1].split() == ["start", "end", "class", "score"]
    assert len(printed) == 2 + 3 + 2 + 4
    assert printed[2:5] == sorted(printed[2:5])
    assert re.fullmatch(r" +0:0\d\.\d +0:0\d\.\d  (high jump|tennis swing) +0\.\d{3}", printed[2])
    assert printed[6].endswith("in 1 video; written:")
    names = ["clip.detections.json", "clip.csv", "clip.vtt", "clip.png"]
    assert printed[7:] == [f"  runs/clip/{name}" for name in names]
    assert sorted(path.name for path in made.iterdir()) == sorted(names)
    content = json.loads((made / "clip.detections.json").read_text())
    assert content["external_data"] == {"used": False, "details": ""}
    assert content["made_by"]["classes"] == {"high jump": ["high jump"], "tennis swing": ["tennis swing"]}
    assert len(content["results"]["clip"]) > 3, "the JSON holds all of them"
    assert len(read_results(made / "clip.detections.json")) == len(content["results"]["clip"])


def test_everything_at_once(clip_run: Path, tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mkv")
    (tmp_path / "classes.txt").write_text(f"{NASTY}\ndiving | a jump into water")
    outputs = ["--output", "o.json", "--csv", "o.csv", "--vtt", "o.vtt", "--picture", "o.png"]
    options = ["--template", "a video of {}", "a clip of {}.", "--fps", 3, "--top", 4, *outputs]
    assert run(clip_run, "--video", "clip.mkv", "--classes-file", "classes.txt", *options) == 0
    made_by = json.loads((tmp_path / "o.json").read_text())["made_by"]
    assert made_by["templates"] == ["a video of {}", "a clip of {}."]
    assert len(list(csv.reader((tmp_path / "o.csv").open()))) == 1 + 4
    assert (tmp_path / "o.vtt").read_text().count("-->") > 0
    assert Image.open(tmp_path / "o.png").size[0] > 1000


def test_a_folder_gives_a_file_a_video(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "clips").mkdir()
    for name in "ab":
        make_clip(tmp_path / f"clips/{name}.mkv")
    (tmp_path / "clips/broken.mp4").write_bytes(b"broken")
    options = ["--csv", "all.csv", "--vtt", "subs", "--picture"]
    assert run(clip_run, "--video", "clips", "--classes", "diving", *options) == 1
    printed = capsys.readouterr()
    assert re.search(r"broken: broken: .*broken\.mp4: Invalid data", printed.err)
    assert "in 2 videos; written:\n  runs/clips/clips.detections.json\n" in printed.out
    assert sorted(path.name for path in (tmp_path / "subs").iterdir()) == ["a.vtt", "b.vtt"]
    assert sorted(path.name for path in (tmp_path / "runs/clips").glob("*.png")) == ["a.png", "b.png"]
    assert {row["video"] for row in csv.DictReader((tmp_path / "all.csv").open())} == {"a", "b"}


def test_features_in_all_their_forms(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    features = np.random.default_rng(0).standard_normal((20, WIDTH)).astype(np.float32)
    write_folder(tmp_path / "folder", {"clip": features})
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
    assert "record no rate: say it with --fps" in capsys.readouterr().err
    np.save(tmp_path / "folder/other.npy", features)
    with pytest.raises(StaleError, match="--duration is of one video"):
        run(clip_run, "--features", "folder", "--classes", "diving", "--duration", "4")


def test_extracted_features_give_what_the_video_gives(clip_run: Path, tmp_path: Path) -> None:
    from scripts import extract_features

    make_clip(tmp_path / "clip.mkv")
    torch.save(random_image_encoder_weights(), tmp_path / "clip.pt")
    extract_features.main(["clip.mkv", "--weights", "clip.pt", "--output", "features"])
    assert run(clip_run, "--video", "clip.mkv", "--classes", "diving", "--output", "v.json") == 0
    assert run(clip_run, "--features", "features", "--classes", "diving", "--output", "f.json") == 0
    contents = [json.loads((tmp_path / name).read_text())["results"] for name in ("v.json", "f.json")]
    assert contents[0] == contents[1]


def test_features_of_another_image_encoder_are_named_at_the_end(clip_run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "f").mkdir()
    records = {
        "good": ImageEncoder(random_image_encoder_weights(), torch.device("cpu")).backbone.as_dict(),
        "other": {"backbone": "RN50"},
    }
    for name, record in records.items():
        np.save(tmp_path / f"f/{name}.npy", np.random.default_rng(0).standard_normal((9, WIDTH)))
        write_json(tmp_path / f"f/{name}.json", {"fps": 2.0, **record})
    assert run(clip_run, "--features", "f", "--classes", "diving") == 1
    printed = capsys.readouterr()
    assert "in 1 video" in printed.out
    assert "broken: other: the features of 'other' in f come from RN50" in printed.err


@pytest.mark.parametrize(
    "options",
    [
        ["--classes", "a"],
        ["--csv", "o.csv"],
        ["--top", "5"],
        ["--curves", "--test-config", "a.yaml"],
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
    with pytest.raises(SystemExit, match="^2$"):
        command.parse_arguments(["--run", "r", *options])
    assert "--" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "clip.mkv", "--classes", "a", "--picture", "p.bmp"], "p.bmp"),
        (["--video", "clip.mkv", "--classes", "a", "--fps", "-1"], "from 0.00001"),
        (["--video", "clip.mkv", "--classes-file", "none.txt"], "none.txt"),
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


@pytest.mark.slow
@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no reference data beside the checkout")
def test_real_clips(clip_run: Path, tmp_path: Path) -> None:
    assert run(clip_run, "--video", VIDEOS, "--classes", "high jump", "tennis swing", "--picture", "p") == 0
    results = json.loads((tmp_path / "runs/videos/videos.detections.json").read_text())["results"]
    assert set(results) == {"high_jump", "tennis"}
    assert max(item["segment"][1] for item in results["tennis"]) <= 11.27
    assert (tmp_path / "p/high_jump.png").stat().st_size > 50_000
