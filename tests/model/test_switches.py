"""Every switch of the model and the losses changes what it claims to alone; so do the overlays made of them."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stale.api import infer
from stale.checkpoint import load_checkpoint
from stale.config import Config, DetectionConfig, load_config
from stale.data.dataset import load_features
from stale.data.selection import load_test_data, phrases
from stale.detection.decode import class_scores, classify_proposals
from stale.errors import StaleError
from stale.evaluation import read_results
from stale.io import read_json
from stale.model.stale import Outputs, Stale, build_model, load_text, restore_model
from stale.model.text import ClassEmbeddings
from stale.run_folder import RunFolder
from stale.training.losses import LossNormalizers, total_loss
from stale.training.targets import build_targets
from stale.training.trainer import build_optimizer, train
from tests.helpers import REPOSITORY, SEEN, UNSEEN, tiny_config, tiny_text_transformer

B, T, C, K = 3, 16, 64, 4
NAMES = ["diving", "high jump", "shot put", "golf swing"]
SEGMENTS = torch.tensor([[[1.0, 5.0], [8.0, 12.0]], [[2.0, 9.0], [6.0, 14.0]], [[3.0, 7.0], [0.0, 0.0]]])
LABELS = torch.tensor([[0, 3], [1, 2], [1, -2]])
TARGETS = build_targets(SEGMENTS, LABELS, K, T)
SMALL = ("model.localizer.hidden=8", "model.masking.queries=4", "model.masking.layers=1", "model.adaptation.alpha=0.5")
PARTS = ("visual", "foreground", "class_logits", "mask_logits")


def build(*assignments: str) -> tuple[Stale, Config]:
    """A small model; parts of the same size have the same weights, whatever the other parts are."""
    config = load_config((), [*SMALL, "model.masking.threshold=0.5", *assignments])
    torch.manual_seed(0)
    model = build_model(config.model, T, C, tiny_text_transformer(layers=1), seen=NAMES).eval()
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + parameter.numel())
        if (parameter.ndim > 1 or name.endswith("bias")) and "text.transformer" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    if hasattr(model.masking, "weigh"):  # L on both sides of its threshold
        model.masking.weigh.bias.data.fill_(-model.masking.weigh.weight.sum().item() / 2)
    model.background.data = torch.randn(C, generator=torch.Generator().manual_seed(5))
    return model, config


def outputs_of(model: Stale, mask: Tensor | None = None) -> Outputs:
    """What the model predicts for the same three videos."""
    features = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))
    return model(features, model.text(model.text.tokenize(NAMES)), mask)


@torch.no_grad()
def predict(*assignments: str, truth: bool = False) -> Outputs:
    return outputs_of(build(*assignments)[0], TARGETS.foreground.float() if truth else None)


def changed(*assignments: str, truth: bool = False) -> set[str]:
    """The parts of the outputs that differ from those of the default."""
    usual, other = predict(), predict(*assignments, truth=truth)

    def differ(part: str) -> bool:
        one, two = getattr(usual, part), getattr(other, part)
        return (one is None) != (two is None) or (one is not None and not torch.allclose(one, two, atol=1e-5))

    return {part for part in PARTS if differ(part)}


# The model's switches


@pytest.mark.parametrize(
    ("assignment", "moved"),
    [
        ("masking.queries=5", {"foreground", "class_logits"}),
        ("masking.kind=conv1d", {"foreground", "class_logits"}),
        ("masking.blocks=0", {"foreground", "class_logits"}),
        ("masking.kind=none", {"foreground", "class_logits"}),
        ("masking.applied=false", {"class_logits"}),
        ("masking.applied=false model.masking.crop=localizer", {"class_logits"}),
        ("masking.threshold=0.6", {"class_logits"}),
        ("masking.gradient=soft", {"class_logits"}),
        ("masking.gradient=straight_through", set()),
        ("text.prompt=template", {"class_logits"}),
        ("text.context_tokens=3", {"class_logits"}),
        ("text.encoder=frozen", set()),
        ("text.encoder=none", {"class_logits"}),
        ("adaptation.enabled=false", {"class_logits"}),
        ("adaptation.residual=false", {"class_logits"}),
        ("clamp=1e-4", {"class_logits"}),
        ("localizer.kind=plain", {"mask_logits"}),
        ("localizer.coordinates=pairwise", {"mask_logits"}),
        ("temperature=0.5", {"class_logits"}),
        ("visual_projection=true", set(PARTS)),
        ("temporal.kind=conv", set(PARTS)),
        ("temporal.kind=ms_tcn", set(PARTS)),
        ("temporal.kind=none", set(PARTS)),
    ],
)
def test_a_switch_changes_its_part_alone(assignment: str, moved: set[str]) -> None:
    assert changed(*f"model.{assignment}".split()) == moved


def test_ground_truth_masks_replace_the_learned_one() -> None:
    assert changed("model.masking.kind=gt", truth=True) == {"foreground", "class_logits"}
    outputs, truth = predict("model.masking.kind=gt", truth=True), TARGETS.foreground
    assert torch.equal(outputs.foreground, truth.float())
    assert (outputs.class_logits.transpose(1, 2)[~truth] == 0).all()
    assert (outputs.class_logits.transpose(1, 2)[truth] != 0).any()
    with pytest.raises(StaleError, match="kind=gt needs the ground truth"):
        predict("model.masking.kind=gt")
    with_another = predict("model.masking.kind=conv1d", truth=True)
    assert torch.equal(predict(truth=True).class_logits, with_another.class_logits), "whatever was learned"


@torch.no_grad()
def test_the_released_codes_features_are_cropped_clamped_and_compared_with_text_without_residual() -> None:
    released = ("masking.applied=false", "masking.crop=localizer", "clamp=0.1", "adaptation.residual=false")
    model, _ = build(*(f"model.{assignment}" for assignment in released))
    outputs = outputs_of(model)
    text = torch.cat([model.text(model.text.tokenize(NAMES)), model.background[None]])
    for b in range(B):
        visual, M = outputs.visual[b], outputs.mask_logits[b].sigmoid()
        share = [fmean(M[s].tolist()) for s in range(T)]
        kept = [float(value >= fmean(share)) for value in share]
        assert 0 < sum(kept) < T
        cropped = torch.stack([visual[s] * kept[s] for s in range(T)])
        empty = torch.tensor([kept]) == 0
        language = model.adaptation.decoder(
            F.normalize(text, dim=1)[None] * C**0.5, cropped[None], memory_key_padding_mask=empty
        )[0]
        classified = torch.where(cropped > 0.1, cropped, 0.1)
        logits = F.cosine_similarity(language[:, None], classified[None], dim=2) / 0.01
        torch.testing.assert_close(outputs.class_logits[b], logits, rtol=1e-4, atol=1e-3)
        video = F.cosine_similarity(language[:-1], classified.mean(0, keepdim=True), dim=1) / 0.01
        torch.testing.assert_close(outputs.video_logits[b], video, rtol=1e-4, atol=1e-3)


def test_one_label_keeps_the_class_of_highest_mean_logit() -> None:
    outputs = random_outputs()
    usual, kept = (
        class_scores(outputs, DetectionConfig(foreground_weight=False, one_label=one)) for one in (False, True)
    )
    for b in range(B):
        means = [fmean(outputs.class_logits[b, k].tolist()) for k in range(K)]
        for k in range(K):
            assert torch.equal(kept[b, k], usual[b, k] * (means[k] == max(means)))


def test_coupled_decay_is_a_gradient_of_all_weights_and_decoupled_decay_shrinks_matrices() -> None:
    """A step of a loss without gradient. Adam's first step is the learning rate in the direction of the gradient."""
    for coupled in (True, False):
        model, config = build("train.learning_rate=0.01", "train.weight_decay=0.5", f"train.coupled_decay={coupled}")
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, config.train)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name in ("masking.queries", "background"):
            moved = dict(model.named_parameters())[name] - before[name]
            decoupled = -0.01 * 0.5 * before[name] * (name != "background")
            expected = -0.01 * before[name].sign() if coupled else decoupled
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


