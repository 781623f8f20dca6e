"""The baselines of the zero-shot table: overlays of the same model, trained and tested by the same code."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from stale.api import infer
from stale.checkpoint import load_checkpoint
from stale.config import Config, DetectionConfig, load_config
from stale.data.dataset import load_features
from stale.data.selection import load_test_data, phrases
from stale.detection.decode import classify_proposals
from stale.evaluation import read_results
from stale.io import read_json
from stale.model.stale import Outputs, Stale, build_model, load_text, restore_model
from stale.run_folder import RunFolder
from stale.training.losses import Criterion
from stale.training.targets import build_targets
from stale.training.trainer import build_optimizer, train
from tests.helpers import REPOSITORY, UNSEEN, tiny_text_transformer

BASELINES = ("b1", "b2", "effprompt")
B, T, C, K = 3, 16, 64, 4
NAMES = ["diving", "high jump", "shot put", "golf swing"]
SEGMENTS = torch.tensor([[[1.0, 5.0], [8.0, 12.0]], [[2.0, 9.0], [6.0, 14.0]], [[3.0, 7.0], [0.0, 0.0]]])
LABELS = torch.tensor([[0, 3], [1, 2], [1, -2]])


def overlay(name: str) -> Path:
    return REPOSITORY / "configs" / "baselines" / f"{name}.yaml"


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A short run of each baseline with its detections."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name in (*BASELINES, "agnostic"):
        made[name] = train(
            load_config([data, overlay(name)], ["train.epochs=1", "detection.max_detections=200"]), folder / name
        )
        infer(made[name])
    return made


def build(name: str) -> tuple[Stale, Config, Outputs]:
    """A small model and what it makes of three videos."""
    torch.manual_seed(0)
    config = load_config([overlay(name)], ["model.localizer.hidden=8", "model.masking.layers=1"])
    model = build_model(config.model, T, C, tiny_text_transformer(layers=1)).eval()
    build_optimizer(model, config.train)  # freezes what has no learning rate
    for block in [*model.temporal, *(model.classifier if name == "effprompt" else [])]:
        torch.nn.init.normal_(block.attention.out_proj.weight, std=0.1)  # as training would; it starts as the identity
    features = torch.randn(B, T, C, requires_grad=True)
    return model, config, model(features, model.text(model.text.tokenize(NAMES)))


def trained_by(name: str, *losses: str) -> set[str]:
    """The parts of the model that the losses reach, of which b1 has no other."""
    model, config, outputs = build(name)
    _, computed = Criterion(config.loss)(outputs, build_targets(SEGMENTS, LABELS, K, T))
    assert name != "b1" or set(computed) == set(losses)
    torch.stack([computed[loss] for loss in losses]).sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {".".join(n.split(".")[:2]) if n.startswith("text") else n.split(".")[0] for n in reached}


@pytest.mark.parametrize("name", [*BASELINES, "agnostic"])
def test_a_baseline_is_trained_and_tested_like_the_model(runs: dict[str, RunFolder], name: str) -> None:
    results = read_json(runs[name].detections("unseen"), "detections")
    assert len(read_results(runs[name].detections("unseen"))) > len(results["results"])
    assert {row["label"] for rows in results["results"].values() for row in rows} <= set(UNSEEN)
    assert results["protocol"]["oracle"] == "none"
    infer(runs[name], "last", "all")
    config, trained = runs[name].load_config(), load_checkpoint(runs[name].checkpoint("last"))["model"]
    for key, tensor in load_text(config.model).state_dict().items():
        assert torch.equal(trained[f"text.transformer.{key}"], tensor), "the text transformer stays CLIP's"


# B-I


def test_b1_classifies_a_proposal_by_the_features_pooled_over_it(data: Path, runs: dict[str, RunFolder]) -> None:
    """Against the features as extracted, CLIP's own text transformer and the template, one proposal at a time."""
    config = runs["b1"].load_config()
    test = load_test_data(config, "unseen")
    features = load_features([video.id for video in test.videos], test.store, T).float()
    model = restore_model(config, load_checkpoint(runs["b1"].checkpoint("best"))).eval()
    segments = torch.tensor([[[2.0, 7.0], [10.0, 11.0]]]).expand(len(features), -1, -1)
    prompts = model.text.tokenize(phrases(test.classes))
    with torch.no_grad():
        text = model.text(prompts)
        found = classify_proposals(
            model(features, text), segments, torch.full((len(features), 2), 0.5), config.detection
        )
    for video in range(len(features)):
        for segment, label, score in zip(
            found.segments[video].int().tolist(), found.labels[video].tolist(), found.scores[video], strict=True
        ):
            snippets = F.normalize(features[video, segment[0] : segment[1]], dim=1)
            similar = F.normalize(text, dim=1) @ F.normalize(snippets.mean(0), dim=0)
            assert float(score) == pytest.approx(0.5 * float((similar / 0.01).softmax(0)[label]), abs=1e-4)


