"""The four losses L_c, L_m, L_comp, L_const and their weighted sum (stale/README.md, "Losses").

B videos, T snippets, C joint width, K seen classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stale import distributed
from stale.config import LossConfig
from stale.errors import StaleError
from stale.model.localizer import in_parts
from stale.model.stale import Outputs, classify_pooled
from stale.training.targets import Targets


@dataclass(frozen=True)
class LossNormalizers:
    """Counts of the batch, of all processes together, by which the means in the losses divide: scalar tensors."""

    own: float | None  # how often this process counts in the whole batch; None: the counts are of this process alone
    videos: Tensor  # B
    valid: Tensor  # snippets
    foreground: Tensor  # snippets
    inside: Tensor  # entries of the masks at valid snippets, inside their instances
    outside: Tensor  # and outside
    instances: Tensor  # with at least one snippet of their own
    points: Tensor  # positive points

    @classmethod
    def of(cls, targets: Targets) -> "LossNormalizers":
        """The counts of ``targets``."""
        valid = targets.valid
        videos = valid.new_full((), len(valid), dtype=torch.long)
        inside = outside = instances = torch.zeros_like(videos)
        if targets.masks is not None:
            in_columns = (targets.masks & valid.unsqueeze(2)).sum(1)  # B × T
            inside, instances = (in_columns * valid).sum(), _instance_weights(targets).sum()
            outside = valid.sum(1).square().sum() - inside
        points = torch.zeros_like(videos) if targets.points is None else targets.points.positive.sum()
        counts = {"inside": inside, "outside": outside, "instances": instances, "points": points}
        return cls(None, videos, valid.sum(), targets.foreground.sum(), **counts)

    def over_processes(self, weight: float = 1.0) -> "LossNormalizers":
        """The sum over all processes, in one exchange. This process counts ``weight`` times."""
        if distributed.world_size() == 1:
            return self
        counts = [value.double() for value in list(vars(self).values())[1:]]  # float32 is exact up to 2**24 only
        return LossNormalizers(weight, *distributed.all_reduce(weight * torch.stack(counts)).float().unbind())


def total_loss(
    outputs: Outputs, targets: Targets, normalizers: LossNormalizers, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = w_c L_c + w_m L_m + w_comp L_comp + w_const L_const, and each loss of weight above 0 by name."""
    losses = {}
    parts = {  # each loss, and the output without which there is none
        "classification": (classification_loss, outputs.class_logits),
        "localization": (localization_loss, outputs.mask_logits),
        "consistency": (consistency_loss, outputs.mask_logits),
        "foreground": (foreground_loss, outputs.foreground_logits),
        "points": (points_loss, outputs.points),
    }
    for name, (loss, output) in parts.items():
        if getattr(config, name) and output is not None:
            losses[name] = loss(outputs, targets, normalizers, config)
    if not losses:
        raise StaleError("no loss is left to train with: give one a weight above 0 (loss.classification, ...)")
    return torch.stack([getattr(config, name) * loss for name, loss in losses.items()]).sum(), losses


def classification_loss(outputs: Outputs, targets: Targets, normalizers: LossNormalizers, config: LossConfig) -> Tensor:
    """L_c, the cross-entropy of each unambiguous snippet that passes the mask, with y the target distribution:

        L_c = mean over t of  - Σ_k y[k, t] log P[k, t]

    ``focal`` weighs the terms by (1 - P[k, t])² (Lin et al., ICCV 2017), ``batch_focal`` the mean L by (1 - exp(-L))²
    [C]. ``pooled`` classifies whole instances. ``sigmoid`` is the sum over the K classes of the binary cross-entropy of
    :attr:`Outputs.probabilities`, also at snippets of a seen and another class [ours]. ``classification_video`` adds
    the loss of F_fg pooled over the video, against the classes of its foreground [C].
    """
    form, loss = config.classification_form, outputs.class_logits.new_zeros(())
    if form == "pooled":
        return _pooled_classification_loss(outputs, targets, normalizers)
    if config.classification_snippets:
        counted = targets.valid if form == "sigmoid" else targets.unambiguous
        passing = counted if outputs.mask is None else counted & (outputs.mask > 0)
        loss = _classification_mean(outputs.class_logits, targets.classes, passing, normalizers, form=form)
        loss = config.classification_snippets * loss
    if config.classification_video:
        assert outputs.video_logits is not None  # optional for detection only
        classes = (targets.classes[:, :-1] * targets.foreground.unsqueeze(1)).sum(2)  # B × K
        classes = classes / classes.sum(1, keepdim=True).clamp(min=1)
        labeled = targets.foreground.any(1)
        video = _classification_mean(outputs.video_logits, classes, labeled, normalizers, form=form)
        loss = loss + config.classification_video * video
    return loss