# No text encoder


def test_without_a_text_encoder_seen_classes_have_embeddings_and_others_their_mean() -> None:
    encoder = ClassEmbeddings(ClassEmbeddings.names_of(NAMES), C)
    picked = encoder(encoder.tokenize([NAMES[2], NAMES[0]]))
    assert torch.equal(picked, encoder.embedding[[2, 0]])
    picked[0].sum().backward()
    assert encoder.embedding.grad.abs().sum(1).nonzero().flatten().tolist() == [2]
    unknown = encoder(encoder.tokenize(["baking a cake in the kitchen", "diving board", NAMES[1]]))
    torch.testing.assert_close(unknown[0], encoder.embedding.mean(0))
    assert torch.equal(unknown[0], unknown[1])
    torch.testing.assert_close(unknown[2], encoder.embedding[1])
    described = encoder.describe([[NAMES[1]], ["diving board"]])
    torch.testing.assert_close(described[0], F.normalize(encoder.embedding[1], dim=0))
    assert len(ClassEmbeddings(ClassEmbeddings.names_of(phrases(SEEN)), C).embedding) == len(SEEN)


def test_a_run_without_a_text_encoder_cannot_tell_unseen_classes_apart(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, "model.text.encoder=none", "train.epochs=1"), tmp_path / "run")
    assert not any("text.transformer" in name for name in load_checkpoint(run.checkpoint("best"))["model"])
    infer(run)
    results = read_json(run.detections("unseen"), "detections")["results"]
    for rows in results.values():
        by_label = [sorted(row["score"] for row in rows if row["label"] == label) for label in UNSEEN]
        top = [scores[-1] for scores in by_label if scores]
        assert top == pytest.approx([top[0]] * len(top), rel=1e-3)
    infer(run, vocabulary="seen")


