"""Every switch of the paper and of the released code: it changes what it claims, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tiny import SEEN, SNIPPETS, UNSEEN, tiny_config, tiny_tower
from torch import Tensor
from torch.nn import functional as F

from eval import main as evaluate
from stale.build import build_model, load_training_data, phrases
from stale.checkpoint import load_checkpoint
from stale.config import Config, load_config
from stale.data.annotations import Instance, Video
from stale.data.dataset import load_features, reduce_instances, rescale
from stale.data.features import open_features
from stale.detection.decode import best_regions
from stale.detection.detector import read_videos
from stale.detection.explain import explain
from stale.detection.inference import infer
from stale.detection.soft_nms import soft_nms
from stale.errors import StaleError
from stale.files import read_json, write_json
from stale.model.stale import Outputs, Stale
from stale.model.text import ClassEmbeddings
from stale.run import RunFolder
from stale.training.losses import classification_loss, consistency_loss, focal_loss, pooled_classification_loss
from stale.training.targets import build_targets
from stale.training.trainer import build_criterion, train

B, T, C, K = 3, 16, 64, 4
NAMES = ["diving", "high jump", "shot put", "golf swing"]
SEGMENTS = torch.tensor([[[1.0, 5.0], [8.0, 12.0]], [[2.0, 9.0], [6.0, 14.0]], [[3.0, 7.0], [0.0, 0.0]]])
LABELS = torch.tensor([[0, 3], [1, 2], [1, -2]])
SMALL = ("model.localizer.hidden=8", "model.masking.queries=4", "model.masking.layers=1", "model.adaptation.alpha=0.5")
PARTS = ("visual", "foreground", "classes", "masks")


def build(*assignments: str) -> tuple[Stale, Config]:
    """A small model; parts of the same size have the same weights, whatever stands beside them."""
    config = load_config((), [*SMALL, *assignments])
    torch.manual_seed(0)
    model = build_model(config.model, T, C, tiny_tower(num_tokens=49408, layers=1), NAMES).eval()
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + parameter.numel())
        if (parameter.ndim > 1 or name.endswith("bias")) and "tower" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    if hasattr(model.masking, "weigh"):  # L on both sides of its threshold
        model.masking.weigh.bias.data.fill_(-model.masking.weigh.weight.sum().item() / 2)
    model.background.data = torch.randn(C, generator=torch.Generator().manual_seed(5))
    return model, config


def look(*assignments: str, truth: bool = False) -> dict[str, Tensor | None]:
    """What a model makes of the same three videos, by part."""
    model, _ = build(*assignments)
    features = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))
    mask = build_targets(SEGMENTS, LABELS, K, T).foreground.float() if truth else None
    with torch.no_grad():
        out = model(features, model.text(model.text.tokenize(NAMES)), mask)
    return {
        "visual": out.visual,
        "foreground": out.foreground,
        "classes": out.class_logits,
        "masks": out.mask_logits,
    }


def changed(*assignments: str, to: tuple[str, ...] = (), truth: bool = False) -> set[str]:
    """The parts that differ from those of the default, or of the settings ``to``."""
    usual, other = look(*to), look(*assignments, truth=truth)

    def differ(part: str) -> bool:
        one, two = usual[part], other[part]
        return (one is None) != (two is None) or (one is not None and not torch.allclose(one, two, atol=1e-5))

    return {part for part in PARTS if differ(part)}


# The model's switches: which of its outputs move


@pytest.mark.parametrize(
    ("assignments", "moved"),
    [
        ("model.masking.queries=5", {"foreground", "classes"}),
        ("model.masking.queries=100", {"foreground", "classes"}),
        ("model.masking.kind=conv1d", {"foreground", "classes"}),
        ("model.masking.kind=conv_stack", {"foreground", "classes"}),
        ("model.masking.kind=none", {"foreground", "classes"}),
        ("model.masking.applied=false", {"classes"}),
        ("model.masking.threshold=0.6", {"classes"}),
        ("model.masking.gradient=soft", {"classes"}),
        ("model.masking.gradient=straight_through", set()),
        ("model.text.prompt=template", {"classes"}),
        ("model.text.context_tokens=3", {"classes"}),
        ("model.text.encoder=frozen", set()),
        ("model.text.encoder=none", {"classes"}),
        ("model.adaptation.enabled=false", {"classes"}),
        ("model.localizer.kind=plain", {"masks"}),
        ("model.temporal.kind=conv", set(PARTS)),
        ("model.temporal.kind=none", set(PARTS)),
    ],
)
def test_a_switch_moves_its_part_alone(assignments: str, moved: set[str]) -> None:
    assert changed(assignments) == moved


def test_ground_truth_masks_stand_in_for_the_learned_one() -> None:
    assert changed("model.masking.kind=gt", truth=True) == {"foreground", "classes"}
    truth = build_targets(SEGMENTS, LABELS, K, T).foreground
    seen = look("model.masking.kind=gt", truth=True)
    assert torch.equal(seen["foreground"], truth.float())
    assert (seen["classes"].transpose(1, 2)[~truth] == 0).all()
    assert (seen["classes"].transpose(1, 2)[truth] != 0).any()
    with pytest.raises(StaleError, match="kind=gt needs the ground truth"):
        look("model.masking.kind=gt")


def test_ground_truth_masks_at_test_time_replace_any_learned_mask() -> None:
    assert changed(truth=True) == {"foreground", "classes"}
    assert torch.equal(look(truth=True)["classes"], look("model.masking.kind=conv1d", truth=True)["classes"])


def test_a_mask_not_applied_is_still_learned() -> None:
    model, config = build("model.masking.applied=false")
    outputs, targets = outputs_of(model), build_targets(SEGMENTS, LABELS, K, T)
    total, losses = build_criterion(config.loss)(outputs, targets)
    total.backward()
    assert "foreground" in losses
    assert model.masking.weigh.weight.grad.abs().sum() > 0
    assert torch.equal(look("model.masking.applied=false")["classes"], look("model.masking.kind=none")["classes"])


# No text encoder


def test_without_a_text_encoder_each_seen_class_has_its_embedding() -> None:
    encoder = ClassEmbeddings(ClassEmbeddings.names_of(NAMES), C)
    picked = encoder(encoder.tokenize([NAMES[2], NAMES[0]]))
    assert torch.equal(picked, encoder.embedding[[2, 0]])
    picked[0].sum().backward()
    assert encoder.embedding.grad.abs().sum(1).nonzero().flatten().tolist() == [2]


def test_without_a_text_encoder_unseen_names_are_all_alike() -> None:
    encoder = ClassEmbeddings(ClassEmbeddings.names_of(NAMES), C)
    unknown = encoder(encoder.tokenize(["baking a cake in the kitchen", "diving board", NAMES[1]]))
    torch.testing.assert_close(unknown[0], encoder.embedding.mean(0))
    assert torch.equal(unknown[0], unknown[1])
    torch.testing.assert_close(unknown[2], encoder.embedding[1])
    described = encoder.describe([[NAMES[1]], ["diving board"]])
    torch.testing.assert_close(described[0], F.normalize(encoder.embedding[1], dim=0))


def test_a_run_without_a_text_encoder_cannot_tell_unseen_classes(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, "model.text.encoder=none", "train.epochs=1"), tmp_path / "run")
    assert not any("tower" in name for name in load_checkpoint(run.checkpoint("best"))["model"])
    infer(run)
    results = read_json(run.detections("unseen"), "detections")["results"]
    for rows in results.values():
        by_label = [sorted(row["score"] for row in rows if row["label"] == label) for label in UNSEEN]
        top = [scores[-1] for scores in by_label if scores]
        assert top == pytest.approx([top[0]] * len(top), rel=1e-3)
    infer(run, vocabulary="seen")


# The losses' switches


def outputs_of(model: Stale, mask: Tensor | None = None) -> Outputs:
    features = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))
    return model(features, model.text(model.text.tokenize(NAMES)), mask)


def random_outputs() -> Outputs:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return Outputs(
        random(B, T, C),
        random(B, K + 1, T),
        random(B, T, T),
        random(B, T),
        evidence=random(B, T, C),
        language=random(B, K + 1, C),
        temperature=0.1,
    )


@pytest.mark.parametrize("name", ["classification", "localization", "foreground", "consistency"])
def test_a_weight_scales_its_loss_alone(name: str) -> None:
    outputs, targets = random_outputs(), build_targets(SEGMENTS, LABELS, K, T)
    usual, losses = build_criterion(load_config().loss)(outputs, targets)
    heavier, same = build_criterion(load_config((), [f"loss.{name}=3"]).loss)(outputs, targets)
    assert {key: value.item() for key, value in losses.items()} == {key: value.item() for key, value in same.items()}
    assert heavier.item() == pytest.approx(usual.item() + 2 * losses[name].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("assignment", "moved"),
    [
        ("loss.classification_form=focal", {"classification"}),
        ("loss.classification_form=pooled", {"classification"}),
        ("loss.foreground_form=bce", {"foreground"}),
        ("loss.dice=0", {"localization"}),
        ("loss.consistency_gradient=visual", set()),
    ],
)
def test_a_form_changes_its_loss_alone(assignment: str, moved: set[str]) -> None:
    outputs, targets = random_outputs(), build_targets(SEGMENTS, LABELS, K, T)
    _, usual = build_criterion(load_config().loss)(outputs, targets)
    _, other = build_criterion(load_config((), [assignment]).loss)(outputs, targets)
    assert {name for name in usual if usual[name].item() != other[name].item()} == moved


def test_the_released_consistency_reaches_the_features_alone() -> None:
    outputs, targets = random_outputs(), build_targets(SEGMENTS, LABELS, K, T)
    consistency_loss(outputs, targets, 5, 0.2, "visual").backward()
    assert outputs.visual.grad.abs().sum() > 0
    assert outputs.class_logits.grad is None
    assert outputs.mask_logits.grad is None


def test_focal_loss_equals_its_definition() -> None:
    outputs, targets = random_outputs(), build_targets(SEGMENTS, LABELS, K, T)
    total = 0.0
    p = outputs.class_logits.detach().softmax(1)
    for b in range(B):
        for t in range(T):
            for k in range(K + 1):
                q = float(p[b, k, t])
                total -= float(targets.classes[b, k, t]) * (1 - q) ** 2 * float(np.log(q))
    assert focal_loss(outputs.class_logits, targets).item() == pytest.approx(total / (B * T), rel=1e-4)
    assert focal_loss(outputs.class_logits, targets) < classification_loss(outputs.class_logits, targets)


def test_pooled_classification_equals_its_definition() -> None:
    """Instances that do not overlap: each is the mean of its snippets, compared with every class, counted once."""
    segments, labels = SEGMENTS[:1], LABELS[:1]
    outputs, targets = random_outputs(), build_targets(segments, labels, K, T)
    one = replace(outputs, evidence=outputs.evidence[:1], language=outputs.language[:1])
    losses = []
    for (start, end), label in zip(segments[0].int().tolist(), labels[0].tolist(), strict=True):
        pooled = F.normalize(one.evidence[0, start:end].mean(0), dim=0)
        logits = F.normalize(one.language[0, :-1], dim=1) @ pooled / 0.1
        losses.append(F.cross_entropy(logits[None], torch.tensor([label])).item())
    assert pooled_classification_loss(one, targets).item() == pytest.approx(np.mean(losses), rel=1e-4)


# The training data's switches


@pytest.mark.parametrize(
    ("last", "shrink", "shorter", "left"),
    [
        (False, 0, 0, [(0, 3), (4, 5), (6, 12)]),
        (True, 0, 0, [(6, 12)]),
        (False, 1, 0, [(1, 2), (7, 11)]),
        (False, 0, 2, [(0, 3), (6, 12)]),
        (False, 1, 2, [(7, 11)]),
    ],
)
def test_the_released_codes_instances(last: bool, shrink: float, shorter: float, left: list) -> None:
    spans = [(0, 3), (4, 5), (6, 12)]
    stranger = Instance(13.0, 14.0, "unseen")
    video = Video("v", "training", 16.0, (*(Instance(a, b, "seen") for a, b in spans), stranger))
    (reduced,) = reduce_instances([video], ["seen"], 16, last, shrink, shorter)
    assert [(item.start, item.end) for item in reduced.instances[:-1]] == left
    assert reduced.instances[-1] == stranger, "what must be ignored stays so"


def test_videos_without_an_instance_left_are_not_trained_on(data: Path) -> None:
    usual = load_training_data(tiny_config(data))
    last = load_training_data(tiny_config(data, "data.instances=last"))
    count = (usual.train.labels >= 0).sum(), (last.train.labels >= 0).sum()
    assert count[0] > count[1] == len(last.train)
    assert torch.equal(usual.held_out.labels, last.held_out.labels), "what chooses the checkpoint is not reduced"
    with pytest.raises(StaleError, match="no instance is left"):
        load_training_data(tiny_config(data, f"data.drop_shorter={SNIPPETS + 1}"))


def test_features_stand_side_by_side(data: Path, tmp_path: Path) -> None:
    wide, ids = 24, list(h5py.File(data.parent / "features.h5"))
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        for name in ids:
            file[name] = rng.standard_normal((11, wide)).astype(np.float32)  # at a rate of its own
    both = [str(data.parent / "features.h5"), str(tmp_path / "other.h5")]
    store = open_features(both)
    assert store.width == C + wide
    block = load_features(ids[:2], store, T)
    for row, name in enumerate(ids[:2]):
        parts = [rescale(torch.from_numpy(open_features(path).read(name)), T) for path in both]
        torch.testing.assert_close(block[row], torch.cat(parts, 1))
    setting = f"data.features=[{', '.join(both)}]"
    with pytest.raises(StaleError, match="88 wide.*visual_projection"):
        train(tiny_config(data, setting), tmp_path / "refused")
    run = train(tiny_config(data, setting, "model.visual_projection=true", "train.epochs=1"), tmp_path / "run")
    assert run.load_config().data.features == both
    infer(run)
    assert read_json(run.detections("unseen"), "detections")["protocol"]["features"] == " + ".join(both)


def test_a_video_that_one_source_lacks_is_missing(data: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["video_000"] = np.zeros((3, 2), np.float32)
    store = open_features([str(data.parent / "features.h5"), str(tmp_path / "other.h5")])
    assert store.find("video_000")
    assert store.find("video_001") is None
    with pytest.raises(StaleError, match="snippets stand side by side"):
        store.read("video_000")


# The switches of detection


def test_filled_holes_merge_instances() -> None:
    curve = torch.tensor([[[0.0, 0.9, 0.1, 0.1, 0.8, 0.0]]])
    ones = torch.ones(1, 1)
    apart = best_regions(curve, ones, ones.long(), [0.5], 10)
    merged = best_regions(curve, ones, ones.long(), [0.5], 10, fill_holes=True)
    assert apart.segments[0].tolist() == [[1, 2], [4, 5]]
    assert merged.segments[0].tolist() == [[1, 5]]
    assert merged.scores[0].tolist() == pytest.approx([0.9])


def test_the_released_soft_nms_raises_what_overlaps_slightly() -> None:
    segments = torch.tensor([[[0.0, 10.0], [9.0, 19.0], [0.0, 9.0], [30.0, 40.0]]])
    scores, labels = torch.tensor([[0.9, 0.5, 0.4, 0.3]]), torch.zeros(1, 4, dtype=torch.long)
    picked, lowered = soft_nms(segments, scores, labels, 0.5, 4, "official")
    result = dict(zip(picked[0].tolist(), lowered[0].tolist(), strict=True))
    assert result[1] == pytest.approx(0.5 * np.exp(-10 * (1 / 19) ** 2) / 0.6)
    assert result[1] > 0.5
    assert result[2] == pytest.approx(0.4 * np.exp(-10 * 0.9**2) / 0.6, rel=1e-3)
    assert result[3] == pytest.approx(0.3), "no overlap, no change"
    _, proper = soft_nms(segments, scores, labels, 0.5, 4)
    assert (proper <= scores.sort(descending=True).values + 1e-6).all()


@pytest.mark.parametrize(
    ("oracle", "words"), [("masks", "GROUND-TRUTH MASKS at test time"), ("proposals", "GROUND-TRUTH SEGMENTS")]
)
def test_an_oracle_is_named_and_leaves_the_runs_detections(run: RunFolder, oracle: str, words: str) -> None:
    before = run.detections("unseen").read_bytes()
    infer(run, oracle=oracle)
    assert run.detections("unseen").read_bytes() == before
    content = read_json(run.detections("unseen", oracle), "detections")
    assert words in content["protocol"]["oracle"]
    assert json.loads(before)["protocol"]["oracle"] == "none"
    assert content["results"] != json.loads(before)["results"]


def test_an_oracles_segments_are_the_ground_truth(data: Path, run: RunFolder) -> None:
    infer(run, oracle="proposals")
    content = read_json(run.detections("unseen", "proposals"), "detections")
    database = read_json(data.parent / "annotations.json", "annotations")["database"]
    for video, rows in content["results"].items():
        truth = [item["segment"] for item in database[video]["annotations"] if item["label"] in UNSEEN]
        assert rows
        for row in rows:
            assert any(row["segment"] == pytest.approx(segment, abs=2e-3) for segment in truth)


def test_ground_truth_is_read_by_an_oracle_alone() -> None:
    """Detection is handed annotated videos; without an oracle their instances must make no difference."""
    features = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))
    labelled = [Video(str(n), "test", 16.0, (Instance(1.0, 5.0, NAMES[0]),)) for n in range(B)]
    bare = [replace(video, instances=()) for video in labelled]

    def scores(videos: list[Video], *assignments: str) -> Tensor:
        model, config = build(*assignments)
        with torch.inference_mode():
            text = model.text(model.text.tokenize(NAMES))
            return read_videos(model, videos, features, text, NAMES, config.detection)[1].scores

    assert torch.equal(scores(labelled), scores(bare))
    for oracle in ("detection.oracle=masks", "detection.oracle=proposals", "model.masking.kind=gt"):
        assert scores(labelled, oracle).sum() > 0
        with pytest.raises(StaleError, match="no ground truth.* in 0, 1, 2"):
            scores(bare, oracle)


# Ground-truth masks, and the choice of the checkpoint, end to end


def test_a_run_with_ground_truth_masks_says_so(data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, "model.masking.kind=gt", "train.epochs=1"), tmp_path / "run")
    assert "foreground" not in json.loads(run.history.read_text().splitlines()[0])
    infer(run)
    assert "GROUND-TRUTH MASKS in training" in read_json(run.detections("unseen"), "detections")["protocol"]["oracle"]
    assert explain(run, "video_000", "seen").foreground.max() == 1


def test_the_released_choice_of_a_checkpoint_is_told_aloud(data: Path, run: RunFolder, tmp_path: Path) -> None:
    released = train(tiny_config(data, "train.choose_on=unseen_loss", "train.epochs=2"), tmp_path / "run")
    best = load_checkpoint(released.checkpoint("best"))["best"]
    assert set(best) == {"epoch", "mAP", "unseen_loss"}
    infer(released)
    chosen = read_json(released.detections("unseen"), "detections")["protocol"]["checkpoint_chosen_on"]
    assert chosen.startswith("LOSS ON THE UNSEEN TEST CLASSES")
    assert "no zero-shot" in released.log.read_text(encoding="utf-8")
    first = [json.loads(path.history.read_text().splitlines()[0])["total"] for path in (run, released)]
    assert first[0] == first[1], "the training itself is the same"


def test_ground_truth_of_predicted_videos_alone_is_told_aloud(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_json(run.detections("unseen"), "detections")
    empty = next(iter(content["results"]))
    content["results"][empty] = []
    write_json(tmp_path / "some.json", content)
    counts = []
    for counted in ("all", "predicted-videos"):
        line = ["--predictions", str(tmp_path / "some.json"), "--annotations", content["protocol"]["annotations"]]
        evaluate([*line, "--ground-truth", counted, "--json", str(tmp_path / "metrics.json")])
        counts.append(read_json(tmp_path / "metrics.json", "metrics")["num_videos"])
    assert counts[1] == counts[0] - 1
    every, some = capsys.readouterr().out.split("protocol: ")[1::3]
    assert "ground truth" not in every
    assert f"ground truth ONLY IN VIDEOS WITH PREDICTIONS ({counts[1]} of {counts[0]})" in some


# Combinations


def assert_refused(message: str, *assignments: str) -> None:
    with pytest.raises(StaleError, match=message):
        load_config((), assignments)


def test_switches_that_cannot_go_together_are_refused() -> None:
    assert_refused("ranks proposals by the foreground", "detection.name_by=proposals", "model.masking.kind=none")
    assert_refused("names without F_fg", "model.classifier_features=raw")
    off = ("model.adaptation.enabled=false", "model.masking.applied=false", "model.visual_projection=true")
    assert_refused("a learned projection cannot", "model.classifier_features=raw", *off)
    assert_refused("has no prompt", "model.text.encoder=none", "model.text.context_init=a video")


@pytest.mark.parametrize("more", [[], ["official_code_50_50.yaml"]])
def test_the_released_codes_overlay_trains(data: Path, tmp_path: Path, more: list[str]) -> None:
    overlays = [REPOSITORY / "configs" / name for name in ("official_code.yaml", *more)]
    small = ["train.epochs=1", "data.num_snippets=16", "data.shrink=0.2", "data.splits=null", "data.drop_shorter=0.5"]
    config = load_config([data, *overlays], small)
    assert config.loss.classification == (0.1 if more else 0.4)
    run = train(config, tmp_path / "run")
    infer(run)
    protocol = read_json(run.detections("unseen"), "detections")["protocol"]
    assert "UNSEEN TEST CLASSES" in protocol["checkpoint_chosen_on"]


def test_phrases_of_the_seen_classes_reach_the_model(data: Path) -> None:
    names = ClassEmbeddings.names_of(phrases(SEEN))
    model: Callable = ClassEmbeddings(names, C)
    assert len(model.embedding) == len(SEEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("overlay", ["official_code", "baselines/b1", "baselines/b2", "baselines/effprompt", None])
def test_the_switches_run_on_a_gpu(data: Path, tmp_path: Path, overlay: str | None) -> None:
    files = [data, *([REPOSITORY / "configs" / f"{overlay}.yaml"] if overlay else [])]
    small = ["train.epochs=1", "train.device=cuda", "data.num_snippets=16", "data.shrink=0", "data.drop_shorter=0"]
    gt = [] if overlay else ["model.masking.kind=gt", "model.text.encoder=none"]
    run = train(load_config(files, [*small, *gt]), tmp_path / "run")
    for oracle in (None, "masks", "proposals"):
        infer(run, oracle=oracle)
        assert read_json(run.detections("unseen", oracle), "detections")["results"]
