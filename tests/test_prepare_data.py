"""From archives, copies or a mirror to a root that training can read, and nothing changes the second time."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY, SHARED, needs_shared
from preparation_sources import serve, some_lists, write_archive, write_repository

from stale.data.annotations import Instance, Video, all_labels, read_annotations
from stale.data.splits import load_split
from stale.errors import StaleError
from stale.preparation import thumos14
from stale.preparation.catalog import ACTIVITYNET, DATA_SETS, SPLITS, THUMOS14, DataSet, Subset, count_faults
from stale.preparation.converters import Annotations, write_as
from stale.preparation.downloads import Patience
from stale.preparation.prepare import prepare
from stale.preparation.splits import fingerprint, read_lists, read_zipped_lists, write_lists

CLASSES = list(thumos14.CLASSES)
ZIPS = [source.name for source in THUMOS14.sources]
IMPATIENT = Patience(1, 0.0, lambda _: None)


def make_videos() -> dict[str, Video]:
    """Two videos of the challenge by name, with all classes; CliffDiving and Diving at the same time."""
    instances = tuple(Instance(number / 2, number / 2 + 1.5, label) for number, label in enumerate(CLASSES))
    names = {"video_validation_0000051": "validation", "video_test_0000004": "test"}
    durations = {"video_validation_0000051": 169.79, "video_test_0000004": 33.83}
    return {name: Video(name, subset, durations[name], instances) for name, subset in names.items()}


@pytest.fixture
def small() -> DataSet:
    """THUMOS14 with two videos."""
    return replace(THUMOS14, subsets={"validation": Subset((1,), 20), "test": Subset((1,), 20)})


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder of copies: the two archives and EffPrompt's repository."""
    folder = tmp_path / "copies"
    folder.mkdir()
    ambiguous = "video_test_0001292  1.0 2.0\n"
    for name, subset in zip(ZIPS, ("validation", "test"), strict=True):
        write_archive(folder / name, make_videos(), subset, ambiguous if subset == "test" else "")
    write_repository(folder / SPLITS.name, {"THUMOS14": some_lists(CLASSES), "ActivityNet": some_lists(["a", "b"])})
    return folder


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_archives_become_one_file_and_the_second_run_changes_nothing(
    small: DataSet, copies: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    steps = prepare(small, root, str(copies))
    assert [(step.name, step.state) for step in steps] == [
        ("annotations", "made"), ("splits", "made"), ("features", "missing"),
    ]  # fmt: skip
    assert "1 ambiguous segments left out" in steps[0].detail and "differs from the copy" in steps[0].detail
    assert str(root / "thumos14" / "features") in steps[2].detail and "github.com/sauradip/STALE" in steps[2].detail
    videos = read_annotations(root / "thumos14" / "thumos14.json")
    assert set(videos) == set(make_videos())
    for name, video in make_videos().items():
        assert Counter(videos[name].instances) == Counter(video.instances)
        assert (videos[name].subset, videos[name].duration) == (video.subset, pytest.approx(video.duration, abs=60))
    split = load_split(CLASSES, "75_25", 9, root / "splits", "thumos14")
    assert (len(split.seen), len(split.unseen)) == (15, 5)
    before = snapshot(root)
    shutil.rmtree(copies)
    assert [step.state for step in prepare(small, root)] == ["kept", "kept", "missing"]
    assert snapshot(root) == before


def test_durations_are_the_challenges(copies: Path) -> None:
    parsed = thumos14.read_archives(*(copies / name for name in ZIPS))
    assert parsed.fps == {"video_test_0000004": 30.0, "video_validation_0000051": 30.0}
    assert parsed.videos["video_test_0000004"].duration == 33.83


@needs_shared
def test_the_real_annotations_survive_the_way_through_archives(tmp_path: Path, thumos14: dict[str, Video]) -> None:
    for name, subset in zip(ZIPS, ("validation", "test"), strict=True):
        write_archive(tmp_path / name, thumos14, subset)
    write_lists(read_lists(SHARED / "data" / "splits", "THUMOS14"), tmp_path / "splits", "THUMOS14")
    steps = prepare(THUMOS14, tmp_path / "data", str(tmp_path))
    assert "412 videos, 6,365 segments, 20 classes" in steps[0].detail
    assert all("content equal to the copy" in step.detail for step in steps[:2])


@needs_shared
@pytest.mark.parametrize("data_set", DATA_SETS.values(), ids=DATA_SETS)
def test_both_data_sets_from_copies(data_set: DataSet, tmp_path: Path) -> None:
    steps = prepare(data_set, tmp_path, str(SHARED / "data"))
    assert all("content equal to the copy" in step.detail for step in steps[:2])
    videos = read_annotations(tmp_path / data_set.name / data_set.annotations)
    original = read_annotations(SHARED / "data" / "annotations" / data_set.annotations)
    assert list(videos) == sorted(original)
    for name, video in original.items():
        assert Counter(videos[name].instances) == Counter(video.instances)
    labels = all_labels(videos.values())
    for setting in ("75_25", "50_50"):
        for index in range(10):
            mine = load_split(labels, setting, index, tmp_path / "splits", data_set.name)
            assert mine == load_split(labels, setting, index, SHARED / "data" / "splits", data_set.name)


def test_from_the_network_with_a_broken_line(small: DataSet, copies: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    with serve() as server:
        server.files = {path.name: path.read_bytes() for path in copies.iterdir()}
        server.faults = [500, 400]
        steps = prepare(small, root, server.url, Patience(4, 0.0, lambda _: None))
        asked = [name for name, _ in server.requests]
        assert asked == [f"/{ZIPS[0]}"] * 3 + [f"/{ZIPS[1]}", f"/{SPLITS.name}"]
    assert [step.state for step in steps] == ["made", "made", "missing"]
    entries = json.loads((root / "manifest.json").read_text())["files"]
    assert {name for name in entries if name.startswith("downloads/")} == {
        f"downloads/{name}" for name in (*ZIPS, SPLITS.name)
    }
    assert entries[f"downloads/{ZIPS[0]}"]["address"] == f"{server.url}/{ZIPS[0]}"
    before = snapshot(root)
    (root / "thumos14" / "thumos14.json").unlink()
    prepare(small, root)  # made again of the downloads, no network needed
    assert {name: content for name, (content, _) in snapshot(root).items() if "manifest" not in name} == {
        name: content for name, (content, _) in before.items() if "manifest" not in name
    }


def test_a_download_that_changed_since_the_first_time_is_refused(small: DataSet, copies: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    with serve() as server:
        server.files = {path.name: path.read_bytes() for path in copies.iterdir()}
        prepare(small, root, server.url, IMPATIENT)
        (root / "thumos14" / "thumos14.json").unlink()
        (root / "downloads" / ZIPS[0]).unlink()
        server.files[ZIPS[0]] += b"\0"
        with pytest.raises(StaleError, match="has changed where it comes from, or is damaged"):
            prepare(small, root, server.url, IMPATIENT)
    assert not (root / "thumos14" / "thumos14.json").exists()


def test_a_page_of_a_hotel_is_not_taken_for_the_archive(small: DataSet, copies: Path, tmp_path: Path) -> None:
    with serve() as server:
        server.files = {path.name: path.read_bytes() for path in copies.iterdir()} | {ZIPS[1]: b"<html>Welcome</html>"}
        with pytest.raises(StaleError, match="cannot be read"):
            prepare(small, tmp_path / "data", server.url, IMPATIENT)
        server.files[ZIPS[1]] = (copies / ZIPS[1]).read_bytes()
        assert prepare(small, tmp_path / "data", server.url, IMPATIENT)[0].state == "made"


def test_other_annotations_are_refused_and_nothing_is_written(copies: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleError, match="not the annotations of THUMOS14: 1 validation videos, not 200; 20 valid"):
        prepare(THUMOS14, tmp_path / "data", str(copies))
    assert not (tmp_path / "data" / "thumos14").exists()


def test_files_changed_by_hand_are_noticed(small: DataSet, copies: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    prepare(small, root, str(copies))
    path = root / "splits" / "train_75_test_25" / "THUMOS14" / "test" / "split_3.list"
    original = path.read_text()
    path.write_text(original + "\n")  # a blank line says nothing
    assert prepare(small, root)[1].state == "kept"
    path.write_text(original.replace("Pitch", "Throw"))
    with pytest.raises(StaleError, match="splits/THUMOS14: SHA-256"):
        prepare(small, root)
    path.write_text(original)
    with open(root / "thumos14" / "thumos14.json", "a") as file:
        file.write(" ")
    with pytest.raises(StaleError, match="is not the file that"):
        prepare(small, root)


def test_files_put_there_by_hand_are_checked_and_kept(small: DataSet, tmp_path: Path) -> None:
    write_as("activitynet", Annotations(make_videos()), tmp_path / "thumos14" / "thumos14.json")
    write_lists(some_lists(CLASSES), tmp_path / "splits", "THUMOS14")
    before = snapshot(tmp_path)
    assert [step.state for step in prepare(small, tmp_path)] == ["kept", "kept", "missing"]
    assert {name: before[name] for name in before} == {name: snapshot(tmp_path)[name] for name in before}
    (tmp_path / "other" / "thumos14").mkdir(parents=True)
    (tmp_path / "other" / "thumos14" / "thumos14.json").write_text('{"database": {}}')
    with pytest.raises(StaleError, match="not the annotations of THUMOS14"):
        prepare(small, tmp_path / "other")


def test_half_written_lists_are_made_again(small: DataSet, copies: Path, tmp_path: Path) -> None:
    half = dict(list(some_lists(CLASSES[::-1]).items())[:7])
    write_lists(half, tmp_path / "data" / "splits", "THUMOS14")
    assert prepare(small, tmp_path / "data", str(copies))[1].state == "made"
    assert read_lists(tmp_path / "data" / "splits", "THUMOS14") == some_lists(CLASSES)


def test_lists_that_do_not_fit_are_refused(small: DataSet, copies: Path, tmp_path: Path) -> None:
    write_repository(copies / SPLITS.name, {"THUMOS14": some_lists(CLASSES[:-1])})
    with pytest.raises(StaleError, match="20 splits do not fit the annotations: train_75_test_25/.*VolleyballSpiking"):
        prepare(small, tmp_path / "data", str(copies))
    assert not (tmp_path / "data" / "splits").exists()
    write_repository(copies / SPLITS.name, {"THUMOS14": dict(list(some_lists(CLASSES).items())[1:])})
    with pytest.raises(StaleError, match="1 lists of THUMOS14 are missing: train_75_test_25/train/split_0.list"):
        prepare(small, tmp_path / "data", str(copies))


def test_two_versions_of_a_list_in_one_archive(tmp_path: Path) -> None:
    path = write_repository(tmp_path / "r.zip", {"THUMOS14": some_lists(CLASSES)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("r/old/train_75_test_25/thumos14/train/split_0.list", "Diving")
    with pytest.raises(StaleError, match="two different lists"):
        read_zipped_lists(path, "THUMOS14")


def test_fingerprints_know_what_matters() -> None:
    lists = some_lists(CLASSES)
    name = next(iter(lists))
    assert fingerprint(lists) == fingerprint({**lists, name: lists[name][::-1]})
    assert fingerprint(lists) != fingerprint({**lists, name: lists[name][1:]})


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("video_validation_0000051 1.0\n", "is not a video with start and end"),
        ("video_validation_0000051 1.0 x\n", "is not a video with start and end"),
        ("video_validation_9999999 1.0 2.0\n", "no duration is known of video_validation_9999999"),
        ("../../etc/passwd 1.0 2.0\n", "no duration is known of ../../etc/passwd"),
    ],
)
def test_odd_lines_of_the_challenge(tmp_path: Path, line: str, fault: str) -> None:
    path = write_archive(tmp_path / ZIPS[0], make_videos(), "validation")
    with zipfile.ZipFile(path) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text + line.encode() if name.endswith("/Diving_val.txt") else text)
    with pytest.raises(StaleError, match=fault):
        thumos14.read_archives(path)


def test_an_archive_without_a_class(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("annotation/Diving_val.txt", "video_validation_0000051 1 2")
    with pytest.raises(StaleError, match="no text file of BaseballPitch"):
        thumos14.read_archives(tmp_path / "z.zip")


def test_annotations_may_be_gzipped_and_their_folder_must_exist(small: DataSet, copies: Path, tmp_path: Path) -> None:
    for name in ZIPS:
        (copies / name).unlink()
    with pytest.raises(StaleError, match="none of thumos14.json, TH14_Temporal_annotations_validation.zip"):
        prepare(small, tmp_path / "data", str(copies))
    write_as("activitynet", Annotations(make_videos()), tmp_path / "plain.json")
    (copies / "annotations").mkdir()
    (copies / "annotations" / "thumos14.json.gz").write_bytes(gzip.compress((tmp_path / "plain.json").read_bytes()))
    assert prepare(small, tmp_path / "data", str(copies))[0].state == "made"
    with pytest.raises(StaleError, match="--from nowhere: no such folder"):
        prepare(small, tmp_path / "other", "nowhere")
    with pytest.raises(StaleError, match="only HTTPS mirrors"):
        prepare(small, tmp_path / "other", "http://example.org")


def test_the_public_counts() -> None:
    assert sum(subset.videos[0] for subset in ACTIVITYNET.subsets.values()) == 19_994
    assert sum(subset.segments for subset in ACTIVITYNET.subsets.values()) == 23_064
    assert THUMOS14.subsets["test"].videos == (212, 213)
    strange = {"a": Video("a", "holdout", 1.0, ())}
    assert "unknown subset holdout" in count_faults(ACTIVITYNET, strange)
    for data_set in DATA_SETS.values():
        assert all(url.startswith("https://") for source in (*data_set.sources, SPLITS) for url in source.urls)


@pytest.mark.parametrize(
    "command", [["thumos14"], ["nonsense", "--root", "x"], ["thumos14", "--root", "x", "--sample", "1"]]
)
def test_a_wrong_call_is_code_2(command: list[str]) -> None:
    script = REPOSITORY / "scripts" / "prepare_data.py"
    assert subprocess.run([sys.executable, script, *command], capture_output=True).returncode == 2


def test_the_command_says_what_it_did(copies: Path, tmp_path: Path) -> None:
    write_as("activitynet", Annotations(make_videos()), tmp_path / "thumos14" / "thumos14.json")
    script = REPOSITORY / "scripts" / "prepare_data.py"
    command = [sys.executable, script, "thumos14", "--root", tmp_path, "--from", copies]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2  # two videos are not THUMOS14
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
