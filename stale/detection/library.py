"""A trained run on anybody's videos and class names: what ``stale.load`` gives, and ``inference.py --video`` uses.

N snippets as extracted, T as the run takes them, D feature width, K classes, C joint width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stale.build import choose_device, restore_model
from stale.checkpoint import load_checkpoint
from stale.data.annotations import Video
from stale.data.dataset import rescale
from stale.data.features import check_features, load_npy, open_features, read_sidecar, recorded_number
from stale.data.tower import Tower, require_same_tower, require_same_width
from stale.data.vocabulary import NamedClass, parse_classes
from stale.detection.detector import describe_groups
from stale.detection.explain import VideoDetections, explain_video
from stale.errors import StaleError
from stale.run import RunFolder
from stale.video.encoder import ImageEncoder
from stale.video.extract import Sampling, VideoFeatures, encode_videos

THUMBNAILS = 10  # frames of a video that are kept for its picture

Classes = Sequence[str] | Mapping[str, Sequence[str]] | Sequence[NamedClass]


class Detector:
    """A trained run, ready for any video and any class names.

    Attributes:
        model: the trained network, on its device.
        config: the run's configuration.
        tower: the image tower that made the features the run was trained on, as far as they recorded it.
        feature_width: D.
    """

    def __init__(self, run: str | Path, checkpoint: str = "best", device: str | None = None) -> None:
        """Args:
        run: the folder that train.py wrote.
        checkpoint: ``best``, ``last`` or a file.
        device: auto, cpu, cuda or cuda:N; default: the device of the training.

        Raises:
            StaleError: no run or checkpoint there, or no such device.
        """
        folder = RunFolder(Path(run))
        self.config = folder.load_config()
        path = folder.checkpoint(checkpoint)
        state = load_checkpoint(path)
        chosen = choose_device(device, "device") if device else choose_device(self.config.train.device)
        self.model = restore_model(self.config, state, path).to(chosen)
        self.model.eval()
        self.tower = Tower.of(state.get("features", {}))
        self.feature_width = int(state["feature_width"])
        self._text: tuple[Any, Tensor] | None = None  # the last vocabulary, and its text features (K, C)

    def detect(
        self,
        features: np.ndarray | Tensor,
        fps: float = 5.0,
        classes: Classes = (),
        templates: Sequence[str] = (),
        name: str = "video",
    ) -> VideoDetections:
        """Detections of ``classes`` in one video's features.

        Args:
            features: (N, D) snippets in order, snippet i centred at (i + 0.5) / fps seconds.
            fps: snippets a second.
            classes: any names; ``"name | another phrase"`` or name → phrases describes a class by several phrases,
                whose text features are averaged.
            templates: texts with ``{}`` for the phrase, averaged as well; default: the run's own prompt.
            name: the video's id in what is returned.

        Raises:
            StaleError: the features are of another width or not finite, the rate is not above 0, or there is no class.
        """
        array = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
        array = check_features(array, f"features of '{name}'")
        if not fps > 0:
            raise StaleError(f"fps is {fps}: say how many snippets a second the features of '{name}' have")
        require_same_width(self.feature_width, array.shape[1], f"features of '{name}'")
        named = parse_classes(classes)
        video = Video(name, "", len(array) / fps, ())
        snippets = rescale(torch.from_numpy(array), self.config.tested_snippets)
        text = self._describe(named, templates)
        return explain_video(self.model, video, snippets, [item.label for item in named], text, self.config)

    def detect_video(
        self,
        path: str | Path,
        classes: Classes,
        fps: float = 5.0,
        templates: Sequence[str] = (),
        image_weights: str | Path | None = None,
    ) -> VideoDetections:
        """Detections of ``classes`` in a video file; see :meth:`detect` and :meth:`load_encoder`."""
        encoder = self.load_encoder(image_weights)
        ((_, result),) = self.detect_videos([Path(path)], encoder, classes, Sampling(fps), templates)
        if isinstance(result, StaleError):
            raise result
        return result

    def detect_videos(
        self,
        paths: Sequence[Path],
        encoder: ImageEncoder,
        classes: Classes,
        sampling: Sampling,
        templates: Sequence[str] = (),
    ) -> Iterator[tuple[str, VideoDetections | StaleError]]:
        """(id, detections) of each video file, decoded ahead in the background; of a broken one the error."""
        self._describe(parse_classes(classes), templates)  # a bad vocabulary stops before anything is decoded
        for path, result in encode_videos(paths, encoder, sampling, thumbnails=THUMBNAILS):
            if isinstance(result, VideoFeatures):
                found = self.detect(result.features, result.fps, classes, templates, path.stem)
                yield path.stem, replace(found, thumbnails=result.thumbnails)
            else:
                yield path.stem, result

    def detect_stored(
        self, sources: Sequence[Path], classes: Classes, fps: float | None = None, templates: Sequence[str] = ()
    ) -> Iterator[tuple[str, VideoDetections | StaleError]]:
        """(id, detections) of each video's features in ``.npy`` files, folders of them or HDF5; or the error.

        Args:
            fps: snippets a second, for features that do not record it.
        """
        self._describe(parse_classes(classes), templates)
        stored = [(source, *entry) for source in sources for entry in _stored(source)]  # all exist, or none is begun
        for source, video_id, load in stored:
            try:
                array, recorded = load()
                require_same_tower(self.tower, Tower.of(recorded), f"the features of '{video_id}' in {source}")
                rate = fps or recorded_number(recorded, "fps", f"features of '{video_id}' in {source}")
                if not rate:
                    raise StaleError(f"features {source} record no rate: say how many a second with --fps")
                yield video_id, self.detect(array, rate, classes, templates, video_id)
            except StaleError as error:
                yield video_id, error

    def load_encoder(self, image_weights: str | Path | None = None) -> ImageEncoder:
        """The image tower for videos, checked against the one the run was trained on.

        Args:
            image_weights: a file or a name such as ``ViT-B/16``; default: the CLIP weights of the run's text tower.

        Raises:
            StaleError: no such weights, no image tower in them, or not the run's.
        """
        source = image_weights or self.config.model.text.weights
        try:
            encoder = ImageEncoder.load(source, self.model.background.device)
        except StaleError as error:
            hint = "" if image_weights else "; name the image tower of the run's features with --image-weights"
            raise StaleError(f"{error}{hint}") from None
        require_same_tower(self.tower, encoder.tower, f"features by {source}")
        require_same_width(self.feature_width, encoder.width, f"features by {source}")
        return encoder

    @torch.inference_mode()
    def _describe(self, classes: Sequence[NamedClass], templates: Sequence[str]) -> Tensor:
        """Text features (K, C) of a vocabulary; those of the last one are kept."""
        templates = templates or self.config.detection.templates or ()
        key = (tuple(classes), tuple(templates))
        if self._text is None or self._text[0] != key:
            self._text = key, describe_groups(self.model, [item.phrases for item in classes], templates)
        return self._text[1]


def _stored(source: Path) -> Iterator[tuple[str, Any]]:
    """(id, function that loads the array and its record) of each video in a source of features."""
    if source.suffix == ".npy" and not source.is_dir():
        if not source.exists():
            raise StaleError(f"features not found: {source}")
        yield source.stem, lambda: (load_npy(source), read_sidecar(source))
        return
    store = open_features(source)
    for video_id in sorted(store.ids):
        yield video_id, lambda video_id=video_id: (store.read(video_id), store.attributes(video_id))
