"""From video files to features: decoding by timestamps, the image tower, many videos, what is broken."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SHARED

from scripts import extract_features as command
from stale.data.features import open_features
from stale.data.tower import Tower, require_same_tower
from stale.errors import StaleError
from stale.model.tokenizer import load_clip_module
from stale.video.decode import Ahead, VideoInfo, find_videos, frames_at, probe
from stale.video.encoder import ImageEncoder
from stale.video.extract import Sampling, encode_video, encode_videos
from stale.video.preprocess import crop, normalise
from tests.clips import RESOLUTION, grey, image_tower_weights, make_clip, rotate_header, time_of
from tests.tiny import WIDTH

pytest.importorskip("av")
CPU = torch.device("cpu")
VIDEOS = SHARED / "data" / "videos"


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder(image_tower_weights(), CPU)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(image_tower_weights(), path)
    return path


def decoded(path: Path, times: list[float]) -> np.ndarray:
    """The times that the frames on display at ``times`` were painted for."""
    found = np.full(len(times), np.nan)
    for places, image in frames_at(path, np.array(times)):
        found[places] = time_of(image)
    return found


# Decoding


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "ffv1"), ("avi", "mjpeg"), ("mp4", "libx264"), ("mp4", "mpeg4")])
def test_a_clip_is_read_by_its_times(tmp_path: Path, suffix: str, codec: str) -> None:
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


def test_each_frame_is_given_once_with_every_time_it_answers(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", [0.0, 1.0, 2.0])
    assert [places for places, _ in frames_at(path, np.array([0.1, 0.2, 1.1, 2.0, 2.5]))] == [[0, 1], [2], [3, 4]]


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
def test_odd_sizes_are_whole(tmp_path: Path, shape: tuple[int, int]) -> None:
    def ramp(_: float) -> np.ndarray:
        return np.indices(shape).sum(0)[..., None].repeat(3, 2).astype(np.uint8)

    path = make_clip(tmp_path / "clip.mkv", paint=ramp)
    _, image = next(frames_at(path, np.array([0.0])))
    np.testing.assert_array_equal(image, ramp(0.0))


def test_a_file_without_a_stated_duration_is_measured(tmp_path: Path, encoder: ImageEncoder) -> None:
    """As browsers record."""
    import av

    path = make_clip(tmp_path / "clip.mkv", options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    assert probe(path).duration == pytest.approx(4.0, abs=0.11)
    assert len(encode_video(path, encoder, Sampling(5)).features) == 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "Invalid data"), (b"no video at all\n" * 50, "Invalid data")],
)
def test_what_is_no_video_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(StaleError, match=rf"clip\.mp4: .*{reason}"):
        probe(tmp_path / "clip.mp4")


def test_sound_alone_is_an_error(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(StaleError, match="no video stream"):
        probe(tmp_path / "sound.wav")


def test_a_video_cut_off_is_an_error_not_its_last_frame_repeated(tmp_path: Path, encoder: ImageEncoder) -> None:
    rng = np.random.default_rng(0)
    path = make_clip(
        tmp_path / "clip.mp4",
        np.arange(200) / 10,
        lambda _: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
        codec="mjpeg",
        options={"movflags": "faststart"},
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    assert probe(path).duration == pytest.approx(20.0, abs=0.11)
    with pytest.raises(StaleError, match="cut off|Invalid data"):
        encode_video(path, encoder, Sampling(5))


def test_folders_are_searched_and_names_must_differ(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/b.MP4", "deep/er/a.mkv", "deep/notes.txt", "deep/._b.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in find_videos([tmp_path])] == ["b.MP4", "a.mkv"]
    assert find_videos([tmp_path / "deep/notes.txt"]), "a file named is taken whatever its ending"
    with pytest.raises(StaleError, match="share the name 'b'"):
        (tmp_path / "b.avi").touch()
        find_videos([tmp_path])
    with pytest.raises(StaleError, match="not found"):
        find_videos([tmp_path / "absent.mp4"])
    with pytest.raises(StaleError, match="no video in"):
        (tmp_path / "empty").mkdir()
        find_videos([tmp_path / "empty"])


# Decoding ahead


def test_ahead_gives_all_in_order_and_raises_where_the_error_is() -> None:
    def items():
        yield from range(5)
        raise StaleError("broken")

    taken = []
    with pytest.raises(StaleError, match="broken"):
        for item in Ahead(items()):
            taken.append(item)
    assert taken == [0, 1, 2, 3, 4]


def test_ahead_can_be_closed_before_its_end() -> None:
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    ahead = Ahead(items())
    next(iter(ahead))
    ahead.close()
    assert closed.is_set()
    assert threading.active_count() == before


# Snippets


@pytest.mark.parametrize(
    ("sampling", "count", "first"),
    [
        (Sampling(5), 20, [0.1]),
        (Sampling(0.01), 1, [2.0]),
        (Sampling(stride=8), 5, [0.4]),
        (Sampling(3.1), 12, [1 / 6]),
    ],
)
def test_snippets_cover_the_video_exactly(sampling: Sampling, count: int, first: list[float]) -> None:
    times = sampling.times(VideoInfo(Path("v"), 4.0, 10.0))
    assert times.shape == (count, 1)
    np.testing.assert_allclose(times[0], first)
    np.testing.assert_allclose(times[0, 0], 4.0 - times[-1, 0])


def test_a_snippet_of_several_frames_lies_about_its_centre() -> None:
    times = Sampling(stride=20, length=4).times(VideoInfo(Path("v"), 4.0, 10.0))
    np.testing.assert_allclose(times, [[0.85, 0.95, 1.05, 1.15], [2.85, 2.95, 3.05, 3.15]])


@pytest.mark.parametrize("bad", [{"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"stride": 0}, {"length": 3}])
def test_impossible_sampling_is_an_error(bad: dict) -> None:
    with pytest.raises(StaleError):
        Sampling(**bad)


def test_a_snippet_is_the_mean_of_its_frames(tmp_path: Path, encoder: ImageEncoder) -> None:
    path = make_clip(tmp_path / "clip.mkv")
    found = encode_video(path, encoder, Sampling(stride=10, length=4))
    assert found.features.shape == (4, WIDTH)
    single = []
    for times in Sampling(stride=10, length=4).times(probe(path)):
        images = np.stack([crop(grey()(np.floor(time * 10 + 1e-6) / 10), RESOLUTION) for time in times])
        single.append(encoder.encode(images).mean(0))
    np.testing.assert_allclose(found.features, single, atol=5e-3)


def test_features_do_not_depend_on_batches_or_workers(tmp_path: Path, encoder: ImageEncoder) -> None:
    paths = [make_clip(tmp_path / f"{name}.mkv") for name in "abc"]
    every = [dict(encode_videos(paths, encoder, Sampling(5), *options)) for options in ((64, 1), (3, 3), (1, 2))]
    for found in every:
        assert list(found) == paths
        for path in paths:
            np.testing.assert_allclose(found[path].features, every[0][path].features, atol=2e-3)


def test_thumbnails_are_spread_over_the_video(tmp_path: Path, encoder: ImageEncoder) -> None:
    found = encode_video(make_clip(tmp_path / "clip.mkv"), encoder, Sampling(5), thumbnails=4)
    assert [image.shape for _, image in found.thumbnails] == [(RESOLUTION, RESOLUTION, 3)] * 4
    np.testing.assert_allclose([time for time, _ in found.thumbnails], [0.5, 1.5, 2.5, 3.5], atol=0.11)
    for time, image in found.thumbnails:
        assert time_of(image) == pytest.approx(time, abs=0.15)


# The image tower


def test_the_tower_is_openai_clips(encoder: ImageEncoder) -> None:
    clip = load_clip_module("model").CLIP(WIDTH, RESOLUTION, 2, 64, 8, 77, 16, 64, 1, 1).eval()
    clip.load_state_dict(image_tower_weights(), strict=False)
    images = np.random.default_rng(0).integers(0, 256, (3, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = clip.encode_image(normalise(torch.from_numpy(images)))
    np.testing.assert_allclose(encoder.encode(images), expected.numpy(), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_half_precision_on_a_gpu_is_near(encoder: ImageEncoder) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    half = ImageEncoder(image_tower_weights(), torch.device("cuda")).encode(images)
    np.testing.assert_allclose(half, encoder.encode(images), atol=2e-2)


def test_the_fingerprint_is_of_the_tensors_not_of_the_file() -> None:
    one, other = image_tower_weights(0), image_tower_weights(1)
    half = {name: tensor.half() for name, tensor in reversed(one.items())} | {"text_projection": torch.zeros(2, 2)}
    towers = [ImageEncoder(weights, CPU).tower for weights in (one, half, other)]
    assert towers[0] == towers[1]
    assert towers[0].weights_sha256 != towers[2].weights_sha256
    assert len(towers[0].weights_sha256) == 64


@pytest.mark.parametrize(
    ("width", "patch", "name"),
    [(768, 32, "ViT-B/32"), (768, 16, "ViT-B/16"), (1024, 14, "ViT-L/14"), (64, 8, "ViT width")],
)
def test_openais_models_are_recognised(width: int, patch: int, name: str) -> None:
    from stale.video.encoder import _name

    assert _name({"conv1.weight": torch.empty(width, 3, patch, patch)}, 224).startswith(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"token_embedding.weight": torch.zeros(2)}, "no image tower"),
        (lambda state: {"visual.layer1.0.conv1.weight": torch.zeros(2)}, "no vision transformer"),
        (lambda state: {k: v for k, v in state.items() if "resblocks.1.ln_1" not in k}, "do not form"),
        (lambda state: state | {"visual.proj": torch.zeros(3, 4)}, "do not form"),
    ],
)
def test_weights_that_form_no_image_tower_are_an_error(change, message: str) -> None:
    with pytest.raises(StaleError, match=message) as error:
        ImageEncoder(change(image_tower_weights()), CPU, "weights w.pt")
    assert "w.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_towers_that_are_known_must_be_the_same() -> None:
    mine = Tower("ViT-B/16", "a" * 64)
    for same in (mine, Tower(), Tower("ViT-B/16")):
        require_same_tower(mine, same, "features f")
        require_same_tower(same, mine, "features f")
    for other in (Tower("ViT-B/32"), Tower("ViT-B/16", "b" * 64)):
        with pytest.raises(StaleError, match="features f come from ViT.*ViT-B/16 .weights aaaaaaaa.*same image tower"):
            require_same_tower(mine, other, "features f")


# The command


def run(*arguments: object) -> int:
    """The command's exit code."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("output", ["features", "features.h5"])
