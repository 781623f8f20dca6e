"""What a trained model makes of one video: detections, and the scores and the mask they come from."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stale.build import choose_device, classes_of, load_annotations, phrases, restore_model
from stale.checkpoint import load_checkpoint
from stale.config import Config
from stale.data.annotations import Video, match_video_id
from stale.data.dataset import load_features
from stale.data.features import open_features
from stale.detection.detector import class_scores_of, describe_classes, read_videos, to_results
from stale.detection.formats import table
from stale.errors import StaleError
from stale.model.stale import Stale
from stale.run import RunFolder


@dataclass(frozen=True, eq=False)
class VideoDetections(Sequence):
    """One video seen by the model; K classes under test, T snippets. A sequence of its detections.

    Attributes:
        video: with its duration and, if it has any, its ground truth.
        classes: the K labels.
        detections: ``{"segment": [start, end] seconds, "label", "score"}`` by falling score.
        class_scores: P without the background (K, T).
        foreground: L (T,), None for a model without a representation mask.
        threshold: where L is cut.
        thumbnails: a few (time in seconds, image (H, W, 3) uint8), of a video that was decoded here.
    """

    video: Video
    classes: list[str]
    detections: list[dict[str, Any]]
    class_scores: np.ndarray
    foreground: np.ndarray | None
    threshold: float
    thumbnails: Sequence[tuple[float, np.ndarray]] = ()

    def __len__(self) -> int:
        return len(self.detections)

    def __getitem__(self, index: Any) -> Any:
        return self.detections[index]

    def __str__(self) -> str:
        return table(self.video.id, self.detections)


@torch.inference_mode()
def explain_video(
    model: Stale, video: Video, features: Tensor, classes: Sequence[str], text: Tensor, config: Config
) -> VideoDetections:
    """Run the model on one video.

    Args:
        features: (n·T, D), rescaled; see :func:`stale.detection.detector.read_videos`.
        text: (K, C), from ``model.text``.
    """
    model.eval()
    snippets = features[None].to(model.background.device).float()
    outputs, candidates = read_videos(model, [video], snippets, text, classes, config.detection)
    detections = to_results([video], candidates, list(classes), outputs.num_snippets, config.detection)[video.id]
    scores = class_scores_of(outputs, config.detection)[0].cpu().numpy()
    foreground = None if outputs.foreground is None else outputs.foreground[0].float().cpu().numpy()
    return VideoDetections(video, list(classes), detections, scores, foreground, config.model.masking.threshold)


def explain(run: RunFolder, video_id: str, vocabulary: str = "unseen", checkpoint: str = "best") -> VideoDetections:
    """Run the trained model on any one annotated video that has features, of whichever subset.

    Args:
        vocabulary: ``unseen``, ``seen`` or ``all`` classes.
        checkpoint: ``best``, ``last`` or a file.

    Raises:
        StaleError: no run, no checkpoint, no such video, or no features of it.
    """
    config = run.load_config()
    path = run.checkpoint(checkpoint)
    video, classes = _find(config, video_id, vocabulary)
    device = choose_device(config.train.device)
    model = restore_model(config, load_checkpoint(path), path).to(device)
    features = load_features([video.id], open_features(config.data.features), config.tested_snippets)
    text = describe_classes(model, phrases(classes), config.detection.templates)
    return explain_video(model, video, features[0], classes, text, config)


def _find(config: Config, video_id: str, vocabulary: str) -> tuple[Video, list[str]]:
    videos, split = load_annotations(config.data)
    known = match_video_id(video_id, videos)
    if known is None:
        near = difflib.get_close_matches(video_id, videos, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise StaleError(f"video '{video_id}' is not in {config.data.annotations}{hint}")
    return videos[known], classes_of(split, vocabulary)
