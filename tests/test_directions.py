"""The switches beyond the paper that configs/stale_plus.yaml leaves off: what each does, against a plain form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from tiny import UNSEEN, make_data_set, tiny_config, tiny_tower
from torch import Tensor
from torch.nn import functional as F

from stale.build import build_model, phrases, restore_model, untrained_text
from stale.checkpoint import load_checkpoint
from stale.config import DetectionConfig, load_config
from stale.data.annotations import Video
from stale.detection.detector import candidates_of, class_scores_of, describe_classes, read_videos, read_windows
from stale.detection.inference import infer
from stale.errors import StaleError
from stale.files import read_json
from stale.model import tokenizer
from stale.model.stale import Outputs, Stale
from stale.reproduce.catalog import TABLES
from stale.run import RunFolder
from stale.training.losses import anchor_loss
from stale.training.trainer import train

B, T, C = 2, 16, 64
NAMES = ["diving", "high jump", "shot put"]
K = len(NAMES)


def model_of(*settings: str) -> Stale:
    torch.manual_seed(0)
    config = load_config((), settings)
    return build_model(config.model, T, C, tiny_tower(layers=1), NAMES).eval()


def random_features(length: int) -> Tensor:
    return torch.randn(B, length, C, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs_of(model: Stale, features: Tensor) -> Outputs:
    return model(features, describe_classes(model, NAMES).clone())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose text has moved far from where it began."""
    folder = tmp_path_factory.mktemp("run")
    file = make_data_set(folder / "data")
    settings = ("train.epochs=1", "train.learning_rate=1e-2", "model.text.context_init=a video of action")
    return train(tiny_config(file, *settings), folder / "run")


# Alignment


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_raw_similarity_is_that_of_features_and_text_before_the_model_touches_them(share: float) -> None:
    features = random_features(T)
    adapted = outputs_of(model_of(), features)
    mixed = outputs_of(model_of(f"model.raw_similarity={share}"), features)
    model = model_of()
    with torch.no_grad():
        text = torch.cat([describe_classes(model, NAMES), model.background[None]])
        mask = (adapted.foreground > 0.5).float()
    for b in range(B):
        for t in range(T):
            for k in range(K + 1):
                raw = F.cosine_similarity(features[b, t], text[k], dim=0) * mask[b, t] / 0.01
                expected = (1 - share) * adapted.class_logits[b, k, t] + share * raw
                assert float(mixed.class_logits[b, k, t]) == pytest.approx(float(expected), abs=1e-3)


def test_the_anchor_is_one_less_the_mean_cosine_and_pulls_the_text_back() -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, text = torch.randn(K, C, generator=generator), torch.randn(K, C, generator=generator).requires_grad_()
    expected = sum(1 - F.cosine_similarity(text[k], anchor[k], dim=0) for k in range(K)) / K
    loss = anchor_loss(text, anchor)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert anchor_loss(text.detach() - text.grad, anchor) < loss
    assert float(anchor_loss(3 * anchor, anchor)) == pytest.approx(0, abs=1e-6)  # length does not count


