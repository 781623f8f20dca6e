"""STALE: zero-shot temporal action detection via vision-language prompting.

import stale

model = stale.load("runs/thumos14_0")
detections = model.detect(features, fps=5, classes=["high jump", "tennis swing"])  # features (snippets, width)
stale.plot(detections)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stale.version import __version__

if TYPE_CHECKING:  # importing stale alone stays light
    from matplotlib.figure import Figure

    from stale.api import Detector
    from stale.detection.run import VideoDetections

__all__ = ["__version__", "load", "plot"]


def load(run: str | Path, checkpoint: str = "best", device: str | None = None) -> "Detector":
    """Load a trained run for any video and any class names.

    ``run`` is a run folder, a checkpoint file in one, or a package of ``scripts/pack_release.py``. ``checkpoint`` is
    ``best``, ``last`` or a file; ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, by default that of the
    training. It is a StaleError if there is no run.
    """
    from stale.api import load as load_run

    return load_run(run, checkpoint, device)


def plot(found: "VideoDetections", path: str | Path | None = None, top: int = 10, title: str = "") -> "Figure":
    """Draw the timeline of a video's ``top`` detections, and save it to ``path`` (png, pdf or svg) if it is given."""
    from stale.plots import draw_timeline, save_figure

    options: dict[str, Any] = {"foreground": found.foreground, "threshold": found.threshold, "title": title, "top": top}
    scored = (found.video, found.classes, found.detections, found.class_scores)
    figure = draw_timeline(*scored, thumbnails=found.thumbnails, **options)
    if path is not None:
        save_figure(figure, path)
    return figure
