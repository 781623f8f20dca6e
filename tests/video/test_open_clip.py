"""Text and images by the libraries' own models: class embeddings and features are those of encode_text and -_image."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import embed_classes, extract_features
from stale.config import load_config
from stale.data.embeddings import read_embeddings
from stale.data.features import open_features
from stale.errors import StaleError
from stale.model.stale import load_text
from stale.model.text import TextEncoder
from stale.video.image_encoder import ImageEncoder
from tests.helpers import make_clip, random_image_encoder_weights, random_text_encoder_weights

try:
    import open_clip
except Exception:  # not installed, or beside a torchvision of another build
    open_clip = None

TEMPLATES = ["a video of {}", "{}."]
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A small model of open_clip with random weights, its preprocessing and its file."""
    if open_clip is None:
        pytest.skip("open_clip cannot be imported")
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "stale-tiny.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("stale-tiny", pretrained=None)
    torch.save(model.state_dict(), folder / "tiny.pt")
    return model.eval(), preprocess, folder / "tiny.pt"


def mean_of_unit(text: torch.Tensor) -> np.ndarray:
    """As :func:`read_embeddings` gives it: once more of unit length."""
    mean = torch.nn.functional.normalize(text, dim=-1).mean(0, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


@torch.no_grad()
def test_clip_embeds_classes_as_its_text_encoder(tmp_path: Path) -> None:
    torch.save(random_text_encoder_weights() | random_image_encoder_weights(), tmp_path / "clip.pt")
    common = ["--model", tmp_path / "clip.pt", "--output", tmp_path / "a.npz", "--template", *TEMPLATES]
    embed_classes.main([str(item) for item in (*common, "--classes", "HighJump", "golf | a golfer")])
    table = read_embeddings(tmp_path / "a.npz")
    config = load_config((), [f"model.text.weights={tmp_path}/clip.pt", "model.text.prompt=template"]).model
    encoder = TextEncoder(load_text(config), config.text)
    for name, phrases in (("HighJump", ["high jump"]), ("golf", ["golf", "a golfer"])):
        texts = [template.replace("{}", phrase) for phrase in phrases for template in TEMPLATES]
        expected = mean_of_unit(encoder(encoder.tokenize(texts, "{}")))
        np.testing.assert_allclose(table.vectors[table.find([name])], expected, atol=1e-5)
    with np.load(tmp_path / "a.npz") as file:
        assert len(str(file["text_sha256"])) == 64
        assert file["templates"].tolist() == TEMPLATES
    images = ImageEncoder.load(tmp_path / "clip.pt", torch.device("cpu")).backbone
    assert table.backbone == replace(images, backbone="clip.pt")
    table.require_model_of(images)


@torch.no_grad()
def test_open_clip_embeds_classes_as_encode_text(library: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, _, weights = library
    options = ["--library", "open_clip", "--model", "stale-tiny", "--pretrained", str(weights)]
    embed_classes.main([*options, "--classes", "HighJump", "--template", *TEMPLATES, "--output", f"{tmp_path}/a.npz"])
    tokens = open_clip.get_tokenizer("stale-tiny")(["a video of high jump", "high jump."])
    found = read_embeddings(tmp_path / "a.npz")
    np.testing.assert_allclose(found.vectors, mean_of_unit(model.encode_text(tokens)), atol=1e-5)
    assert found.backbone == extract_features.load_open_clip("stale-tiny", str(weights))[2]


@torch.no_grad()
def test_open_clips_own_preprocessing_and_encode_image(library: tuple[Any, Any, Path]) -> None:
    model, preprocess, weights = library
    encoder = extract_features.OpenClipEncoder("stale-tiny", str(weights), torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, (50, 81, 3), dtype=np.uint8)
    expected = model.encode_image(preprocess(Image.fromarray(image))[None]).numpy()
    np.testing.assert_allclose(encoder.encode(encoder.crop(image)[None]), expected, atol=1e-5)
    assert encoder.backbone.backbone == "open_clip stale-tiny tiny.pt"


def test_open_clip_features_of_a_video(library: tuple[Any, Any, Path], tmp_path: Path) -> None:
    pytest.importorskip("av")
    options = ["--library", "open_clip", "--weights", "stale-tiny", "--pretrained", str(library[2])]
    clip = make_clip(tmp_path / "clip.mkv")
    extract_features.main([str(clip), *options, "--output", str(tmp_path / "features"), "--fps", "2"])
    store = open_features(tmp_path / "features")
    assert store.read("clip").shape == (8, 32)
    assert store.backbone().backbone == "open_clip stale-tiny tiny.pt"
    assert "after the projection" in json.loads((tmp_path / "features/clip.json").read_text())["vectors"]


def test_a_model_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(StaleError, match="open_clip cannot (be imported|load no-such-model)") as error:
        extract_features.load_open_clip("no-such-model", "openai")
    assert "\n" not in str(error.value)