def test_training_with_the_anchor_stays_nearer_to_the_template(tmp_path: Path) -> None:
    file = make_data_set(tmp_path / "data")
    similarity = {}
    for weight in (0, 100):
        settings = ("train.epochs=2", "train.learning_rate=1e-3", "train.clip_norm=0", f"loss.anchor={weight}")
        config = tiny_config(file, *settings)
        run = train(config, tmp_path / f"run{weight}")
        model = restore_model(config, load_checkpoint(run.checkpoint("last")))
        names = phrases(UNSEEN)
        found, start = describe_classes(model, names), untrained_text(config.model, names)
        similarity[weight] = float(F.cosine_similarity(found, start).mean())
        recorded = [json.loads(line) for line in run.history.read_text().splitlines()]
        assert any("anchor" in record for record in recorded) == (weight > 0)
    assert similarity[100] > similarity[0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tested_text_is_averaged_with_what_training_began_with(trained: RunFolder, share: float) -> None:
    config, checkpoint = trained.load_config(), load_checkpoint(trained.checkpoint("last"))
    after = restore_model(config, checkpoint).text
    config.model.text.start_share = share
    found = dict(restore_model(config, checkpoint).text.named_parameters())
    weights = torch.load(config.model.text.weights)
    start = {f"tower.{name}": tensor.float() for name, tensor in weights.items()}
    assert not torch.equal(after.tower.text_projection, start["tower.text_projection"])
    for name, trained_weight in after.named_parameters():
        if name != "context":
            expected = (1 - share) * trained_weight + share * start[name]
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
    begun = after.tower.embed(torch.tensor(tokenizer.encode("a video of action")))
    torch.testing.assert_close(found["context"], (1 - share) * after.context + share * begun, atol=1e-6, rtol=1e-5)


def test_random_context_tokens_have_no_start_to_be_averaged_with(tmp_path: Path) -> None:
    config = tiny_config(make_data_set(tmp_path / "data"), "train.epochs=1")
    checkpoint = load_checkpoint(train(config, tmp_path / "run").checkpoint("last"))
    config.model.text.start_share = 1.0
    assert torch.equal(restore_model(config, checkpoint).text.context, checkpoint["model"]["text.context"])


# Names


def test_several_templates_are_averaged() -> None:
    model = model_of()
    templates = ["{}", "a person doing {}"]
    found = describe_classes(model, NAMES, templates)
    with torch.inference_mode():
        parts = [model.text(model.text.tokenize([t.replace("{}", name) for name in NAMES], "{}")) for t in templates]
        expected = sum(F.normalize(part, dim=-1) for part in parts) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_templates_change_detections_and_not_the_vocabulary(trained: RunFolder) -> None:
    infer(trained)
    plain = read_json(trained.detections("unseen"), "detections")["results"]
    config = trained.load_config()
    text = trained.config.read_text()
    try:
        trained.config.write_text(text.replace("templates: null", "templates: ['{}', 'somebody else, {}, today']"))
        assert trained.load_config() != config
        infer(trained)
    finally:
        trained.config.write_text(text)
    averaged = read_json(trained.detections("unseen"), "detections")["results"]
    assert averaged.keys() == plain.keys()
    assert averaged != plain
    assert {row["label"] for rows in averaged.values() for row in rows} <= set(UNSEEN)


def test_the_background_bias_is_added_to_the_backgrounds_logit_alone() -> None:
    outputs = outputs_of(model_of(), random_features(T))
    found = class_scores_of(outputs, DetectionConfig(background_bias=-1.5, foreground_weight=False))
    logits = outputs.class_logits.clone()
    logits[:, K] -= 1.5
    torch.testing.assert_close(found, logits.softmax(1)[:, :K])
    assert (found >= class_scores_of(outputs, DetectionConfig(foreground_weight=False))).all()


# Windows


def test_windows_are_the_videos_own_pieces_read_alone() -> None:
    """Each window's candidates are those of a video of just these snippets, moved, without what it cuts off."""
    model, features = model_of(), random_features(2 * T)
    options = DetectionConfig(candidates=10**4, top_snippets=K * T, fineness=2, windows=True)
    text = describe_classes(model, NAMES)
    with torch.inference_mode():
        whole = model(model.coarsen(features), text)
        found = as_rows(read_windows(model, features, text, whole, options))
        expected = set()
        for first in (0, T // 2, T):
            piece = candidates_of(model(features[:, first : first + T], text), options)
            for b, label, start, end, score in as_rows(piece):
                begins, ends = first + start, first + end
                if (start > 0 or first == 0) and (end < T or first == T):
                    expected.add((b, label, begins / 2, ends / 2, score))
    assert expected
    assert found == expected


def test_windows_stand_beside_what_the_whole_video_has() -> None:
    model, features = model_of(), random_features(2 * T)
    videos, text = [Video(str(b), "", 32.0, ()) for b in range(B)], describe_classes(model, NAMES)
    options = DetectionConfig(candidates=10**4, fineness=2)
    with torch.inference_mode():
        outputs, without = read_videos(model, videos, features, text, NAMES, options)
        _, both = read_videos(model, videos, features, text, NAMES, replace(options, windows=True))
        windows = read_windows(model, features, text, outputs, options)
    assert as_rows(both) == as_rows(without) | as_rows(windows)
    assert (both.scores.diff(dim=1) <= 0).all()


def as_rows(candidates) -> set[tuple]:
    rows = set()
    for b in range(B):
        parts = (candidates.labels[b], *candidates.segments[b].T, candidates.scores[b])
        rows |= {(b, *row) for row in zip(*(part.tolist() for part in parts), strict=True) if row[-1] > 0}
    return rows


# Configurations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["detection.windows=true"], "detection.fineness of 2 or more"),
        (["detection.windows=true", "detection.fineness=2", "model.masking.kind=gt"], "a mask that is predicted"),
        (["model.text.encoder=none", "loss.anchor=1"], "no starting text"),
        (["model.text.encoder=none", "model.text.start_share=0.5"], "no starting text"),
        (["detection.templates=['{}', 'no place']"], "'no place' has no {} for the class name"),
        (["loss.center=1.5"], "loss.center"),
        (["model.raw_similarity=-0.1"], "model.raw_similarity"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(StaleError, match=message):
        load_config((), settings)


def test_every_direction_is_a_configuration_of_its_own() -> None:
    base = REPOSITORY / "configs" / "thumos14_captions.yaml"
    rows = TABLES["directions"].rows
    made = [
        load_config([base, *(REPOSITORY / "configs" / name for name in row.overlays)], row.settings) for row in rows
    ]
    assert all(made.count(config) == 1 for config in made)
