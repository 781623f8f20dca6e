"""Decoding: frames by their timestamps, odd files, and folders of videos."""

import os
import struct
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stale.errors import StaleError
from stale.video.frames import find_videos, frames_at, probe
from tests.helpers import grey, make_clip, time_of, write_display_matrix

pytest.importorskip("av")


def decoded(path: Path, times: list[float]) -> np.ndarray:
    """The times that the frames on display at ``times`` were painted for."""
    found = np.full(len(times), np.nan)
    for indices, image in frames_at(path, np.array(times)):
        found[indices] = time_of(image)
    return found


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "ffv1"), ("avi", "mjpeg"), ("mp4", "libx264"), ("mp4", "mpeg4")])
def test_frames_are_found_by_their_times(tmp_path: Path, suffix: str, codec: str) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", codec=codec)
    assert probe(path).duration == pytest.approx(4.0, abs=0.11)
    assert probe(path).frame_rate == pytest.approx(10, rel=0.05)
    times = [0.05, 0.95, 1.45, 1.55, 3.85]
    np.testing.assert_allclose(decoded(path, times), np.floor(np.array(times) * 10) / 10, atol=0.06)


def test_the_frame_on_display_is_decoded_once_for_all_its_times(tmp_path: Path) -> None:
    """At a variable rate, and where the container does not start at 0 s."""
    stamps = [0.0, 0.1, 0.2, 1.5, 1.6, 3.0, 3.9]
    path = make_clip(tmp_path / "clip.mkv", stamps)
    times = [0.15, 0.19, 0.21, 1.4, 1.49, 1.55, 2.9, 3.05, 3.95]
    expected = [max(stamp for stamp in stamps if stamp <= time) for time in times]
    np.testing.assert_allclose(decoded(path, times), expected, atol=0.03)
    each_once = [[0, 1], [2, 3, 4], [5], [6], [7], [8]]
    assert [indices for indices, _ in frames_at(path, np.array(times))] == each_once
    shifted = make_clip(tmp_path / "clip.mkv", 7 + np.arange(40) / 10, lambda time: grey()(max(time - 7, 0)))
    np.testing.assert_allclose(decoded(shifted, [0.05, 2.05]), [0.0, 2.0], atol=0.06)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0, 48, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1, 64, 48), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0, 0, 64), np.rot90),
        ((-1, 0, 0, 1, 64, 0), np.fliplr),
        ((1, 0, 0, -1, 0, 48), np.flipud),
        ((0, 1, 1, 0, 0, 0), lambda image: image.swapaxes(0, 1)),
    ],
)
def test_the_display_matrix_is_applied(tmp_path: Path, matrix: tuple, shown: Callable) -> None:
    def corner(_: float) -> np.ndarray:
        image = np.zeros((48, 64, 3), dtype=np.uint8)
        image[:24, :32, 0] = 255
        image[:24, 32:, 1] = 255
        return image

    path = make_clip(tmp_path / "clip.mp4", paint=corner, codec="libx264")
    write_display_matrix(path, matrix)
    _, image = next(frames_at(path, np.array([1.0])))
    upright = shown(corner(0.0))
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 10


LIES = {  # container → codec, and where its header states 16 s: name, offset, the 4 s to write there
    ".mp4": ("libx264", [(b"mvhd", 20, struct.pack(">I", 4000)), (b"mdhd", 20, struct.pack(">I", 64000))]),
    ".mkv": ("ffv1", [(b"\x44\x89", 3, struct.pack(">d", 4000.0))]),
    ".avi": ("mjpeg", [(b"avih", 24, struct.pack("<I", 40)), (b"strh", 40, struct.pack("<I", 40))]),
}


def lying(path: Path) -> Path:
    """16 s, of which the header states a quarter."""
    codec, changes = LIES[path.suffix]
    content = bytearray(make_clip(path, np.arange(160) / 10, grey(seconds=16), codec).read_bytes())
    for name, offset, value in changes:
        place = content.find(name) + offset
        content[place : place + len(value)] = value
    path.write_bytes(content)
    return path


def joined(path: Path) -> Path:
    """Two files of 4 s, one after the other: both have the times 0 to 4 s."""
    first = make_clip(path, paint=grey(seconds=8), codec="libx264").read_bytes()
    second = make_clip(path, paint=lambda time: grey(seconds=8)(4 + time), codec="libx264").read_bytes()
    path.write_bytes(first + second)
    return path


def slow(path: Path) -> Path:
    """A frame a second, some of them of other frames later in the file."""
    return make_clip(path, np.arange(16.0), grey(seconds=16), "libx264", rate=1, last=1.0)