# B-II


def test_b2_is_one_stage_with_a_fixed_classifier() -> None:
    model, config, outputs = build("b2")
    assert outputs.foreground is None
    assert config.detection == DetectionConfig()
    assert trained_by("b2", "classification") == {"background", "temporal"}
    text = F.normalize(model.text(model.text.tokenize(NAMES)), dim=1)
    expected = F.normalize(outputs.visual, dim=-1) @ text.T / 0.01
    torch.testing.assert_close(outputs.class_logits[:, :-1], expected.transpose(1, 2), atol=1e-3, rtol=1e-4)


# EffPrompt


def test_effprompt_learns_prompts_and_context_of_its_own() -> None:
    assert trained_by("effprompt", "classification") == {"text.context", "classifier"}
    model, config, outputs = build("effprompt")
    assert len(model.classifier) == len(model.temporal) == 2
    assert model.text.context is not None
    assert not torch.allclose(outputs.classifier_features, outputs.visual)


@pytest.mark.parametrize("name", ["b1", "effprompt"])
def test_the_proposal_stage_is_trained_by_its_own_losses(name: str) -> None:
    assert trained_by(name, "localization", "foreground") == {"temporal", "masking", "localizer"}


# Class-agnostic point head, named by the video


def test_agnostic_trains_the_point_head_alone(runs: dict[str, RunFolder]) -> None:
    config, state = runs["agnostic"].load_config(), load_checkpoint(runs["agnostic"].checkpoint("last"))
    model = restore_model(config, state)
    outputs = model(torch.randn(B, T, C), model.text(model.text.tokenize(NAMES)))
    targets = build_targets(SEGMENTS, LABELS, K, T, masks=False, points=config.model.points)
    total, computed = Criterion(config.loss)(outputs, targets)
    assert set(computed) == {"points"}
    total.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"points"}


def test_agnostic_names_every_segment_by_the_video(data: Path, runs: dict[str, RunFolder]) -> None:
    """A video's classes have the same segments, and the scores of their best stand as the video-level scores do."""
    config = runs["agnostic"].load_config()
    test = load_test_data(config, "unseen")
    model = restore_model(config, load_checkpoint(runs["agnostic"].checkpoint("best"))).eval()
    results = read_json(runs["agnostic"].detections("unseen"), "detections")["results"]
    with torch.no_grad():
        text = model.text(model.text.tokenize(phrases(test.classes)))
    for video in test.videos:
        snippets = F.normalize(torch.from_numpy(test.store.read(video.id)).float(), dim=1)
        similar = F.normalize(snippets.mean(0), dim=0) @ F.normalize(text, dim=1).T
        best = [max(row["score"] for row in results[video.id] if row["label"] == label) for label in test.classes]
        expected = (similar / config.detection.video_temperature).softmax(0)
        assert best[0] / best[1] == pytest.approx(float(expected[0] / expected[1]), rel=1e-3)
        assert all(0 <= row["segment"][0] < row["segment"][1] <= video.duration + 1e-3 for row in results[video.id])
