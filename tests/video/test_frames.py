"""Decoding: frames by their timestamps, odd files, and folders of videos."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from stale.errors import StaleError
from stale.video.frames import find_videos, frames_at, probe
from tests.helpers import grey, make_clip, rotate_header, time_of

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


def test_a_variable_rate_shows_the_frame_that_is_on_display(tmp_path: Path) -> None:
    stamps = [0.0, 0.1, 0.2, 1.5, 1.6, 3.0, 3.9]
    path = make_clip(tmp_path / "clip.mkv", stamps)
    times = [0.15, 0.19, 0.21, 1.4, 1.49, 1.55, 2.9, 3.05, 3.95]
    expected = [max(stamp for stamp in stamps if stamp <= time) for time in times]
    np.testing.assert_allclose(decoded(path, times), expected, atol=0.03)


def test_each_frame_is_decoded_once_for_all_its_times(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", [0.0, 1.0, 2.0])
    assert [indices for indices, _ in frames_at(path, np.array([0.1, 0.2, 1.1, 2.0, 2.5]))] == [[0, 1], [2], [3, 4]]


def test_time_starts_where_the_container_starts(tmp_path: Path) -> None:
    shifted = make_clip(tmp_path / "clip.mkv", 7 + np.arange(40) / 10, lambda time: grey()(max(time - 7, 0)))
    np.testing.assert_allclose(decoded(shifted, [0.05, 2.05]), [0.0, 2.0], atol=0.06)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_rotation_in_the_header_is_applied(tmp_path: Path, turns: int) -> None:
    def corner(_: float) -> np.ndarray:
        image = np.zeros((48, 64, 3), dtype=np.uint8)
        image[:24, :32, 0] = 255
        return image

    path = make_clip(tmp_path / "clip.mp4", paint=corner, codec="libx264")
    rotate_header(path, 64, 48, turns)
    _, image = next(frames_at(path, np.array([1.0])))
    upright = np.rot90(corner(0.0), -turns)  # phones count clockwise
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 10


@pytest.mark.parametrize("shape", [(37, 51), (5, 7), (33, 240), (241, 17)])
def test_odd_sizes_are_decoded_whole(tmp_path: Path, shape: tuple[int, int]) -> None:
    def ramp(_: float) -> np.ndarray:
        return np.indices(shape).sum(0)[..., None].repeat(3, 2).astype(np.uint8)

    path = make_clip(tmp_path / "clip.mkv", paint=ramp)
    _, image = next(frames_at(path, np.array([0.0])))
    np.testing.assert_array_equal(image, ramp(0.0))


def test_a_file_without_a_stated_duration_is_measured(tmp_path: Path) -> None:
    """As browsers record."""
    import av

    path = make_clip(tmp_path / "clip.mkv", options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    assert probe(path).duration == pytest.approx(4.0, abs=0.11)


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
    assert probe(path).duration == pytest.approx(20.0, abs=0.11)
    with pytest.raises(StaleError, match="cut off|Invalid data"):
        list(frames_at(path, np.arange(0.1, 20, 0.2)))


def test_folders_are_searched_and_names_must_differ(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/b.MP4", "deep/er/a.mkv", "deep/notes.txt", "deep/._b.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in find_videos([tmp_path])] == ["b.MP4", "a.mkv"]
    assert find_videos([tmp_path / "deep/notes.txt"]), "a file that is named is taken whatever its suffix"
    with pytest.raises(StaleError, match="share the name 'b'"):
        (tmp_path / "b.avi").touch()
        find_videos([tmp_path])
    with pytest.raises(StaleError, match="not found"):
        find_videos([tmp_path / "absent.mp4"])
    with pytest.raises(StaleError, match="no video in"):
        (tmp_path / "empty").mkdir()
        find_videos([tmp_path / "empty"])