def _classification_mean(
    logits: Tensor, target: Tensor, mask: Tensor, normalizers: LossNormalizers, *, form: str
) -> Tensor:
    """Mean cross-entropy over the classes of logits and target (B, classes, ...) at ``mask`` (B, ...)."""
    count = mask.sum() if normalizers.own is None else distributed.all_reduce(normalizers.own * mask.sum())
    if form == "sigmoid":
        margin, positive = logits[:, :-1].float() - logits[:, -1:].float(), (target[:, :-1] > 0).float()
        return _masked_mean(F.binary_cross_entropy_with_logits(margin, positive, reduction="none").sum(1), mask, count)
    log_p = logits.float().log_softmax(1)
    weight = (1 - log_p.exp()).square() if form == "focal" else 1.0
    mean = _masked_mean(-(target * weight * log_p).sum(1), mask, count)
    if form != "batch_focal":
        return mean
    if distributed.world_size() > 1:  # the mean here is this process's part
        raise StaleError("loss.classification_form=batch_focal needs the whole batch: train in one process")
    return (1 - (-mean).exp()).square() * mean


def _pooled_classification_loss(outputs: Outputs, targets: Targets, normalizers: LossNormalizers) -> Tensor:
    """Cross-entropy over the K classes of features pooled over each instance, as in EffPrompt; no background."""
    assert outputs.classifier_features is not None and outputs.language is not None  # optional for detection only
    assert targets.masks is not None
    features = outputs.classifier_features.float()  # B × T × C
    pooled = (features.transpose(1, 2) @ targets.masks.float()).transpose(1, 2)  # the instance of each snippet
    logits = classify_pooled(pooled, outputs.language[:, :-1], outputs.temperature)  # B × T × K
    entropy = F.cross_entropy(logits.transpose(1, 2), targets.classes[:, :-1], reduction="none")  # B × T
    return _masked_mean(entropy, _instance_weights(targets), normalizers.instances)


def localization_loss(outputs: Outputs, targets: Targets, normalizers: LossNormalizers, config: LossConfig) -> Tensor:
    """L_m, with G[s, t] the target masks and M[s, t] the predicted ones [U], t the foreground snippets:

        L_m = mean over t of  μ ½ (mean of BCE(M[:, t], G[:, t]) where G = 1  +  mean where G = 0)
              +  λ · mean over t of (1 - Dice(M[:, t], G[:, t]))

    μ is ``config.bce`` and λ ``config.dice``. The BCE is balanced in every column [ours], or over ``all`` pairs [U].
    """
    assert outputs.mask_logits is not None and targets.masks is not None  # without masks there is no such loss
    logits, valid, foreground = outputs.mask_logits.float(), targets.valid, targets.foreground
    inside, loss = targets.masks & valid.unsqueeze(2), logits.new_zeros(())  # B × T × T
    if config.bce:
        within, beyond = in_parts(_column_entropy, logits, inside, valid).unbind(1)  # each B × T
        if config.localization_balance == "column":
            count = inside.sum(1)
            means = within / count.clamp(min=1) + beyond / (valid.sum(1, keepdim=True) - count).clamp(min=1)
            bce = _masked_mean(means, foreground, normalizers.foreground)
        else:
            bce = _masked_mean(within, valid, normalizers.inside) + _masked_mean(beyond, valid, normalizers.outside)
        loss = loss + config.bce * bce / 2
    if config.dice:
        dice = in_parts(lambda x, G, valid: _dice(x.sigmoid() * valid.unsqueeze(2), G), logits, inside, valid)  # B × T
        loss = loss + config.dice * _masked_mean(1 - dice, foreground, normalizers.foreground)
    return loss


def _column_entropy(logits: Tensor, inside: Tensor, valid: Tensor) -> Tensor:
    """(B, 2, T), the sums over the valid snippets of each column's binary cross-entropy inside and outside."""
    entropy = F.binary_cross_entropy_with_logits(logits, inside.float(), reduction="none")
    return torch.stack([(entropy * inside).sum(1), (entropy * (valid.unsqueeze(2) & ~inside)).sum(1)], 1)


def foreground_loss(outputs: Outputs, targets: Targets, normalizers: LossNormalizers, config: LossConfig) -> Tensor:
    """L_comp = 1 - Dice(L, foreground), per video [U]; ``bce``: of all snippets [C]; ``dice_bce``: their sum [ours]."""
    assert outputs.foreground_logits is not None  # without a mask there is no such loss
    logits, foreground, valid = outputs.foreground_logits.float(), targets.foreground.float(), targets.valid  # B × T
    loss = logits.new_zeros(())
    if config.foreground_form in ("dice", "dice_bce"):
        dice = _dice(logits.sigmoid() * valid, foreground)  # B
        loss = loss + (1 - dice).sum() / normalizers.videos
    if config.foreground_form in ("bce", "dice_bce"):
        entropy = F.binary_cross_entropy_with_logits(logits, foreground, reduction="none")
        loss = loss + _masked_mean(entropy, valid, normalizers.valid)
    return loss


