"""The four objectives (section 7), each a plain function, and their weighted sum.

B videos, T snippets, C joint width, K classes of the (seen) vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stale import parallel
from stale.errors import StaleError
from stale.model.stale import Outputs, name_pooled
from stale.training.targets import Targets


@dataclass(frozen=True)
class Sizes:
    """How much there is of what the losses are means of: what they divide by, each a tensor of no dimension.

    A process that has only a share of a batch divides by the whole batch's sizes: then the processes' losses, and their
    gradients, add up to those of the batch.

    Attributes:
        videos: B.
        valid, answering: snippets; those that answer for an instance.
        inside, outside: places of masks, valid ones.
        instances: that have a snippet of their own.
    """

    videos: Tensor
    valid: Tensor
    answering: Tensor
    inside: Tensor
    outside: Tensor
    instances: Tensor

    @classmethod
    def of(cls, targets: Targets) -> Sizes:
        """The sizes of what is here."""
        answering, valid, pairs = targets.answering, targets.valid, _valid_pairs(targets)
        inside = (targets.masks & pairs).sum()
        sums = valid.sum(), answering.sum(), inside, pairs.sum() - inside, _instance_weight(targets).sum()
        return cls(valid.new_full((), len(valid), dtype=torch.long), *sums)

    def over_processes(self, weight: float = 1.0) -> Sizes:
        """The sum over all processes, this one's times ``weight``, in one exchange."""
        if parallel.size() == 1:
            return self
        counts = torch.stack([value.double() for value in vars(self).values()])  # float32 counts to 16 million only
        return Sizes(*parallel.total(weight * counts).float().unbind())