def test_broken_videos_are_reported_and_the_others_done(tmp_path: Path, weights: Path, output: str, capsys) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "c"):
        make_clip(folder / f"{name}.mkv")
    (folder / "b.mp4").write_bytes(b"broken")
    target = tmp_path / output
    assert run(folder, "--weights", weights, "--output", target, "--device", "cpu") == 1
    printed = capsys.readouterr()
    assert "2 videos done, 0 finished earlier, 1 broken" in printed.out
    assert "b.mp4: Invalid data" in printed.err
    store = open_features(target)
    assert set(store.ids) == {"a", "c"}
    features, recorded = store.read("a"), store.attributes("a")
    assert features.shape == (20, WIDTH)
    assert features.dtype == np.float16
    assert recorded["fps"] * recorded["duration"] == pytest.approx(20)
    assert recorded["sampling"] == "5 fps"
    assert store.tower() == ImageEncoder.load(weights, CPU).tower
    assert {path.name for path in tmp_path.iterdir()} == {"videos", output}, "nothing is left behind"


@pytest.mark.parametrize("output", ["features", "features.h5"])
def test_finished_videos_are_skipped_and_new_ones_added(tmp_path: Path, weights: Path, output: str, capsys) -> None:
    first, second = (make_clip(tmp_path / f"{name}.mkv") for name in "ab")
    target = tmp_path / output
    assert run(first, "--weights", weights, "--output", target) == 0
    before = open_features(target).read("a")
    first.write_bytes(b"it is not read again")
    assert run(first, second, "--weights", weights, "--output", target) == 0
    assert "1 videos done, 1 finished earlier, 0 broken" in capsys.readouterr().out
    np.testing.assert_array_equal(open_features(target).read("a"), before)
    assert set(open_features(target).ids) == {"a", "b"}


