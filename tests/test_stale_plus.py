"""What configs/stale_plus.yaml switches on: each part against a plain form, and the overlay end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from tiny import make_data_set, tiny_tower
from torch.nn import functional as F

from eval import main as evaluate
from scripts.benchmarks.decode import plain_regions
from stale.build import build_model
from stale.config import Config, DetectionConfig, load_config
from stale.data.annotations import Video
from stale.detection.decode import Candidates
from stale.detection.detector import candidates_of, read_videos
from stale.detection.explain import explain
from stale.detection.inference import infer
from stale.errors import StaleError
from stale.files import read_json
from stale.model.masking import ConvStackMask
from stale.model.stale import Outputs, Stale
from stale.training.trainer import train

B, T, C = 2, 16, 64
NAMES = ["diving", "high jump", "shot put"]
K = len(NAMES)
OVERLAY = REPOSITORY / "configs" / "stale_plus.yaml"


@pytest.fixture(scope="module")
def model() -> Stale:
    """STALE with the overlay, untrained."""
    config = load_config([OVERLAY])
    torch.manual_seed(0)
    return build_model(config.model, T, C, tiny_tower(num_tokens=49408, layers=1), NAMES).eval()


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(B, 2 * T, C, generator=torch.Generator().manual_seed(1))


def outputs_of(model: Stale, features: torch.Tensor) -> Outputs:
    with torch.no_grad():
        coarse, text = model.coarsen(features), model.text(model.text.tokenize(NAMES))
        return replace(model(coarse, text), video_cosine=model.compare_video(coarse, text))


# The model


def test_the_convolutions_read_a_video_of_any_length_and_know_no_place() -> None:
    torch.manual_seed(0)
    mask = ConvStackMask(C, hidden=8, layers=2, dropout=0.3).eval()
    for block in mask.blocks:
        block[1] = torch.nn.Identity()  # the normalisation alone looks at the whole video
    x = torch.randn(1, 40, C)
    whole, later = mask(x), mask(x[:, 7:])
    assert whole.shape == (1, 40)
    reach = 2 + 1  # of two blocks and the score
    torch.testing.assert_close(whole[:, 7 + reach :], later[:, reach:])


def test_features_are_coarsened_by_means(model: Stale, features: torch.Tensor) -> None:
    torch.testing.assert_close(model.coarsen(features)[1, 3], (features[1, 6] + features[1, 7]) / 2)
    coarse = features[:, :T]
    assert model.coarsen(coarse) is coarse


def test_the_video_is_compared_as_extracted_and_before_adaptation(model: Stale, features: torch.Tensor) -> None:
    coarse, text = model.coarsen(features), model.text(model.text.tokenize(NAMES)).detach()
    found = outputs_of(model, features).video_cosine
    for b in range(B):
        mean = sum(x / x.norm() for x in coarse[b]) / T
        for k in range(K):
            expected = F.cosine_similarity(mean, text[k], dim=0)
            torch.testing.assert_close(found[b, k], expected, atol=1e-5, rtol=1e-4)


# From outputs to candidates


def test_video_evidence_weighs_the_classes_of_a_video(model: Stale, features: torch.Tensor) -> None:
    outputs = outputs_of(model, features)
    options = DetectionConfig(top_snippets=K * T, candidates=10**4)
    plain = as_scores(candidates_of(outputs, options))
    weighed = as_scores(candidates_of(outputs, replace(options, video_evidence=True, video_temperature=0.05)))
    of_video = (outputs.video_cosine / 0.05).softmax(1)
    assert plain.keys() == weighed.keys()
    for (b, label, *segment), score in plain.items():
        assert weighed[(b, label, *segment)] == pytest.approx(score * float(of_video[b, label]), rel=1e-4)


def test_the_foregrounds_own_regions_by_loops(model: Stale, features: torch.Tensor) -> None:
    outputs = outputs_of(model, features)
    options = DetectionConfig(regions="foreground", video_evidence=True, candidates=10**4)
    finer = model.read_foreground(features).detach()
    found = as_scores(candidates_of(outputs, options, finer))
    of_video = (outputs.video_cosine / options.video_temperature).softmax(1)
    expected = {}
    for b in range(B):
        low, high = finer[b].min(), finer[b].max()
        curve = ((finer[b] - low) / (high - low)).tolist()
        for threshold in torch.tensor(options.thresholds).tolist():
            for start, end in plain_regions(curve, threshold):
                level = max(curve[start:end])
                for k in range(K):  # half a snippet is the finest step
                    key, score = (b, k, start / 2, end / 2), float(of_video[b, k]) * level
                    if score > 1e-30:
                        expected[key] = max(expected.get(key, 0.0), score)
    assert {key for key, score in found.items() if score > 1e-30} == set(expected)
    assert all(found[key] == pytest.approx(score, rel=1e-3) for key, score in expected.items())


def test_both_kinds_of_regions_stand_side_by_side(model: Stale, features: torch.Tensor) -> None:
    outputs = outputs_of(model, features)
    options = DetectionConfig(candidates=10**4)
    parts = [candidates_of(outputs, replace(options, regions=regions)) for regions in ("masks", "foreground")]
    both = candidates_of(outputs, replace(options, regions="both"))
    assert both.scores.shape[1] == sum(part.scores.shape[1] for part in parts)
    assert sorted(both.scores[0].tolist()) == sorted(parts[0].scores[0].tolist() + parts[1].scores[0].tolist())
    assert (both.scores.diff(dim=1) <= 0).all()


def test_finer_features_refine_the_foregrounds_regions_alone(model: Stale, features: torch.Tensor) -> None:
    videos = [Video(f"video {b}", "", 32.0, ()) for b in range(B)]
    text = model.text(model.text.tokenize(NAMES)).detach()

    def candidates(snippets: torch.Tensor, regions: str) -> Candidates:
        with torch.no_grad():
            return read_videos(model, videos, snippets, text, NAMES, DetectionConfig(regions=regions))[1]

    coarse = model.coarsen(features)
    assert torch.equal(candidates(features, "masks").segments, candidates(coarse, "masks").segments)
    segments = candidates(features, "foreground").segments
    assert (segments % 1 == 0.5).any()
    assert (candidates(coarse, "foreground").segments % 1 == 0).all()
    assert segments.max() <= T


def as_scores(candidates: Candidates) -> dict[tuple, float]:
    """(video, label, start, end) → score."""
    rows = {}
    for b in range(len(candidates.scores)):
        parts = (candidates.labels[b], candidates.segments[b], candidates.scores[b])
        for label, segment, score in zip(*(part.tolist() for part in parts), strict=True):
            if score > 0:
                rows[(b, label, *segment)] = score
    return rows


# Configurations


@pytest.mark.parametrize(
    "settings",
    [
        ["detection.regions=both", "model.masking.kind=none"],
        ["detection.regions=foreground", "model.masking.kind=gt"],
        ["detection.regions=foreground", "detection.name_by=proposals"],
    ],
)
def test_regions_need_a_predicted_foreground(settings: list[str]) -> None:
    with pytest.raises(StaleError, match="detection.regions"):
        load_config((), settings)


@pytest.mark.parametrize("name", ["activitynet", "thumos14", "demo", "thumos14_captions"])
def test_the_overlay_goes_on_every_data_set(name: str) -> None:
    config = load_config([REPOSITORY / "configs" / f"{name}.yaml", OVERLAY])
    default = load_config([REPOSITORY / "configs" / f"{name}.yaml"])
    assert config.tested_snippets == 4 * default.data.num_snippets
    assert config.train == default.train  # as many steps


def test_the_overlay_from_training_to_a_figure(tmp_path: Path) -> None:
    file = make_data_set(tmp_path / "data")
    config: Config = load_config([file, OVERLAY], ["train.epochs=1"])
    run = train(config, tmp_path / "run")
    infer(run)
    evaluate(["--run", str(run.path)])
    metrics = read_json(run.path / "metrics.json", "metrics")
    assert metrics["protocol"]["external_scores"] == "none"
    results = read_json(run.path / "detections.json", "detections")["results"]
    video = max(results, key=lambda name: len(results[name]))
    assert results[video]
    again = explain(run, video).detections
    assert [item["segment"] for item in again] == [item["segment"] for item in results[video]]
