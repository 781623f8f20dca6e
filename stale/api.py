"""A trained run applied to any video and any class names: ``stale.load``, ``inference.py``.

N snippets as extracted, T as the model takes them, D feature width, K classes, C joint width.
"""

import difflib
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stale import distributed
from stale.checkpoint import load_checkpoint
from stale.config import Config, load_config
from stale.data.annotations import Video, match_video_id
from stale.data.classes import NamedClass, parse_classes, warn_of_same_text
from stale.data.dataset import load_sampled, native_length, rescale
from stale.data.datasets import facts
from stale.data.embeddings import EmbeddingTable, read_embeddings
from stale.data.features import (
    SUFFIXES,
    Backbone,
    check_features,
    load_npy,
    open_features,
    read_sidecar,
    recorded_number,
    recorded_rate,
    require_same_backbone,
    require_same_width,
)
from stale.data.selection import (
    TestData,
    classes_of,
    load_annotations,
    load_test_data,
    localizer_width,
    open_all_features,
)
from stale.detection.oracle import describe_oracle
from stale.detection.run import ClassFeatures, VideoDetections, class_features, detect_batch, write_test_detections
from stale.device import choose_device, out_of_memory_hint
from stale.errors import StaleError
from stale.model.stale import Stale, restore_model
from stale.model.text import FileEmbeddings
from stale.release import RUN, is_package, unpack
from stale.run_folder import BASELINES, RunFolder, log_into, start_logging
from stale.video.extract import Sampling, encode_videos
from stale.video.image_encoder import ImageEncoder

# Settings of the data that stay a run's own on another data set.
_OF_THE_MODEL = ("setting", "split", "fold", "sampling", "num_snippets", "rate", "max_snippets")

CHOSEN_ON = "mAP of held-out training videos, seen classes"
CHOSEN_ON_UNSEEN = "LOSS ON THE UNSEEN TEST CLASSES (as the released code; not zero-shot)"

Embeddings = str | Path | Mapping[str, Any] | EmbeddingTable
Classes = Sequence[str] | Mapping[str, Sequence[str]] | Sequence[NamedClass]
DetectionsOrErrors = Iterator[tuple[str, VideoDetections | StaleError]]

_log = logging.getLogger(__name__)


def load(run: str | Path, checkpoint: str = "best", device: str | None = None) -> "Detector":
    """Load a trained run; see :func:`stale.load`."""
    path = Path(run)
    if is_package(path):
        with TemporaryDirectory() as unpacked:
            unpack(path, Path(unpacked), only=RUN)
            return load(Path(unpacked) / RUN, checkpoint, device)
    folder = RunFolder(path)
    if path.is_file():
        path = path.absolute()
        folder = RunFolder(next((up for up in path.parents[:2] if RunFolder(up).config.is_file()), path.parent))
        checkpoint = path.stem if folder.checkpoint(path.stem) == path else str(path)
    config = folder.load_config()
    path = folder.checkpoint(checkpoint)
    state = load_checkpoint(path)
    setting = "--device" if device else "train.device"
    chosen = distributed.local_device(choose_device(device or config.train.device, setting), setting)
    model = restore_model(config, state, path).to(chosen).eval()
    backbone = Backbone.of(state.get("features", {}))
    chosen_on = f"nothing: epoch {state['epoch']}"
    if checkpoint == "best":
        best = state["best"]
        criterion = CHOSEN_ON_UNSEEN if "unseen_loss" in best else CHOSEN_ON if "mAP" in best else "nothing: the last"
        chosen_on = f"{criterion}, epoch {best['epoch']}"
    return Detector(config, model, backbone=backbone, feature_width=int(state["feature_width"]), chosen_on=chosen_on)


