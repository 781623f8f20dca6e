"""From video files to features: snippets, many videos, what is broken, and the command."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import extract_features as command
from stale.data.features import open_features
from stale.errors import StaleError
from stale.video import extract as module
from stale.video.extract import VideoFeatures, encode_videos, extract_features
from stale.video.image_encoder import ImageEncoder, crop
from tests.helpers import RESOLUTION, WIDTH, exit_code, grey, make_clip, random_image_encoder_weights, time_of

pytest.importorskip("av")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(random_image_encoder_weights(), path)
    return path


def encode(path: Path, encoder: ImageEncoder, fps: float, thumbnails: int = 0) -> VideoFeatures:
    ((_, result),) = encode_videos([path], encoder, fps, thumbnails=thumbnails)
    assert isinstance(result, VideoFeatures)
    return result


# Snippets


def test_a_snippet_is_the_frame_at_its_centre(tmp_path: Path, encoder: ImageEncoder) -> None:
    path = make_clip(tmp_path / "clip.mkv")
    for fps, times in ((5, np.arange(0.1, 4, 0.2)), (1.1, [0.5, 1.5, 2.5, 3.5]), (0.01, [2.0])):
        images = [crop(grey()(np.floor(time * 10 + 1e-6) / 10), RESOLUTION) for time in times]
        np.testing.assert_allclose(encode(path, encoder, fps).features, encoder.encode(np.stack(images)), atol=5e-3)
    for fps in (0, -1, float("nan"), float("inf"), 5e-324):
        with pytest.raises(StaleError, match="snippets a second: 'fps' is"):
            encode(path, encoder, fps)


def test_features_do_not_depend_on_batches_or_workers(tmp_path: Path, encoder: ImageEncoder) -> None:
    paths = [make_clip(tmp_path / f"{name}.mkv") for name in "abc"]
    every = [
        dict(encode_videos(paths, encoder, 5, batch_size=size, workers=workers))
        for size, workers in ((64, 1), (3, 3), (1, 2))
    ]
    for found in every:
        assert list(found) == paths
        for path in paths:
            np.testing.assert_allclose(found[path].features, every[0][path].features, atol=2e-3)


def test_thumbnails_are_spread_over_the_video(tmp_path: Path, encoder: ImageEncoder) -> None:
    found = encode(make_clip(tmp_path / "clip.mkv"), encoder, 5, thumbnails=4)
    assert [image.shape for _, image in found.thumbnails] == [(RESOLUTION, RESOLUTION, 3)] * 4
    np.testing.assert_allclose([time for time, _ in found.thumbnails], [0.5, 1.5, 2.5, 3.5], atol=0.11)
    assert all(time_of(image) == pytest.approx(time, abs=0.15) for time, image in found.thumbnails)


# The command


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
    with pytest.raises(StaleError, match="another sampling .5 fps, now 2 fps"):
        run(video, "--weights", weights, "--output", target, "--fps", 2)
    with pytest.raises(StaleError, match="a.npy come from .*, quick_gelu., but now they would be of .*, gelu."):
        run(video, "--weights", weights, "--output", target, "--activation", "gelu")
    torch.save(random_image_encoder_weights(1), tmp_path / "other.pt")
    with pytest.raises(StaleError, match="a.npy come from .* but now they would be of"):
        run(video, "--weights", tmp_path / "other.pt", "--output", target)
    with pytest.raises(StaleError, match="f.h5 is not a folder"):
        run(video, "--weights", weights, "--output", tmp_path / "f.h5")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "a.npy cannot be read"),
        ("a.npy", None, "a.npy cannot be read"),
        ("a.json", b"{", "a.json"),
        ("a.json", b"[]", "attributes of video 'a' in .* cannot be read"),
        ("a.json", b"{}", "does not fit its record"),
        ("features.npy", b"", "index.json"),
    ],
)
def test_a_folder_that_is_damaged_or_of_another_program_is_left_alone(
    tmp_path: Path, encoder: ImageEncoder, name: str, content: bytes | None, message: str
) -> None:
    videos, target = [make_clip(tmp_path / f"{name}.mkv") for name in "ab"], tmp_path / "features"
    extract_features(videos[:1], target, encoder, 5)
    content = (target / name).read_bytes()[:-9] if content is None else content
    (target / name).write_bytes(content)
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(StaleError, match=message):
        extract_features(videos, target, encoder, 5)
    assert {path: path.read_bytes() for path in target.iterdir()} == before