@pytest.mark.parametrize(
    ("make", "name", "duration", "message"),
    [
        (lying, "clip.mp4", 16.0, "its header says 4.0 s, its frames last 16.0 s"),
        (lying, "clip.mkv", 16.0, "its header says 4.0 s, its frames last 16.0 s"),
        (lying, "clip.avi", 16.0, "its header says 4.0 s, its frames last 16.0 s"),
        (joined, "clip.ts", 8.0, "its times begin again at 4.0 s"),
        (partial(make_clip, times=np.arange(120) / 30, rate=30, codec="libx264"), "clip.h264", 4.0, "30 a second are"),
        (partial(make_clip, codec="libx264", cover=True), "clip.mkv", 4.0, ""),
        (slow, "slow.mkv", 16.0, ""),
        (partial(make_clip, options={"live": "1"}), "recorded by a browser.mkv", 4.0, ""),
        (partial(make_clip, times=np.arange(20) / 10, paint=grey(seconds=8), last=6.1), "slides.mkv", 8.0, ""),
    ],
)
def test_all_frames_count_whatever_the_header_says(
    tmp_path: Path, log: pytest.LogCaptureFixture, make: Callable, name: str, duration: float, message: str
) -> None:
    path = make(tmp_path / name)
    info = probe(path)
    assert info.duration == pytest.approx(duration, abs=0.11)
    assert message in log.text
    assert bool(message) == bool(log.text)
    times = np.arange(0.25, duration, 0.5)
    shown = np.minimum(np.floor(times * info.frame_rate) / info.frame_rate, info.last)
    scale = duration / 4.0  # of the frames' painted times
    np.testing.assert_allclose(decoded(path, list(times)) * scale, shown, atol=0.06 * scale)


def test_a_damaged_frame_is_left_out(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    import av

    path = make_clip(tmp_path / "clip.avi", codec="mjpeg")
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    content = bytearray(path.read_bytes())
    for number, (place, size) in enumerate(places[10:12]):
        content[place : place + size] = bytes(size)
        path.write_bytes(content)
        if number == 0:
            np.testing.assert_allclose(decoded(path, [0.85, 1.05, 1.15]), [0.8, 0.9, 1.1], atol=0.06)
            assert "damaged frames left out: 1, at 1.0 s" in log.text
    with pytest.raises(StaleError, match="2 frames are damaged, at 1.0, 1.1 s"):
        decoded(path, [3.85])


def test_what_is_no_video_is_an_error(tmp_path: Path) -> None:
    for content in (b"", b"no video at all\n" * 50):
        (tmp_path / "clip.mp4").write_bytes(content)
        with pytest.raises(StaleError, match=r"clip\.mp4: .*Invalid data"):
            probe(tmp_path / "clip.mp4")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(StaleError, match="no video stream"):
        probe(tmp_path / "sound.wav")


def test_a_video_cut_off_is_an_error_not_its_last_frame_repeated(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times, options = np.arange(200) / 10, {"movflags": "faststart"}
    noise = lambda _: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)  # noqa: E731
    path = make_clip(tmp_path / "clip.mp4", times, noise, "mjpeg", options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(StaleError, match="its header says 20.0 s: cut off"):
        probe(path)


@pytest.mark.parametrize("name", ["a:b.mkv", "http:c.mkv", os.fsdecode(b"\xff.mkv"), "%d.mkv", "跳高 #1.mkv"])
def test_a_name_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "clip.mkv").rename(name)
    assert probe(*find_videos([Path(name)])).duration == pytest.approx(4.0, abs=0.11)


def test_folders_are_searched_and_names_must_differ(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/b.MP4", "deep/er/a.mkv", "deep/notes.txt", "deep/._b.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in find_videos([tmp_path])] == ["b.MP4", "a.mkv"]
    assert find_videos([tmp_path / "deep/notes.txt"]), "a file that is named is taken whatever its suffix"
    assert "no videos by their suffix: notes.txt" in log.text
    with pytest.raises(StaleError, match="URLs are not read"):
        find_videos([Path("https://example.org/a.mp4")])
    with pytest.raises(StaleError, match="share the name 'b'"):
        (tmp_path / "b.avi").touch()
        find_videos([tmp_path])
    with pytest.raises(StaleError, match="not found"):
        find_videos([tmp_path / "absent.mp4"])
    with pytest.raises(StaleError, match="no video in"):
        (tmp_path / "empty").mkdir()
        find_videos([tmp_path / "empty"])