def test_an_interrupted_hdf5_goes_on_where_it_stopped(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    videos = [make_clip(tmp_path / f"{name}.mkv") for name in "abc"]
    target = tmp_path / "features.h5"
    from stale.video import job

    def interrupted(*arguments: object):
        yield next(encode_videos(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "encode_videos", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*videos, "--weights", weights, "--output", target)
    assert not target.exists()
    monkeypatch.undo()
    assert run(*videos, "--weights", weights, "--output", target) == 0
    assert "2 videos done, 1 finished earlier" in capsys.readouterr().out
    assert set(open_features(target).ids) == {"a", "b", "c"}
    assert not (tmp_path / ".features.h5.parts").exists()


def test_parts_that_a_kill_left_behind_are_no_harm(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the file took its place, before they were removed."""
    target = tmp_path / "features.h5"
    with monkeypatch.context() as patch:
        patch.setattr("stale.video.job.shutil.rmtree", lambda path: None)
        assert run(make_clip(tmp_path / "a.mkv"), "--weights", weights, "--output", target) == 0
    before = open_features(target).read("a")
    assert run(*tmp_path.glob("*.mkv"), make_clip(tmp_path / "b.mkv"), "--weights", weights, "--output", target) == 0
    store = open_features(target)
    assert set(store.ids) == {"a", "b"}
    np.testing.assert_array_equal(store.read("a"), before)
    assert store.attributes("a")["duration"] == pytest.approx(4.0, abs=0.11)
    assert not (tmp_path / ".features.h5.parts").exists()


@pytest.mark.parametrize("output", ["features", "features.h5"])
def test_other_settings_do_not_mix(tmp_path: Path, weights: Path, output: str) -> None:
    video, target = make_clip(tmp_path / "a.mkv"), tmp_path / output
    assert run(video, "--weights", weights, "--output", target) == 0
    with pytest.raises(StaleError, match="another sampling .5 fps, now 2 fps"):
        run(video, "--weights", weights, "--output", target, "--fps", 2)
    torch.save(image_tower_weights(1), tmp_path / "other.pt")
    with pytest.raises(StaleError, match="another weights_sha256"):
        run(video, "--weights", tmp_path / "other.pt", "--output", target)


def test_attributes_of_an_hdf5_file_are_on_each_video(tmp_path: Path, weights: Path) -> None:
    run(make_clip(tmp_path / "a.mkv"), "--weights", weights, "--output", tmp_path / "f.h5", "--stride", 8)
    with h5py.File(tmp_path / "f.h5") as file:
        assert dict(file["a"].attrs).keys() == {"fps", "duration", "backbone", "weights_sha256", "sampling"}
        assert file["a"].attrs["sampling"] == "stride 8, length 1 frames"


def test_the_record_of_npy_features_is_json_beside_them(tmp_path: Path, weights: Path) -> None:
    run(make_clip(tmp_path / "a.mkv"), "--weights", weights, "--output", tmp_path / "f")
    record = json.loads((tmp_path / "f/a.json").read_text())
    assert record["duration"] == pytest.approx(4.0, abs=0.11)


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no reference data beside the checkout")
def test_real_clips(tmp_path: Path, weights: Path) -> None:
    """In a process of its own, as a user runs it."""
    script = [sys.executable, "scripts/extract_features.py", str(VIDEOS), "--fps", "2"]
    options = ["--weights", str(weights), "--output", str(tmp_path / "f.h5"), "--device", "cpu"]
    result = subprocess.run([*script, *options], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    store = open_features(tmp_path / "f.h5")
    assert {name: store.read(name).shape for name in store.ids} == {"high_jump": (48, WIDTH), "tennis": (23, WIDTH)}
    assert store.attributes("high_jump")["duration"] == pytest.approx(24.2)
    first = next(frames_at(VIDEOS / "tennis.mp4", np.array([0.25])))[1]
    assert first.shape == (180, 320, 3)
