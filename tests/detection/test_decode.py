"""Decoding against loops: masks, foreground and video-level scores to proposals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stale.api import load
from stale.config import DetectionConfig, load_config
from stale.data.annotations import Video
from stale.detection.decode import Proposals, class_scores, decode, threshold_masks
from stale.detection.run import class_features, propose
from stale.errors import StaleError
from stale.model.stale import Outputs, Stale, build_model
from stale.training.trainer import train
from tests.helpers import tiny_config, tiny_text_transformer
from tests.reference.detection import plain_decode, plain_regions

Found = dict[tuple[int, float, float], float]  # (label, start, end) → score
EVERY = 10_000


def as_found(proposals: Proposals, video: int) -> Found:
    """The proposals of one video."""
    rows = zip(*(getattr(proposals, name)[video].tolist() for name in ("labels", "segments", "scores")), strict=True)
    return {(label, *segment): score for label, segment, score in rows if score > 0}


# Masks


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    K=st.integers(1, 4),
    T=st.integers(2, 14),
    top=st.integers(1, 70),
    limit=st.integers(1, 12),
    thresholds=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.55, 0.8, 0.99]), min_size=1, max_size=5, unique=True),
    min_length=st.sampled_from([0.0, 0.2, 0.5]),
    levels=st.sampled_from([2, 5, 1000]),
    proposal_score=st.sampled_from(["max", "contrast"]),
    fill_holes=st.booleans(),
)
def test_decoding_equals_loops(
    seed: int, K: int, T: int, top: int, limit: int, thresholds: list[float], levels: int, **switches: object
) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = 3
    class_logits = torch.rand(B, K + 1, T, generator=generator)
    mask_logits = ((torch.rand(B, T, T, generator=generator) * levels).floor() / levels - 0.5) * 8  # long regions, ties
    outputs = Outputs(torch.zeros(1), class_logits, mask_logits, None)
    options = DetectionConfig(top_snippets=top, thresholds=thresholds, **switches)
    proposals, few = (decode(outputs, options.model_copy(update={"max_proposals": n})) for n in (EVERY, limit))
    assert torch.equal(few.scores, proposals.scores[:, :limit])
    assert (few.scores.diff(dim=1) <= 0).all()
    rounding = 1e-6 if switches["proposal_score"] == "contrast" else 0.0  # of a difference, which can be 0
    scores, masks = class_logits.softmax(1)[:, :-1].numpy(), mask_logits.sigmoid().numpy()  # without the background
    for b in range(B):
        plain = plain_decode(scores[b], masks[b], top, thresholds, **switches)
        expected = {tuple(row[:3]): row.score for row in plain if row.score > rounding}
        found = {key: score for key, score in as_found(proposals, b).items() if score > rounding}
        assert len(found) == (proposals.scores[b] > rounding).sum(), "equal segments of a class are one proposal"
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5, abs=rounding or None)
        assert as_found(few, b).items() <= as_found(proposals, b).items()


def test_a_video_without_proposals_beside_one_with() -> None:
    masks = torch.stack([torch.full((4, 4), 0.05), torch.full((4, 4), 0.9)])
    proposals = threshold_masks(torch.full((2, 1, 4), 0.5), masks, DetectionConfig())
    assert as_found(proposals, 0) == {}
    assert as_found(proposals, 1) == pytest.approx({(0, 0.0, 4.0): 0.45})
    nothing = threshold_masks(torch.rand(2, 3, 8), torch.full((2, 8, 8), 0.05), DetectionConfig())
    assert (nothing.scores == 0).all()
    assert nothing.segments.shape == (2, 1, 2)


@pytest.mark.parametrize("weighted", [True, False])
def test_foreground_weight_multiplies_class_scores_by_the_foreground(weighted: bool) -> None:
    logits, foreground = torch.randn(1, 3, 4), torch.tensor([[-9.0, 2.0, 2.0, -9.0]])
    outputs = Outputs(torch.zeros(1), logits, torch.zeros(1, 4, 4), foreground)
    expected = logits.softmax(1)[:, :2] * (foreground.sigmoid() if weighted else 1)
    torch.testing.assert_close(class_scores(outputs, DetectionConfig(foreground_weight=weighted)), expected)


def test_with_several_labels_the_background_is_the_threshold_of_each_class() -> None:
    logits = torch.tensor([[[8.0, 3.0, 0.0], [5.0, 1.0, 0.0], [6.0, 0.0, 0.0]]])  # two classes, background; 3 snippets
    outputs = Outputs(torch.zeros(1), logits, torch.zeros(1, 3, 3), None, mask=torch.tensor([[1.0, 1.0, 0.0]]))
    expected = torch.tensor([[[2.0, 3.0], [-1.0, 1.0]]]).sigmoid()
    found = class_scores(replace(outputs, multi_label=True), DetectionConfig())
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(1, 2, 1)], 2))  # a masked-out snippet has none
    absent = logits.masked_fill(torch.tensor([False, True, False]).view(1, -1, 1), -torch.inf)
    found = class_scores(replace(outputs, multi_label=True, class_logits=absent), DetectionConfig())
    torch.testing.assert_close(found[0, :, 0], torch.stack([expected[0, 0, 0], torch.tensor(0.0)]))


def test_a_trained_run_keeps_the_sigmoid_form(data: Path, tmp_path: Path) -> None:
    """The probabilities of a snippet's classes can sum to more than 1."""
    sigmoid = ["loss.classification_form=sigmoid", "detection.foreground_weight=false", "model.masking.applied=false"]
    run = train(tiny_config(data, "train.epochs=1", *sigmoid), tmp_path / "run")
    found = load(run.path).detect_annotated("video_000", "all")
    assert found.class_scores.sum(0).max() > 1
    with pytest.raises(StaleError, match=r"sigmoid has no term of the video; set loss\.classification_video=0"):
        tiny_config(data, *sigmoid, "loss.classification_video=1")


