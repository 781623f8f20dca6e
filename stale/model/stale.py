"""STALE: from snippet features and class phrases to class scores and an instance mask for every snippet.

B videos, T snippets, D feature width, C joint width, K classes in the current vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale import distributed
from stale.config import Config, ModelConfig
from stale.data.embeddings import EmbeddingTable, read_embeddings, require_text_width
from stale.errors import StaleError
from stale.model.adaptation import CrossAdaptation
from stale.model.clip import load_text_weights
from stale.model.localizer import MaskLocalizer
from stale.model.masking import apply_threshold, build_masking
from stale.model.points import PointHead, Points
from stale.model.temporal import TemporalModel, build_temporal_model
from stale.model.text import ClassEmbeddings, ClassEncoder, FileEmbeddings, TextEncoder, TextTransformer


@dataclass(frozen=True)
class Outputs:
    """The model's outputs for a batch."""

    visual: Tensor  # F_vis: B × T × C
    class_logits: Tensor  # B × K+1 × T, the background last
    mask_logits: Tensor | None  # B × T × T; the sigmoid gives M, whose column t is the mask that snippet t predicts
    foreground_logits: Tensor | None  # B × T, whose sigmoid is L; None without a learned representation mask
    mask: Tensor | None = None  # B × T: the factor on the features, L_bin where the mask is applied and binary
    given_mask: Tensor | None = None  # B × T: the ground truth's foreground, where it is given in place of L
    classifier_features: Tensor | None = None  # B × T × C, which are classified: F_vis, or a baseline's own
    text: Tensor | None = None  # K × C: F_lan of the classes, of unit length
    language: Tensor | None = None  # F_lan': B × K+1 × C, with which they are compared
    temperature: float | Tensor = 0.01  # τ of the comparison
    points: Points | None = None  # of the point head, if the model has one
    video_cosine: Tensor | None = None  # B × K, of Stale.video_cosine, where detection asks for it
    class_weights: Tensor | None = None  # (2,) of the similarities with the video and inside a segment
    quality_scales: Tensor | None = None  # (4,) of the sources of proposals, as detection.decode.SOURCES
    video_logits: Tensor | None = None  # B × K, of F_fg pooled over the video, for loss.classification_video
    true_classes: Tensor | None = None  # B × K bool: the classes of each video, where an oracle gives them
    multi_label: bool = False  # P by sigmoids: several classes may happen at once

    @property
    def num_snippets(self) -> int:
        """T."""
        return self.class_logits.shape[2]

    @property
    def probabilities(self) -> Tensor:
        """P (B, K+1, T): softmax, or with ``multi_label`` sigmoids, of which the background is the threshold [ours]."""
        logits = self.class_logits.float()
        if not self.multi_label:
            return logits.softmax(1)
        P = (logits[:, :-1] - logits[:, -1:]).sigmoid()
        return F.pad(P if self.mask is None else P * self.mask.float().unsqueeze(1), (0, 0, 0, 1))

    @property
    def foreground(self) -> Tensor | None:
        """L (B, T): given, predicted, or None."""
        if self.given_mask is not None:
            return self.given_mask
        return None if self.foreground_logits is None else self.foreground_logits.float().sigmoid()


