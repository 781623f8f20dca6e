"""A run's test videos for people: a picture each, and one page to browse them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import stale
from stale.build import TestData, load_test_data, phrases
from stale.data.dataset import load_features
from stale.detection.detector import describe_classes
from stale.detection.explain import VideoDetections, explain_video
from stale.detection.library import Detector
from stale.errors import StaleError, name_some
from stale.evaluation import default_tious
from stale.evaluation.browse import browse_page
from stale.files import file_name, write_text


def visualize(
    detector: Detector, folder: Path, vocabulary: str = "unseen", pictures: int | None = None, limit: int | None = None
) -> tuple[Path, int]:
    """Write ``folder``/index.html of the run's test videos, and ``folder``/VIDEO.png of some.

    Args:
        vocabulary: ``unseen``, ``seen`` or ``all`` classes.
        pictures: how many videos get a picture, in the order of the annotations; None: all.
        limit: look at so many videos only; None: all.

    Returns:
        The page's path, and how many videos it has.

    Raises:
        StaleError: the run's data do not fit, or there is no video to show.
    """
    config = detector.config
    test = load_test_data(config, vocabulary)
    seen = []
    for video in tqdm(_watch(detector, test, limit), "videos", min(len(test.videos), limit or len(test.videos))):
        seen.append(video)
        if pictures is None or len(seen) <= pictures:
            stale.plot(
                video, folder / f"{file_name(video.video.id)}.png", title=f"{video.video.id}, {vocabulary} classes"
            )
    if not seen:
        raise StaleError("no test video to show")
    data = config.data
    protocol = (
        f"{data.dataset}, {data.setting} split {data.number}, {data.tested_subset} subset, {vocabulary} classes: "
    )
    page = browse_page(
        f"{data.dataset}: test videos", protocol + name_some(test.classes, 12), seen, default_tious(data.dataset)
    )
    write_text(folder / "index.html", page)
    return folder / "index.html", len(seen)


def _watch(detector: Detector, test: TestData, limit: int | None) -> Iterator[VideoDetections]:
    model, config = detector.model, detector.config
    text = describe_classes(model, phrases(test.classes), config.detection.templates)
    for video in test.videos[:limit]:
        features = load_features([video.id], test.store, config.tested_snippets)
        yield explain_video(model, video, features[0], test.classes, text, config)
