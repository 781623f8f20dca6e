"""From video files to features: snippets, many videos, what is broken, and the command."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import extract_features as command
from stale.data.features import open_features
from stale.errors import StaleError
from stale.video import extract as module
from stale.video.extract import Sampling, encode_videos, extract_features
from stale.video.frames import VideoInfo, probe
from stale.video.image_encoder import ImageEncoder, crop
from tests.helpers import RESOLUTION, WIDTH, exit_code, grey, make_clip, random_image_encoder_weights, time_of

pytest.importorskip("av")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(random_image_encoder_weights(), path)
    return path


@pytest.mark.parametrize(
    ("sampling", "count", "first"),
    [(Sampling(5), 20, 0.1), (Sampling(0.01), 1, 2.0), (Sampling(stride=8), 5, 0.4), (Sampling(3.1), 12, 1 / 6)],
)
def test_snippets_cover_the_video_exactly(sampling: Sampling, count: int, first: float) -> None:
    times = sampling.times(VideoInfo(4.0, 10.0))
    assert times.shape == (count, 1)
    np.testing.assert_allclose(times[[0, -1], 0], [first, 4.0 - first])
    around = Sampling(stride=20, length=4).times(VideoInfo(4.0, 10.0))
    np.testing.assert_allclose(around, [[0.85, 0.95, 1.05, 1.15], [2.85, 2.95, 3.05, 3.15]])


RATES = (0, -1, float("nan"), float("inf"), 5e-324)


@pytest.mark.parametrize("bad", [*({"fps": fps} for fps in RATES), {"stride": 0}, {"length": 3}])
def test_impossible_sampling_is_an_error(bad: dict) -> None:
    with pytest.raises(StaleError):
        Sampling(**bad)


def test_a_snippet_is_the_mean_of_its_frames(tmp_path: Path, encoder: ImageEncoder) -> None:
    path = make_clip(tmp_path / "clip.mkv")
    ((_, found),) = encode_videos([path], encoder, Sampling(stride=10, length=4))
    assert found.features.shape == (4, WIDTH)
    single = []
    for times in Sampling(stride=10, length=4).times(probe(path)):
        images = np.stack([crop(grey()(np.floor(time * 10 + 1e-6) / 10), RESOLUTION) for time in times])
        single.append(encoder.encode(images).mean(0))
    np.testing.assert_allclose(found.features, single, atol=5e-3)


def test_features_do_not_depend_on_batches_or_workers(tmp_path: Path, encoder: ImageEncoder) -> None:
    paths = [make_clip(tmp_path / f"{name}.mkv") for name in "abc"]
    every = [
        dict(encode_videos(paths, encoder, Sampling(5), batch_size=size, workers=workers))
        for size, workers in ((64, 1), (3, 3), (1, 2))
    ]
    for found in every:
        assert list(found) == paths
        for path in paths:
            np.testing.assert_allclose(found[path].features, every[0][path].features, atol=2e-3)


def test_thumbnails_are_spread_over_the_video(tmp_path: Path, encoder: ImageEncoder) -> None:
    ((_, found),) = encode_videos([make_clip(tmp_path / "clip.mkv")], encoder, Sampling(5), thumbnails=4)
    assert [image.shape for _, image in found.thumbnails] == [(RESOLUTION, RESOLUTION, 3)] * 4
    np.testing.assert_allclose([time for time, _ in found.thumbnails], [0.5, 1.5, 2.5, 3.5], atol=0.11)
    assert all(time_of(image) == pytest.approx(time, abs=0.15) for time, image in found.thumbnails)


def run(*arguments: object) -> int:
    return exit_code(command.main, *arguments)


def test_broken_videos_are_reported_and_the_others_done(tmp_path: Path, weights: Path, capsys) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "c"):
        make_clip(folder / f"{name}.mkv")
    (folder / "b.mp4").write_bytes(b"broken")
    target = tmp_path / "features"
    assert run(folder, "--weights", weights, "--output", target, "--device", "cpu") == 1
    printed = capsys.readouterr()
    assert "2 videos done, 0 finished earlier, 1 broken" in printed.out
    assert "b.mp4: Invalid data" in printed.err
    store = open_features(target)
    assert set(store.ids) == {"a", "c"}
    features, recorded = store.read("a"), store.attributes("a")
    assert (features.shape, features.dtype) == ((20, WIDTH), np.float16)
    assert recorded.keys() == {"fps", "duration", "backbone", "weights_sha256", "activation", "sampling"}
    assert recorded["duration"] == pytest.approx(4.0, abs=0.11)
    assert recorded["fps"] * recorded["duration"] == pytest.approx(20)
    assert recorded["sampling"] == "5 fps"
    assert store.backbone() == ImageEncoder.load(weights, CPU).backbone
    assert {path.name for path in target.iterdir()} == {"a.npy", "a.json", "c.npy", "c.json"}, "nothing is left behind"


def test_an_interrupted_run_is_resumed(tmp_path: Path, weights: Path, monkeypatch, capsys) -> None:
    first, second = (make_clip(tmp_path / f"{name}.mkv") for name in "ab")
    target = tmp_path / "features"

    def interrupted(*arguments: object, **options: object):
        yield next(encode_videos(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode_videos", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(first, second, "--weights", weights, "--output", target)
    monkeypatch.undo()
    before = open_features(target).read("a")
    first.write_bytes(b"it is not decoded again")
    assert run(first, second, "--weights", weights, "--output", target) == 0
    assert "1 videos done, 1 finished earlier, 0 broken" in capsys.readouterr().out
    np.testing.assert_array_equal(open_features(target).read("a"), before)
    assert set(open_features(target).ids) == {"a", "b"}


def test_other_settings_do_not_mix(tmp_path: Path, weights: Path) -> None:
    video, target = make_clip(tmp_path / "a.mkv"), tmp_path / "features"
    assert run(video, "--weights", weights, "--output", target) == 0
    torch.save(random_image_encoder_weights(1), tmp_path / "other.pt")
    for message, *other in (
        ("another sampling .5 fps, now 2 fps", "--fps", 2),
        ("another activation .quick_gelu, now gelu", "--activation", "gelu"),
        ("another weights_sha256", "--weights", tmp_path / "other.pt"),
        ("f.h5: features are written into a folder", "--output", tmp_path / "f.h5"),
    ):
        with pytest.raises(StaleError, match=message):
            run(video, "--weights", weights, "--output", target, *other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "a.npy cannot be read"),
        ("a.npy", None, "a.npy cannot be read"),
        ("a.json", b"{", "a.json"),
        ("a.json", b"[]", "a.json: an object"),
        ("a.json", b"{}", "another backbone .None"),
        ("features.npy", b"", "index.json"),
    ],
)
def test_a_folder_that_is_damaged_or_of_another_program_is_left_alone(
    tmp_path: Path, encoder: ImageEncoder, name: str, content: bytes | None, message: str
) -> None:
    videos, target = [make_clip(tmp_path / f"{name}.mkv") for name in "ab"], tmp_path / "features"
    extract_features(videos[:1], target, encoder, Sampling(5))
    content = (target / name).read_bytes()[:-9] if content is None else content
    (target / name).write_bytes(content)
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(StaleError, match=message):
        extract_features(videos, target, encoder, Sampling(5))
    assert {path: path.read_bytes() for path in target.iterdir()} == before
