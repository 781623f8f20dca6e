"""STALE assembled: snippets and class phrases in, class scores and instance masks a snippet out.

B videos, T snippets, D feature width, C joint width, K classes in the current vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.errors import StaleError
from stale.model.adaptation import CrossAdaptation
from stale.model.localizer import MaskLocalizer
from stale.model.masking import apply_threshold
from stale.model.text import TextEncoder


@dataclass(frozen=True)
class Outputs:
    """What STALE says of a batch.

    Attributes:
        visual: F_vis (B, T, C).
        class_logits: (B, K+1, T); a softmax over dimension 1 gives P. The background comes last.
        mask_logits: (B, T, T); the sigmoid of column t is the mask over the video that snippet t predicts.
        foreground_logits: (B, T), whose sigmoid is L; None without a learned representation mask.
        given_mask: (B, T), the ground truth's foreground where it was given in place of L.
        evidence: (B, T, C), the features that the classifier compares: F_vis, or a baseline's own.
        language: (B, K+1, C), what it compares them with: F_lan'.
        temperature: τ of the comparison.
        text: (K, C), as it came in.
        video_cosine: (B, K) of :meth:`Stale.compare_video`, where detection asks for it.
    """

    visual: Tensor
    class_logits: Tensor
    mask_logits: Tensor
    foreground_logits: Tensor | None
    given_mask: Tensor | None = None
    evidence: Tensor | None = None
    language: Tensor | None = None
    temperature: float = 0.01
    text: Tensor | None = None
    video_cosine: Tensor | None = None

    @property
    def num_snippets(self) -> int:
        """T."""
        return self.class_logits.shape[2]

    @property
    def foreground(self) -> Tensor | None:
        """L (B, T): given, predicted, or None."""
        if self.given_mask is not None:
            return self.given_mask
        return None if self.foreground_logits is None else self.foreground_logits.float().sigmoid()


class Stale(nn.Module):
    """The model of the paper (sections 1 to 5); every component can be exchanged by the switches of its module."""

    def __init__(
        self,
        text: TextEncoder,
        temporal: nn.Module,
        masking: nn.Module | None,
        adaptation: CrossAdaptation | None,
        localizer: MaskLocalizer,
        feature_width: int,
        visual_projection: bool = False,
        temperature: float = 0.01,
        mask_threshold: float = 0.5,
        mask_gradient: str = "hard",
        mask_applied: bool = True,
        mask_given: bool = False,
        classifier: nn.Module | None = None,
        raw_similarity: float = 0.0,
    ) -> None:
        """Args:
        feature_width: D; must equal the text features' width C unless ``visual_projection`` learns D → C.
        temperature: τ of the classifier.
        mask_threshold, mask_gradient: see :func:`stale.model.masking.apply_threshold`.
        mask_applied: False learns the mask and leaves the features whole (released code).
        mask_given: the ground truth's foreground stands in for the mask, in training and at test time (an oracle).
        classifier: context for the features that are classified, in place of F_vis (two-stage baselines).
        raw_similarity: share of the class logits that compares features as extracted with unadapted text (ours).

        Raises:
            StaleError: the features' width is not the text tower's and there is no projection.
        """
        super().__init__()
        width = text.output_width
        if feature_width != width and not visual_projection:
            raise StaleError(
                f"the features are {feature_width} wide but the text tower's embedding is {width}: use features and "
                "text weights of the same CLIP model, or learn a projection by model.visual_projection=true"
            )
        self.text = text
        self.projection = nn.Linear(feature_width, width) if visual_projection else nn.Identity()
        self.temporal, self.masking = temporal, masking
        self.adaptation, self.localizer = adaptation, localizer
        self.background = nn.Parameter(torch.randn(width) * width**-0.5)
        self.temperature, self.mask_threshold, self.mask_gradient = temperature, mask_threshold, mask_gradient
        self.mask_applied, self.mask_given = mask_applied, mask_given
        self.classifier, self.raw_similarity = classifier, raw_similarity

    def forward(self, features: Tensor, text: Tensor, given_mask: Tensor | None = None) -> Outputs:
        """Features (B, T, D) and text features (K, C), from ``self.text``, → :class:`Outputs`.

        Args:
            given_mask: (B, T) of 0 and 1, the ground truth's foreground in place of L: an oracle.

        Raises:
            StaleError: the model was trained with ground-truth masks and is given none.
        """
        if self.mask_given and given_mask is None:
            raise StaleError("model.masking.kind=gt needs the ground truth of every video; these have none")
        visual = self.embed_visual(features)  # B × T × C
        language = unadapted = self.embed_language(text)  # K+1 × C

        foreground_logits = None if self.masking is None else self.masking(visual)  # B × T
        mask = self._mask(visual, foreground_logits, given_mask)  # B × T

        if self.adaptation is None:
            language = language.expand(len(visual), -1, -1)
        else:
            language = self.adaptation(language, visual * mask.unsqueeze(-1))  # B × K+1 × C
        evidence = visual if self.classifier is None else self.classifier(self._prepare(features))
        class_logits = self.classify(evidence, mask, language)
        if self.raw_similarity:
            raw = self.classify(self._prepare(features), mask, unadapted)
            class_logits = torch.lerp(class_logits, raw, self.raw_similarity)
        masks = self.localizer(visual)
        return Outputs(
            visual, class_logits, masks, foreground_logits, given_mask, evidence, language, self.temperature, text
        )

    def coarsen(self, features: Tensor) -> Tensor:
        """(B, n·T, D) → (B, T, D), the means of n snippets each; what has T snippets already stays as it is."""
        B, length, D = features.shape
        T = self.localizer.num_snippets
        return features if length == T else features.reshape(B, T, length // T, D).mean(2)

    def read_foreground(self, features: Tensor) -> Tensor:
        """L (B, T') of features (B, T', D) at any number of snippets T'; the masking must not be ``none`` or ``gt``."""
        return self.masking(self.embed_visual(features)).float().sigmoid()

    def compare_video(self, features: Tensor, text: Tensor) -> Tensor:
        """Cosine (B, K) of a video's mean feature, before any context, and each class's text features.

        What is trained on snippets pulls features and text towards the seen classes; this comparison stays as open
        as CLIP's (ours).
        """
        with torch.autocast(features.device.type, enabled=False):
            video = F.normalize(self.projection(features.float()), dim=-1).mean(1)
            return F.normalize(video, dim=-1) @ F.normalize(text.float(), dim=-1).T

    def _mask(self, visual: Tensor, foreground_logits: Tensor | None, given_mask: Tensor | None) -> Tensor:
        """The factor on the features (B, T)."""
        if not self.mask_applied or (foreground_logits is None and given_mask is None):
            return torch.ones_like(visual[..., 0])
        if given_mask is not None:
            return given_mask.to(visual.dtype)
        return apply_threshold(foreground_logits.sigmoid(), self.mask_threshold, self.mask_gradient)

    def embed_visual(self, features: Tensor) -> Tensor:
        """F_vis (B, T, C): features on the unit sphere, as CLIP compares them, scaled to unit variance, in context."""
        return self.temporal(self._prepare(features))

    def _prepare(self, features: Tensor) -> Tensor:
        x = self.projection(features)
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5

    def embed_language(self, text: Tensor) -> Tensor:
        """F_lan (K+1, C): unit-length text features with the background embedding put last."""
        return F.normalize(torch.cat([text, self.background[None]]), dim=-1)

    def classify(self, visual: Tensor, mask: Tensor, language: Tensor) -> Tensor:
        """Logits (B, K+1, T): cosine of F_fg = F_vis · mask and F_lan' over the temperature.

        The mask multiplies the cosine instead of the features: the same for a binary mask, whose masked snippets
        have cosine 0, and the one place where a soft mask is not undone by the normalisation.
        """
        with torch.autocast(visual.device.type, enabled=False):  # bfloat16 would round logits near 1 / τ to 0.5
            cosine = F.normalize(language.float(), dim=-1) @ F.normalize(visual.float(), dim=-1).transpose(1, 2)
            return cosine * mask.float().unsqueeze(1) / self.temperature


def name_pooled(pooled: Tensor, language: Tensor, temperature: float) -> Tensor:
    """Logits (B, M, K) of M pooled features a video (B, M, C), whatever their length, and language (B, K, C)."""
    with torch.autocast(pooled.device.type, enabled=False):  # as in Stale.classify
        cosine = F.normalize(pooled.float(), dim=-1) @ F.normalize(language.float(), dim=-1).transpose(1, 2)
        return cosine / temperature