@dataclass
class Detector:
    """A trained run, ready for any video and any class names."""

    config: Config
    model: Stale  # on its device
    backbone: Backbone  # the image encoder of the features it was trained on, as far as they recorded it
    feature_width: int  # D
    chosen_on: str  # what its checkpoint was chosen on
    _vocabulary: tuple[Any, ClassFeatures] | None = field(default=None, init=False, repr=False)  # the last one

    def detect(
        self,
        features: np.ndarray | Tensor,
        fps: float,
        classes: Classes = (),
        templates: Sequence[str] = (),
        embeddings: Embeddings | None = None,
        name: str = "video",
    ) -> VideoDetections:
        """Detect ``classes`` in one video's features.

        Args:
            features: (N, D) snippets in order, snippet i centered at (i + 0.5) / fps seconds.
            classes: any names; ``"name | another phrase"`` or name → phrases describes a class by several phrases,
                whose text features are averaged.
            templates: texts with ``{}`` for the phrase, averaged as well; default: the run's own prompt.
            embeddings: of the classes, in place of the run's text encoder: a file (see :mod:`stale.data.embeddings`),
                or name → vector or vectors. Without ``classes`` all of its classes are detected.
        """
        if isinstance(features, Tensor):  # numpy has no bfloat16
            features = (features.float() if features.dtype is torch.bfloat16 else features).detach().cpu().numpy()
        array = check_features(np.ascontiguousarray(features), f"features of '{name}'")
        recorded_number({"fps": float(fps)}, "fps", f"features of '{name}'")
        require_same_width(self.feature_width, array.shape[1], f"features of '{name}'")
        video, data = Video(name, "", len(array) / fps, ()), self.config.data
        count = self.config.tested_snippets or native_length(len(array), video.duration, data.rate)
        snippets = rescale(torch.from_numpy(array), count)
        return self._detect_one(video, snippets, self.class_features(classes, templates, embeddings))

    def detect_video(self, path: str | Path, classes: Classes, **options: Any) -> VideoDetections:
        """Detect ``classes`` in a video file; ``options`` are those of :meth:`detect_videos`."""
        ((_, result),) = self.detect_videos([Path(path)], classes, **options)
        if isinstance(result, StaleError):
            raise result
        return result

    def detect_videos(
        self,
        paths: Sequence[Path],
        classes: Classes,
        fps: float = 5.0,
        image_weights: str | Path | None = None,
        **text: Any,
    ) -> DetectionsOrErrors:
        """(id, detections) of each video file, decoded ahead in the background; of a broken one the error.

        ``text`` is ``templates`` and ``embeddings`` of :meth:`detect`.
        """
        encoder, sampling = self.load_encoder(image_weights), Sampling(fps)
        self.class_features(classes, **text)  # a bad vocabulary stops before anything is decoded
        for path, encoded in encode_videos(paths, encoder, sampling, thumbnails=10):
            try:
                if isinstance(encoded, StaleError):
                    raise encoded
                found = self.detect(encoded.features, encoded.fps, classes, name=path.stem, **text)
                yield path.stem, replace(found, thumbnails=encoded.thumbnails)
            except StaleError as error:  # of a video too long for the memory, for one
                yield path.stem, error

    def detect_stored(
        self,
        sources: Sequence[Path],
        classes: Classes,
        fps: float | None = None,
        duration: float | None = None,
        **text: Any,
    ) -> DetectionsOrErrors:
        """(id, detections or the error) of each video's features.

        ``fps`` is their rate, or ``duration`` that of the videos in seconds, in place of what is recorded.
        """
        self.class_features(classes, **text)
        stored = [(source, *entry) for source in sources for entry in _stored(source)]  # all exist, or none is begun
        if duration and len(stored) > 1:
            raise StaleError(f"--duration is of one video, and the features are of {len(stored)}: give their --fps")
        for source, video_id, load_array in stored:
            try:
                array, recorded = load_array()
                where = f"features of '{video_id}' in {source}"
                require_same_backbone(self.backbone, Backbone.of(recorded), f"the {where}")
                rate = recorded_rate(recorded, where, len(array) / duration if duration else fps)
                if rate is None:
                    raise StaleError(f"features {source} record no rate: say it with --fps, or --duration in seconds")
                yield video_id, self.detect(array, rate, classes, name=video_id, **text)
            except StaleError as error:
                yield video_id, error

    def detect_annotated(self, video_id: str, vocabulary: str = "unseen") -> VideoDetections:
        """Detect the ``unseen``, ``seen`` or ``all`` classes in an annotated video, for its picture."""
        videos, split = load_annotations(self.config.data)
        known = match_video_id(video_id, videos)
        if known is None:
            near = difflib.get_close_matches(video_id, videos, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise StaleError(f"video '{video_id}' is not in {self.config.data.annotations}{hint}")
        classes = class_features(self.model, classes_of(split, vocabulary))
        video, data = videos[known], self.config.data
        store = open_all_features(data).annotate(videos)
        features = load_sampled([video], store, data, self.config.tested_snippets)
        return self._detect_one(video, features[0], classes)

    def test_data(self, vocabulary: str, other: Config | None = None) -> TestData:
        """Test videos of the run or of ``other``, another data set; a StaleError if their features are of another."""
        test = load_test_data(other or self.config, vocabulary, self.config.data if other else None)
        features = f"features {_source(other or self.config)}"
        require_same_backbone(self.backbone, test.store.backbone(), features)
        require_same_width(self.feature_width, test.store.width, features, "use those")
        return test

    def load_encoder(self, image_weights: str | Path | None = None) -> ImageEncoder:
        """Load the image encoder for videos, which must be the one of the features that the run was trained on.

        ``image_weights`` is a file or a name such as ``ViT-B/16``; default: the CLIP weights of the run's text encoder.
        """
        source = image_weights or self.config.model.text.weights
        try:
            encoder = ImageEncoder.load(source, self.model.background.device, self.config.model.text.activation)
        except StaleError as error:
            hint = "" if image_weights else "; name the image encoder of the run's features with --image-weights"
            raise StaleError(f"{error}{hint}") from None
        require_same_backbone(self.backbone, encoder.backbone, f"features by {source}")
        require_same_width(self.feature_width, encoder.width, f"features by {source}")
        return encoder

    def class_features(
        self, classes: Classes, templates: Sequence[str] = (), embeddings: Embeddings | None = None
    ) -> ClassFeatures:
        """Labels and text features (K, C) of any class names; those of the last vocabulary are kept."""
        if isinstance(embeddings, Mapping):
            embeddings = EmbeddingTable.of(embeddings)
        key = (tuple(parse_classes(classes)) if classes or embeddings is None else (), tuple(templates), embeddings)
        if self._vocabulary is None or self._vocabulary[0] != key:
            table = self.read_embeddings(embeddings) if isinstance(embeddings, (str, Path)) else embeddings
            warn_of_same_text(key[0])
            self._vocabulary = key, class_features(self.model, key[0], templates, table)
        return self._vocabulary[1]

    def read_embeddings(self, path: str | Path) -> EmbeddingTable:
        """Load class embeddings; a StaleError if they are known to be of another model than the run's features."""
        table = read_embeddings(path)
        if not self.config.model.visual_projection:
            table.require_model_of(self.backbone)
        return table

    def _detect_one(self, video: Video, features: Tensor, classes: ClassFeatures) -> VideoDetections:
        """Detect in one video, features (T, D), or (snippets, D) at their own rate."""
        batch = [features] if self.config.tested_snippets is None else features[None]
        with out_of_memory_hint("data.num_snippets", self.config.data.num_snippets, "; train again with fewer"):
            (found,) = detect_batch(self.model, [video], batch, classes, options=self.config.detection)
        return found


def infer(
    run: RunFolder,
    checkpoint: str = "best",
    vocabulary: str = "unseen",
    device: str | None = None,
    oracle: Sequence[str] = (),
    embeddings: str | Path | None = None,
    test_config: Sequence[Path] = (),
    curves: bool = False,
) -> None:
    """Detect in a run's test videos, and write the results files of the model and of the training-free baselines.

    ``vocabulary`` is ``unseen``, ``seen`` or ``all`` classes. With ``oracle`` (as ``detection.oracle``) ground truth
    takes a prediction's place; the file has a name of its own, and no baselines are written. ``embeddings`` is a file
    of those of the classes, as in :meth:`Detector.detect`. ``test_config`` are configuration files of another data set:
    its classes that the run has not seen are detected there, into files that its name is part of. ``curves`` saves the
    foreground and the class scores besides, for the report page.
    """
    kept = start_logging()
    detector = load(run.path, checkpoint, device)
    if distributed.is_main_process():
        log_into(run.log, kept)
    config, model = detector.config, detector.model
    if oracle:
        config = load_config([run.config], [f"detection.oracle=[{', '.join(oracle)}]"])
    other: Config | None = None
    if test_config:
        given = load_config(test_config)
        own = {name: getattr(config.data, name) for name in _OF_THE_MODEL}
        config = other = config.model_copy(update={"data": given.data.model_copy(update=own)})
        embeddings = embeddings or given.model.text.embeddings or None
    if embeddings is not None:
        model.text = FileEmbeddings.replacing(model.text, detector.read_embeddings(embeddings))
    test, data = detector.test_data(vocabulary, other), config.data
    _compare_with_training(run, test)
    name = data.dataset if other else vocabulary
    protocol = {
        "dataset": data.dataset,
        "setting": data.setting,
        "split": data.number,
        "split_source": test.split.source,
        "subset": data.test_subset if other else data.tested_subset,
        "tious": list(facts(data.dataset, data.tious).tious),
        "vocabulary": vocabulary,
        "classes": test.classes,
        "unseen_classes": list(test.split.unseen),
        "annotations": data.annotations,
        "features": _source(config),
        "class_embeddings": str(embeddings or config.model.text.embeddings),
        "checkpoint": checkpoint,
        "checkpoint_chosen_on": detector.chosen_on,
        "oracle": describe_oracle(config),
        "skipped_videos": test.skipped,
    }
    files = {"model": run.detections(name, oracle)}
    if not oracle and test.store.width - localizer_width(test.store, data) == model.text.output_width:
        files |= {row: run.baselines(row, name) for row in BASELINES}
    elif not oracle:
        _log.warning("training-free baselines left out: the features do not lie in the text encoder's space")
    files |= {"curves": run.snippet_scores(name)} if curves else {}
    write_test_detections(model, config, test, files=files, protocol=protocol)
    _log.info("%d videos, %d classes → %s", len(test.videos), len(test.classes), files["model"])
    if not oracle and not other:
        _log.info("next: python eval.py --run %s --vocabulary %s", shlex.quote(str(run.path)), vocabulary)


def _compare_with_training(run: RunFolder, test: TestData) -> None:
    """Raise a StaleError if the seen classes are no longer those of the training; warn if its data have changed."""
    changed = run.changed({"seen": list(test.split.seen), **test.digests})
    if "seen" in changed:
        fix = "restore the annotations and lists, or train again"
        raise StaleError(f"{run.split}: the run was trained with other seen classes than the split has now: {fix}")
    if changed:
        _log.warning("the %s of the training videos have changed since the run was trained", " and ".join(changed))


def _source(config: Config) -> str:
    """The features of a configuration, as one text."""
    return " + ".join([config.data.features] if isinstance(config.data.features, str) else config.data.features)


def _stored(source: Path) -> Iterator[tuple[str, Any]]:
    """(id, function that loads the array and its record) of each video in a source of features."""
    if source.suffix in SUFFIXES and not source.is_dir():
        if not source.exists():
            raise StaleError(f"features not found: {source}")
        yield source.stem, lambda: (load_npy(source), read_sidecar(source))
        return
    store = open_features(source)
    for video_id in sorted(store.ids):
        yield video_id, lambda video_id=video_id: (store.read(video_id), store.attributes(video_id))
