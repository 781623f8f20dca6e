"""STALE: zero-shot temporal action detection via vision-language prompting.

import stale

model = stale.load("runs/thumos14_0")
detections = model.detect(features, fps=5, classes=["high jump", "tennis swing"])  # features (snippets, width)
stale.plot(detections)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing stale alone stays light
    from matplotlib.figure import Figure

    from stale.detection.explain import VideoDetections
    from stale.detection.library import Detector

__version__ = "0.1.0"
__all__ = ["__version__", "load", "plot"]


def load(run: str | Path, checkpoint: str = "best", device: str | None = None) -> Detector:
    """A trained run, ready for any video and any class names.

    Args:
        run: the folder that train.py wrote.
        checkpoint: ``best``, ``last`` or a file.
        device: auto, cpu, cuda or cuda:N; default: the device of the training.

    Raises:
        stale.errors.StaleError: no run or checkpoint there, or no such device.
    """
    from stale.detection.library import Detector

    return Detector(run, checkpoint, device)


def plot(detections: VideoDetections, path: str | Path | None = None, top: int = 10, title: str = "") -> Figure:
    """The timeline of a video: its detections by class, foreground mask, snippet scores; a notebook shows it.

    Args:
        detections: what :meth:`Detector.detect` returned.
        path: a file to save to as well; its ending (png, pdf, svg) chooses the format.
        top: how many detections to draw.
        title: default the video's id.
    """
    from stale.plots import draw_timeline, save_figure

    seen = detections
    figure = draw_timeline(
        seen.video,
        seen.classes,
        seen.detections,
        seen.class_scores,
        seen.foreground,
        seen.threshold,
        title,
        top,
        seen.thumbnails,
    )
    if path is not None:
        save_figure(figure, path)
    return figure