# Other sources of proposals

B, T, C = 2, 16, 64
NAMES = ["diving", "high jump", "shot put"]
K = len(NAMES)
VIDEOS = [Video(f"video {b}", "", 32.0, ()) for b in range(B)]


@pytest.fixture(scope="module")
def model() -> Stale:
    torch.manual_seed(0)
    config = load_config([], ["model.temporal.kind=none", "model.points.enabled=true"]).model
    return build_model(config, T, C, tiny_text_transformer(num_tokens=49408, layers=1), NAMES).eval()


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def proposals_of(model: Stale, features: Tensor, **changes: object) -> Proposals:
    options = DetectionConfig(**{"top_snippets": K * T, "max_proposals": EVERY, **changes})
    return propose(model, VIDEOS, features, class_features(model, NAMES), options=options)[1]


def as_scores(proposals: Proposals) -> dict[tuple, float]:
    """(video, label, start, end) → score."""
    return {(b, *key): score for b in range(B) for key, score in as_found(proposals, b).items()}


def video_level(model: Stale, features: Tensor, temperature: float) -> Tensor:
    """The video-level scores (B, K), by loops: before the temporal model and the adaptation."""
    text = class_features(model, NAMES).text
    means = [sum(x / x.norm() for x in video) / T for video in features]
    return torch.stack([(F.cosine_similarity(mean, text) / temperature).softmax(0) for mean in means])


def test_video_scores_weigh_the_classes_of_a_video(model: Stale, features: Tensor) -> None:
    plain = as_scores(proposals_of(model, features))
    weighted = as_scores(proposals_of(model, features, video_score=True, video_temperature=0.05))
    of_video = video_level(model, features, 0.05)
    assert weighted == pytest.approx({key: plain[key] * float(of_video[key[:2]]) for key in plain}, rel=1e-3)