class Stale(nn.Module):
    """The model of the paper (``stale/README.md``)."""

    multi_label = False  # loss.classification_form=sigmoid
    class_weights: Tensor
    quality_scales: Tensor

    def __init__(
        self, text: ClassEncoder, feature_width: int, num_snippets: int, config: ModelConfig, localizer_width: int = 0
    ) -> None:
        """``feature_width`` is D, whose last ``localizer_width`` are features for the point head alone."""
        super().__init__()
        width, feature_width = text.output_width, feature_width - localizer_width
        if not config.visual_projection:
            require_text_width(feature_width, width)
        inside = config.masking.hidden if config.masking.blocks else width
        attention = {  # the width of each
            "temporal": width if config.temporal.kind == "transformer" else 0,
            "masking": inside if config.masking.kind == "maskformer" else 0,
            "adaptation": width if config.adaptation.enabled else 0,
        }
        for name, size in attention.items():
            if size % (heads := getattr(config, name).heads):
                raise StaleError(f"model.{name}.heads is {heads}, which does not divide the width {size}")
        self.config, self.text = config, text
        self.projection = nn.Linear(feature_width, width) if config.visual_projection else nn.Identity()
        self.temporal = build_temporal_model(width, config.temporal)
        self.masking = build_masking(width, config.masking)
        self.adaptation = CrossAdaptation(width, config.adaptation) if config.adaptation.enabled else None
        has_masks = config.localizer.kind != "none"
        self.localizer = MaskLocalizer(width, num_snippets, config.localizer) if has_masks else None
        self.num_snippets, self.localizer_width = num_snippets, localizer_width
        self.points = PointHead(localizer_width or width, config.points) if config.points.enabled else None
        self.background = nn.Parameter(torch.randn(width) * width**-0.5)  # learned, the last of the classes
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())  # of τ
        # Fitted to the seen classes by detection.calibration: of similarities, and of the sources of proposals.
        self.register_buffer("class_weights", torch.full((2,), 1 / config.temperature))
        self.register_buffer("quality_scales", torch.ones(4))
        self.classifier: nn.Module | None = None  # context for the classified features alone (two-stage baselines)
        if config.classifier_features != "shared":
            own = config.classifier_features == "own"
            self.classifier = build_temporal_model(width, config.temporal) if own else TemporalModel()

    @property
    def mask_given(self) -> bool:
        """Whether the ground truth's foreground replaces L, in training and at test time (an oracle)."""
        return self.config.masking.kind == "gt"

    def forward(
        self,
        features: Tensor,
        text: Tensor,
        given_mask: Tensor | None = None,
        foreground: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Outputs:
        """Features (B, T, D) and text features (K, C), from ``self.text``, → :class:`Outputs`.

        Args:
            given_mask: (B, T) of 0 and 1, the ground truth's foreground in place of L: an oracle.
            foreground: (B, T) bool, snippets that pass whatever L is: in training those of the ground truth [ours].
            valid: (B, T) bool, False for snippets that are padding and must not influence the others.
        """
        if self.mask_given and given_mask is None:
            raise StaleError("model.masking.kind=gt needs the ground truth of every video; these have none")
        points = None if self.points is None else self.points(self.points_input(features), valid)
        features, _ = self.split_features(features)
        x = self.normalize_features(features)  # B × T × C
        visual = self.temporal(x, valid)  # F_vis: B × T × C
        language = F.normalize(torch.cat([text, self.background[None]]), dim=-1)  # F_lan: K+1 × C
        text = language[:-1]

        foreground_logits = None if self.masking is None else self.masking(visual, valid)  # B × T
        known = foreground_logits if given_mask is None else 12 * given_mask - 6  # logits of L
        mask_logits = None if self.localizer is None else self.localizer(visual, known)  # B × T × T
        mask = torch.ones_like(visual[..., 0])  # L_bin: B × T, the factor on the features
        if self.config.masking.applied and given_mask is not None:
            mask = given_mask.to(visual.dtype)
        elif self.config.masking.applied and foreground_logits is not None:
            mask = apply_threshold(foreground_logits.sigmoid(), self.config.masking)
            if foreground is not None:
                mask = torch.where(foreground & (mask == 0), torch.ones_like(mask), mask)
        elif self.config.masking.crop == "localizer" and mask_logits is not None:
            mean = mask_logits.sigmoid().mean(2)  # B × T: how often a snippet is in a predicted mask
            mask = (mean >= mean.mean(1, keepdim=True)).to(visual.dtype)

        if self.adaptation is None:
            language = language.expand(len(visual), -1, -1)
        else:
            language = self.adaptation(language, visual, mask, valid)  # F_lan': B × K+1 × C

        classified = visual if self.classifier is None else self.classifier(x, valid)  # B × T × C
        if self.config.clamp is not None:  # of F_fg, so that a masked snippet is no longer zero
            classified = (classified * mask.unsqueeze(-1)).clamp(min=self.config.clamp)
            mask = torch.ones_like(mask)
        present = mask if valid is None else mask * valid
        pooled = (classified * present.unsqueeze(-1)).mean(1, keepdim=True)  # B × 1 × C
        return Outputs(
            visual=visual,
            class_logits=self.classify(classified, mask, language),  # B × K+1 × T
            mask_logits=mask_logits,
            foreground_logits=foreground_logits,
            mask=mask,
            given_mask=given_mask,
            classifier_features=classified,
            text=text,
            language=language,
            temperature=self.log_temperature.exp(),
            class_weights=self.class_weights,
            quality_scales=self.quality_scales,
            points=points,
            video_logits=classify_pooled(pooled, language[:, :-1], self.log_temperature.exp()).squeeze(1),
            multi_label=self.multi_label,
        )

    def split_features(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, D) → those of the classifier, and those for the point head alone; None without any."""
        if not self.localizer_width:
            return features, None
        return features[..., : -self.localizer_width], features[..., -self.localizer_width :]

    def points_input(self, features: Tensor) -> Tensor:
        """Features (B, T, D) → what the point head sees, its own features or those of the classifier."""
        features, own = self.split_features(features)
        return self.normalize_features(features) if own is None else unit_variance(own)

    def normalize_features(self, features: Tensor) -> Tensor:
        """(B, T, D) → (B, T, C): projected, on the unit sphere as CLIP compares them, scaled to unit variance."""
        return unit_variance(self.projection(features))

    def classify(self, visual: Tensor, mask: Tensor, language: Tensor) -> Tensor:
        """Logits (B, K+1, T): cosine of F_fg = F_vis · mask and F_lan' over the temperature τ."""
        # A factor on the features would be undone by their normalization, unless it is 0.
        with torch.autocast(visual.device.type, enabled=False):  # bfloat16 would round logits near 1 / τ to 0.5
            visual = F.normalize(visual.float(), dim=-1, eps=1e-2)  # of zeros, the gradient would explode
            cosine = F.normalize(language.float(), dim=-1) @ visual.transpose(1, 2)
            return cosine * mask.float().unsqueeze(1) / self.log_temperature.exp()

    def video_cosine(self, features: Tensor, text: Tensor) -> Tensor:
        """Cosine (B, K) of a video's mean feature, before the temporal model, and each class's text features [ours]."""
        with torch.autocast(features.device.type, enabled=False):
            features, _ = self.split_features(features.float())
            video = F.normalize(self.projection(features), dim=-1).mean(1)
            return F.normalize(video, dim=-1) @ F.normalize(text.float(), dim=-1).T


def unit_variance(x: Tensor) -> Tensor:
    """Put features (..., C) on the sphere of radius √C."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def classify_pooled(pooled: Tensor, language: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits (B, M, K) of M pooled features of a video (B, M, C), of any length, and text features (B, K, C)."""
    with torch.autocast(pooled.device.type, enabled=False):  # as in Stale.classify
        cosine = F.normalize(pooled.float(), dim=-1) @ F.normalize(language.float(), dim=-1).transpose(1, 2)
        return cosine / temperature


# Building


def load_text(config: ModelConfig) -> TextTransformer | FileEmbeddings:
    """Load what the language embedding starts from: CLIP's text transformer, or class embeddings."""
    if config.text.embeddings:
        return FileEmbeddings(read_embeddings(config.text.embeddings), config.text.adapter)
    weights = load_text_weights(config.text.weights, config.text.activation)
    return TextTransformer.from_weights(weights, config.text.heads)


def build_model(
    config: ModelConfig,
    num_snippets: int,
    feature_width: int | tuple[int, int],
    source: TextTransformer | FileEmbeddings,
    seen: Sequence[str] = (),
) -> Stale:
    """Build STALE for classes with the phrases ``seen``; D, or D and how much of it is for the point head alone."""
    width, localizer_width = (feature_width, 0) if isinstance(feature_width, int) else feature_width
    text: ClassEncoder
    if isinstance(source, FileEmbeddings):
        text = source
    elif config.text.encoder == "none":
        text = ClassEmbeddings(ClassEmbeddings.names_of(seen), source.output_width)
    else:
        text = TextEncoder(source, config.text)
    model = Stale(text, width, num_snippets, config, localizer_width=localizer_width)
    if config.background_init == "mean_text" and seen:
        # [ours]: at τ = 0.01 a random one, at a right angle to all features, loses against every class at first.
        with torch.no_grad():
            model.background.copy_(F.normalize(text(text.tokenize(seen)), dim=-1).mean(0))
    return model


def initial_model(config: Config, feature_width: int | tuple[int, int], seen: Sequence[str]) -> Stale:
    """Build STALE with the weights that training starts from, by ``train.seed``; ``seen`` are the classes' phrases."""
    torch.manual_seed(config.train.seed)
    text = distributed.main_process_first(lambda: load_text(config.model))
    model = build_model(config.model, config.data.longest, feature_width, text, seen=seen)
    model.multi_label = config.loss.classification_form == "sigmoid"
    return model


def restore_model(config: Config, checkpoint: Mapping[str, Any], path: object = "checkpoint") -> Stale:
    """Rebuild the trained model of a checkpoint; a StaleError if its tensors do not fit the configuration."""
    prefix = "text.transformer."
    try:
        state = checkpoint["model"]
        text: ClassEncoder
        if config.model.text.embeddings:
            vectors, names = state["text.vectors"], json.loads(bytes(state["text.names"].tolist()))
            table = EmbeddingTable(names, vectors.numpy(), f"class embeddings in {path}")
            text = FileEmbeddings(table, config.model.text.adapter)
        elif config.model.text.encoder == "none":
            text = ClassEmbeddings(torch.empty_like(state["text.names"]), state["text.embedding"].shape[1])
        else:
            inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            text = TextEncoder(TextTransformer(inner, config.model.text.heads), config.model.text)
        widths = {"feature_width": checkpoint["feature_width"], "localizer_width": checkpoint.get("localizer_width", 0)}
        model = Stale(text, num_snippets=config.data.longest, config=config.model, **widths)
        model.load_state_dict(state)
        model.multi_label = config.loss.classification_form == "sigmoid"
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StaleError(f"{path} does not fit this run's configuration: {reason}") from None
    return model


@torch.no_grad()
def training_free_text(model: Stale, phrases: Sequence[str]) -> Tensor:
    """Text features (K, C) of ``phrases`` before any training: CLIP's in the configured template, or the file's."""
    if isinstance(model.text, FileEmbeddings):
        return model.text.vectors[model.text.table().find(phrases)]
    transformer = distributed.main_process_first(lambda: load_text(model.config))
    assert isinstance(transformer, TextTransformer)
    encoder = TextEncoder(transformer, model.config.text.model_copy(update={"prompt": "template"}))
    return encoder(encoder.tokenize(phrases))