# The losses' switches


def random_outputs() -> Outputs:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    visual, class_logits, mask_logits, foreground = random(B, T, C), random(B, K + 1, T), random(B, T, T), random(B, T)
    outputs = Outputs(visual, class_logits, mask_logits, foreground)
    more = {"classifier_features": random(B, T, C), "language": random(B, K + 1, C)}
    return replace(outputs, **more, temperature=0.1)


def test_pooled_classification_equals_its_definition() -> None:
    """Instances that do not overlap: each is the mean of its snippets, compared with every class, counted once."""
    outputs, targets, expected = random_outputs(), build_targets(SEGMENTS[:1], LABELS[:1], K, T), []
    first = Outputs(**{name: value[:1] if torch.is_tensor(value) else value for name, value in vars(outputs).items()})
    for (start, end), label in zip(SEGMENTS[0].int().tolist(), LABELS[0].tolist(), strict=True):
        pooled = F.normalize(outputs.classifier_features[0, start:end].mean(0), dim=0)
        logits = F.normalize(outputs.language[0, :-1], dim=1) @ pooled / 0.1
        expected.append(F.cross_entropy(logits[None], torch.tensor([label])).item())
    pooled_form = load_config((), ["loss.classification_form=pooled"]).loss
    loss = total_loss(first, targets, LossNormalizers.of(targets), pooled_form)[1]["classification"]
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("more", [[], ["official_code_50_50.yaml"]])
def test_the_released_codes_overlay_trains(data: Path, tmp_path: Path, more: list[str]) -> None:
    overlays = [REPOSITORY / "configs" / name for name in ("official_code.yaml", *more)]
    small = ["train.epochs=1", "data.num_snippets=16", "data.shrink=0.2", "data.splits=null", "data.drop_shorter=0.5"]
    config = load_config([data, *overlays], small)
    assert config.loss.localization * config.loss.bce == pytest.approx(0.4 if more else 0.12)
    assert config.loss.localization * config.loss.dice == pytest.approx(0.6 if more else 0.18)
    assert config.loss.classification == (0.1 if more else 0.4)
    run = train(config, tmp_path / "run")
    infer(run)
    protocol = read_json(run.detections("unseen"), "detections")["protocol"]
    assert "UNSEEN TEST CLASSES" in protocol["checkpoint_chosen_on"]