def test_proposals_from_the_foreground_by_loops(model: Stale, features: Tensor) -> None:
    found = as_scores(proposals_of(model, features, proposals="foreground", video_score=True, video_temperature=0.05))
    with torch.no_grad():
        outputs = model(features, class_features(model, NAMES).text)
    P, L = class_scores(outputs, DetectionConfig()), outputs.foreground
    of_video, expected = video_level(model, features, 0.05), {}
    for b in range(B):
        curve = (L[b] / L[b].max()).tolist()
        for threshold in torch.tensor(DetectionConfig().thresholds).tolist():
            for start, end in plain_regions(curve, threshold):
                for k in range(K):
                    inside = sum(float(P[b, k, t]) for t in range(start, end)) / (end - start)
                    key, score = (b, k, start, end), float(of_video[b, k]) * inside * max(curve[start:end])
                    expected[key] = max(expected.get(key, 0.0), score)
    assert found == pytest.approx(expected, rel=1e-3)
    assert any(end - start == T for _, _, start, end in found)  # a proposal may be the whole video


def test_both_sources_of_proposals_are_concatenated(model: Stale, features: Tensor) -> None:
    masks, foreground, both = (
        proposals_of(model, features, proposals=name) for name in ("masks", "foreground", ["masks", "foreground"])
    )
    assert sorted(both.scores[0].tolist()) == sorted(masks.scores[0].tolist() + foreground.scores[0].tolist())
    assert both.num_snippets == T


@torch.no_grad()
def test_calibrated_classes_by_loops(model: Stale, features: Tensor) -> None:
    """The similarities with the video and inside the proposal, by the fitted weights, of any kind of proposal."""
    model.class_weights.copy_(torch.tensor([20.0, 50.0]))
    text = class_features(model, NAMES).text
    outputs = model(features, text)
    segments, quality = outputs.points.segments().clamp(0, T), outputs.points.scores()
    mean = F.normalize(features, dim=-1).mean(1)
    expected = {}
    for b in range(B):
        for segment, score in zip(segments[b], quality[b], strict=True):
            inside = [t for t in range(T) if segment[0] <= t + 0.5 < segment[1]]
            inside = inside or [int(segment.mean().clamp(max=T - 1))]
            pooled = sum(features[b, t] / features[b, t].norm() for t in inside)
            logits = 20 * F.cosine_similarity(mean[b], text) + 50 * F.cosine_similarity(pooled, text)
            for k, p in enumerate((0.2 * logits).softmax(0).tolist()):
                expected[(b, k, *segment.tolist())] = float(score) * p
    found = as_scores(proposals_of(model, features, proposals="points", classify_by="calibrated"))
    assert found == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_regions_of_classes_by_loops(model: Stale, features: Tensor) -> None:
    """Each class has a mask of its own, and the probability of the whole video."""
    model.class_weights.copy_(torch.tensor([20.0, 50.0]))
    text, expected = F.normalize(class_features(model, NAMES).text, dim=-1), {}
    for b in range(B):
        cosine = F.normalize(features[b], dim=-1) @ text.T
        smooth = torch.stack([cosine[max(t - 2, 0) : t + 3].mean(0) for t in range(T)])
        masks = (50 * (smooth - smooth.mean(0))).sigmoid()
        of_video = F.normalize(F.normalize(features[b], dim=-1).mean(0), dim=0) @ text.T
        P = (0.2 * (20 + 50) * of_video).softmax(0).diag()
        for found in plain_decode(P.numpy(), masks.numpy(), K, DetectionConfig().thresholds, proposal_score="contrast"):
            expected[(b, *found[:3])] = found.score
    found = as_scores(proposals_of(model, features, proposals="classes", classify_by="calibrated"))
    assert found == pytest.approx(expected, rel=1e-3)
    with pytest.raises(StaleError, match="proposals=classes needs detection.classify_by=calibrated, not snippets"):
        load_config([], ["detection.proposals=classes"])