@dataclass(frozen=True)
class Criterion:
    """The losses of a batch.

    Attributes:
        weights: loss name → weight in the sum; a weight of 0 leaves the loss out.
        dice: weight of 1 - Dice inside the localization loss.
        foreground_form: see :func:`foreground_loss`.
        consistency_snippets, consistency_threshold, consistency_gradient: see :func:`consistency_loss`.
        classification_form: ``cross_entropy``, ``focal`` (released code) or ``pooled`` (of whole instances).
        anchor: text features (K, C) that the classes' must stay near; None: they may go anywhere.
    """

    weights: Mapping[str, float]
    dice: float = 0.4
    foreground_form: str = "dice"
    consistency_snippets: int = 10
    consistency_threshold: float = 0.5
    consistency_gradient: str = "both"
    classification_form: str = "cross_entropy"
    anchor: Tensor | None = None

    def __call__(
        self, outputs: Outputs, targets: Targets, sizes: Sizes | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every loss by name, unweighted.

        Args:
            sizes: of the whole batch, where ``targets`` are a share of it.

        Raises:
            StaleError: no loss with a weight is left.
        """
        sizes = sizes or Sizes.of(targets)
        losses = {
            "classification": self._classification(outputs, targets, sizes),
            "localization": localization_loss(outputs.mask_logits, targets, self.dice, sizes),
            "consistency": consistency_loss(
                outputs,
                targets,
                self.consistency_snippets,
                self.consistency_threshold,
                self.consistency_gradient,
                sizes,
            ),
        }
        if outputs.foreground_logits is not None:
            losses["foreground"] = foreground_loss(outputs.foreground_logits, targets, self.foreground_form, sizes)
        if self.anchor is not None:
            losses["anchor"] = anchor_loss(outputs.text, self.anchor) * len(targets.valid) / sizes.videos
        losses = {name: loss for name, loss in losses.items() if self.weights[name] > 0}
        if not losses:
            raise StaleError("no loss is left to train with: give one a weight above 0 (loss.classification, ...)")
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum(), losses

    def _classification(self, outputs: Outputs, targets: Targets, sizes: Sizes) -> Tensor:
        if self.classification_form == "pooled":
            return pooled_classification_loss(outputs, targets, sizes)
        if self.classification_form == "focal":
            return focal_loss(outputs.class_logits, targets, sizes)
        return classification_loss(outputs.class_logits, targets, sizes)


# Each takes the sizes of the whole batch where its own videos are a share of it; None: they are the batch.


def classification_loss(class_logits: Tensor, targets: Targets, sizes: Sizes | None = None) -> Tensor:
    """Cross-entropy over the valid snippets, K+1 ways; logits (B, K+1, T)."""
    entropy = F.cross_entropy(class_logits.float(), targets.classes, reduction="none")  # B × T
    return _mean_where(entropy, targets.valid, (sizes or Sizes.of(targets)).valid)


def focal_loss(class_logits: Tensor, targets: Targets, sizes: Sizes | None = None) -> Tensor:
    """Cross-entropy in which a class of probability p weighs (1 - p)² (Lin et al., ICCV 2017; released code)."""
    log_p = class_logits.float().log_softmax(1)
    focal = -(targets.classes * (1 - log_p.exp()).square() * log_p).sum(1)  # B × T
    return _mean_where(focal, targets.valid, (sizes or Sizes.of(targets)).valid)


def pooled_classification_loss(outputs: Outputs, targets: Targets, sizes: Sizes | None = None) -> Tensor:
    """Cross-entropy over the K classes of instances pooled in time, each instance counted once (EffPrompt's way).

    An instance's evidence is the mean over its own snippets; where instances overlap, the shortest has the snippet.
    """
    inside = targets.masks.float()  # [:, s, t]: place s belongs to the instance of snippet t
    pooled = outputs.evidence.float().transpose(1, 2) @ inside  # B × C × T
    logits = name_pooled(pooled.transpose(1, 2), outputs.language[:, :-1], outputs.temperature)  # B × T × K
    classes = targets.classes[:, :-1]
    entropy = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")  # B × T
    return _mean_where(entropy, _instance_weight(targets), (sizes or Sizes.of(targets)).instances)


def localization_loss(mask_logits: Tensor, targets: Targets, dice_weight: float, sizes: Sizes | None = None) -> Tensor:
    """Class-balanced BCE over all masks plus ``dice_weight`` × (1 - Dice) of the foreground columns.

    Balanced: the places inside instances and those outside weigh the same in sum. Logits (B, T, T).
    """
    logits, inside, sizes = mask_logits.float(), targets.masks, sizes or Sizes.of(targets)
    valid = _valid_pairs(targets)
    entropy = F.binary_cross_entropy_with_logits(logits, inside.float(), reduction="none")
    of_inside = _mean_where(entropy, inside & valid, sizes.inside)
    balanced = (of_inside + _mean_where(entropy, ~inside & valid, sizes.outside)) / 2
    dice = _dice(logits.sigmoid() * valid, (inside & valid).float(), dim=1)  # B × T columns
    return balanced + dice_weight * _mean_where(1 - dice, targets.answering, sizes.answering)


def foreground_loss(
    foreground_logits: Tensor, targets: Targets, form: str = "dice", sizes: Sizes | None = None
) -> Tensor:
    """``dice``: 1 - Dice between L and the class-agnostic foreground, a video; ``bce``; or ``dice_bce``, their sum.

    Logits (B, T).
    """
    logits, foreground, valid = foreground_logits.float(), targets.foreground.float(), targets.valid
    sizes = sizes or Sizes.of(targets)
    loss = logits.new_zeros(())
    if form != "bce":
        dice = _dice(logits.sigmoid() * valid, foreground, dim=1)  # B
        loss = loss + (1 - dice).sum() / sizes.videos
    if form != "dice":
        entropy = F.binary_cross_entropy_with_logits(logits, foreground, reduction="none")
        loss = loss + _mean_where(entropy, valid, sizes.valid)
    return loss


def consistency_loss(
    outputs: Outputs,
    targets: Targets,
    snippets: int,
    threshold: float,
    gradient: str = "both",
    sizes: Sizes | None = None,
) -> Tensor:
    """1 - cos between what the classifier and the localizer pool from F_vis, the mean over videos.

    The classifier pools its top-scoring foreground snippets above ``threshold``, the localizer the thresholded masks
    of the same snippets, both among the valid ones. What passes the threshold keeps its score as its weight: so both
    branches get gradient; ``gradient="visual"`` keeps it from their scores, so that F_vis alone gets any (released
    code).
    """
    if gradient == "visual":
        heads = {"class_logits": outputs.class_logits.detach(), "mask_logits": outputs.mask_logits.detach()}
        outputs = replace(outputs, **heads)
    valid = targets.valid
    scores = outputs.class_logits.float().softmax(1)[:, :-1].amax(1) * valid  # B × T
    top, columns = scores.topk(min(snippets, scores.shape[1]), dim=1)
    chosen = outputs.mask_logits.float().gather(2, columns.unsqueeze(1).expand(-1, scores.shape[1], -1)).sigmoid()
    chosen = chosen * (valid.unsqueeze(2) & valid.gather(1, columns).unsqueeze(1))
    by_mask = _above(chosen, threshold).sum(2)  # B × T
    by_class = torch.zeros_like(scores).scatter(1, columns, _above(top, threshold))
    visual = outputs.visual.float()
    pooled_by_class = (by_class.unsqueeze(1) @ visual).squeeze(1)  # B × C; the cosine needs no mean
    pooled_by_mask = (by_mask.unsqueeze(1) @ visual).squeeze(1)
    distance = 1 - F.cosine_similarity(pooled_by_class, pooled_by_mask, dim=1)  # B
    return distance.sum() / (sizes or Sizes.of(targets)).videos


def anchor_loss(text: Tensor, anchor: Tensor) -> Tensor:
    """1 - cos of the text features (K, C) and those that they must stay near, the mean over classes (KgCoOp)."""
    return (1 - F.cosine_similarity(text.float(), anchor, dim=1)).mean()


def _above(scores: Tensor, threshold: float) -> Tensor:
    return scores * (scores > threshold)


def _dice(predicted: Tensor, target: Tensor, dim: int) -> Tensor:
    """Dice coefficient along ``dim``; two empty masks agree."""
    overlap = (predicted * target).sum(dim)
    return (2 * overlap + 1) / (predicted.sum(dim) + target.sum(dim) + 1)


def _valid_pairs(targets: Targets) -> Tensor:
    """(B, T, T): the places of valid snippets' masks that are valid themselves."""
    return targets.valid.unsqueeze(1) & targets.valid.unsqueeze(2)


def _instance_weight(targets: Targets) -> Tensor:
    """(B, T): what a snippet counts of its instance, over whose snippets the weights sum to 1."""
    return targets.answering / targets.masks.float().sum(1).clamp(min=1)


def _mean_where(values: Tensor, where: Tensor, count: Tensor) -> Tensor:
    """Mean of ``values`` at ``where``, of which the whole batch has ``count``: 0 where there are none.

    The device is not asked how many.
    """
    return (values * where).sum() / count.clamp(min=1)