# The baselines of the zero-shot table: overlays of the same model, trained and tested by the same code

BASELINES = ("b1", "b2", "effprompt")


def overlay(name: str) -> Path:
    return REPOSITORY / "configs" / "baselines" / f"{name}.yaml"


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A short run of each baseline with its detections."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name in (*BASELINES, "agnostic"):
        config = load_config([data, overlay(name)], ["train.epochs=1", "detection.max_detections=200"])
        made[name] = train(config, folder / name)
        infer(made[name])
    return made


def build_baseline(name: str) -> tuple[Stale, Config, Outputs]:
    """A small model and what it makes of three videos."""
    torch.manual_seed(0)
    config = load_config([overlay(name)], ["model.localizer.hidden=8", "model.masking.layers=1"])
    model = build_model(config.model, T, C, tiny_text_transformer(layers=1)).eval()
    build_optimizer(model, config.train)  # freezes what has no learning rate
    for block in [*model.temporal, *(model.classifier if name == "effprompt" else [])]:
        torch.nn.init.normal_(block.attention.out_proj.weight, std=0.1)  # as training would; it starts as the identity
    features = torch.randn(B, T, C, requires_grad=True)
    return model, config, model(features, model.text(model.text.tokenize(NAMES)))


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
        quality = torch.full((len(features), 2), 0.5)
        found = classify_proposals(model(features, text), segments, quality, config.detection)
    for video in range(len(features)):
        rows = zip(*(values[video].tolist() for values in (found.segments, found.labels, found.scores)), strict=True)
        for (start, end), label, score in rows:
            snippets = F.normalize(features[video, int(start) : int(end)], dim=1)
            similar = F.normalize(text, dim=1) @ F.normalize(snippets.mean(0), dim=0)
            assert score == pytest.approx(0.5 * float((similar / 0.01).softmax(0)[label]), abs=1e-4)


def test_b2_is_one_stage_with_a_fixed_classifier() -> None:
    model, config, outputs = build_baseline("b2")
    assert outputs.foreground is None
    assert config.detection == DetectionConfig()
    text = F.normalize(model.text(model.text.tokenize(NAMES)), dim=1)
    expected = F.normalize(outputs.visual, dim=-1) @ text.T / 0.01
    torch.testing.assert_close(outputs.class_logits[:, :-1], expected.transpose(1, 2), atol=1e-3, rtol=1e-4)


PROPOSALS = ("localization", "foreground")


@pytest.mark.parametrize(
    ("name", "losses", "parts"),
    [
        ("b1", PROPOSALS, {"temporal", "masking", "localizer"}),
        ("b2", ("classification",), {"background", "temporal"}),
        ("effprompt", PROPOSALS, {"temporal", "masking", "localizer"}),
        ("effprompt", ("classification",), {"text.context", "classifier"}),
        ("agnostic", ("points",), {"points"}),
    ],
)
def test_the_losses_train_these_parts(name: str, losses: tuple[str, ...], parts: set[str]) -> None:
    model, config, outputs = build_baseline(name)
    points = config.model.points if name == "agnostic" else None
    targets = build_targets(SEGMENTS, LABELS, K, T, masks=points is None, points=points)
    _, computed = total_loss(outputs, targets, LossNormalizers.of(targets), config.loss)
    assert name not in ("b1", "agnostic") or set(computed) == set(losses)
    torch.stack([computed[loss] for loss in losses]).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    reached = {n for n, gradient in gradients.items() if name == "agnostic" or gradient.any()}
    assert {".".join(n.split(".")[:2]) if n.startswith("text") else n.split(".")[0] for n in reached} == parts


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