def points_loss(outputs: Outputs, targets: Targets, normalizers: LossNormalizers, config: LossConfig) -> Tensor:
    """The point head's loss, each term divided by the number of positive points [ours]:

        focal loss of the actionness  +  Σ over positive points of (1 - DIoU)  +  Σ of BCE(predicted tIoU, tIoU)

    Focal loss has α = 0.25, γ = 2; DIoU is tIoU less (distance of the centers / length of the hull)².
    """
    points, goal = outputs.points, targets.points
    assert points is not None and goal is not None
    positive, count = goal.positive.float(), normalizers.points
    logits, p = points.actionness, points.actionness.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    missed = torch.where(goal.positive, 0.25 * (1 - p).square(), 0.75 * p.square())
    focal = _masked_mean(missed * entropy, goal.valid, count)

    predicted, true = points.distances, goal.distances.clamp(min=0)  # B × P × 2; both segments contain the point
    overlap = torch.minimum(predicted, true).sum(2)
    tiou = overlap / (predicted.sum(2) + true.sum(2) - overlap).clamp(min=1e-6)
    shift = (predicted - true).diff().squeeze(2) / 2  # of the centers
    diou = tiou - (shift / torch.maximum(predicted, true).sum(2).clamp(min=1e-6)).square()
    quality = F.binary_cross_entropy_with_logits(points.tiou, tiou.detach().clamp(0, 1), reduction="none")
    return focal + _masked_mean(1 - diou + quality, goal.positive, count)


def consistency_loss(outputs: Outputs, targets: Targets, normalizers: LossNormalizers, config: LossConfig) -> Tensor:
    """L_const, between the features that the classifier and the localizer select, per video [U]:

        L_const = 1 - cos(f_clf, f_mask)
        f_clf   = Σ_{t in S}          p[t] · F_vis[t]        p[t] = max_k P[k, t] without the background, 0 below θ
        f_mask  = Σ_{t in S}  Σ_s  M[s, t] · F_vis[s]        M[s, t] = 0 below θ

    S holds the ``consistency_snippets`` valid snippets with the highest p, and θ is ``consistency_threshold``. Gradient
    reaches both heads, or with ``consistency_gradient=visual`` only F_vis [C]. ``consistency_centered`` takes F_vis
    less its mean over the valid snippets, and a distance of 0 where nothing is above θ [ours].
    """
    assert outputs.mask_logits is not None  # without masks there is no such loss
    probabilities, mask_logits = outputs.probabilities, outputs.mask_logits.float()
    if config.consistency_gradient == "visual":
        probabilities, mask_logits = probabilities.detach(), mask_logits.detach()
    visual, valid = outputs.visual.float(), targets.valid  # B × T × C, B × T
    if config.consistency_centered:
        share = valid / valid.sum(1, keepdim=True).clamp(min=1)  # B × T
        visual = visual - share.unsqueeze(1) @ visual
    T, threshold = valid.shape[1], config.consistency_threshold

    # f_clf: the top-scoring foreground snippets of P
    scores = (probabilities if config.consistency_background else probabilities[:, :-1]).amax(1) * valid  # B × T
    p, S = scores.topk(min(config.consistency_snippets, T), dim=1)  # B × |S|
    weights = torch.zeros_like(scores).scatter(1, S, p * (p > threshold))
    f_clf = (weights.unsqueeze(1) @ visual).squeeze(1)  # B × C; a cosine needs no mean

    # f_mask: the masks that the same snippets predict
    masks = mask_logits.gather(2, S.unsqueeze(1).expand(-1, T, -1)).sigmoid()  # B × T × |S|
    masks = masks * (valid.unsqueeze(2) & valid.gather(1, S).unsqueeze(1))
    weights = (masks * (masks > threshold)).sum(2)  # B × T
    f_mask = (weights.unsqueeze(1) @ visual).squeeze(1)

    distance = 1 - F.cosine_similarity(f_clf, f_mask, dim=1)  # B; 1 where one of them is 0
    if config.consistency_centered:
        distance = distance * f_clf.any(1) * f_mask.any(1)
    return distance.sum() / normalizers.videos


def _dice(predicted: Tensor, target: Tensor) -> Tensor:
    """Dice coefficient along dimension 1. That of two empty masks is 1."""
    overlap = (predicted * target).sum(1)
    return (2 * overlap + 1) / (predicted.sum(1) + target.sum(1) + 1)


def _instance_weights(targets: Targets) -> Tensor:
    """(B, T), weights of the unambiguous snippets, which over an instance that overlaps no other sum to 1."""
    assert targets.masks is not None
    return (targets.foreground & targets.unambiguous) / targets.masks.sum(1).clamp(min=1)


def _masked_mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Mean of ``values`` at ``mask``, which has ``count`` elements in the whole batch; 0 if there are none."""
    # Indexing by the mask would wait for a GPU.
    return (values * mask).sum() / count.clamp(min=1)
