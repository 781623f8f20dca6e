"""Calibration, for ``detection.classify_by=calibrated`` [ours] (N instances, K seen classes, M proposals)."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.data.dataset import VideoDataset
from stale.detection.decode import SOURCES, agnostic_proposals, similarities
from stale.detection.oracle import true_targets
from stale.detection.run import ClassFeatures
from stale.detection.soft_nms import tiou
from stale.detection.windows import forward_in_windows
from stale.model.stale import Stale

_LARGEST = 1000.0  # of a weight; classes that are told apart without an error would have it infinite
_BEST = 50  # proposals of a video and source that count
_HIT = 0.5  # tIoU from which a proposal is an instance


@torch.no_grad()
def calibrate(model: Stale, data: VideoDataset, classes: ClassFeatures, options: DetectionConfig) -> None:
    """Fit ``model.class_weights`` and ``model.quality_scales`` to the instances in ``data``.

    The weights (2,) of :func:`stale.detection.decode.similarities` maximize the likelihood of the instances' classes,
    at their true segments; each video counts the same. The scale of a source is the least-squares factor from the
    quality of its best proposals to whether they are instances. ``data`` are training videos.
    """
    model.eval()
    found, labels, shares = [], [], []
    sums = torch.zeros(len(SOURCES), 2, dtype=torch.double)  # of quality · hit, and of quality²
    for row, video in enumerate(data.videos):
        features, known = data.features[row][None].float(), data.labels[row] >= 0
        given_mask = None
        if model.mask_given:
            given_mask = true_targets([video], classes.labels, features.shape[1], features.device).foreground.float()
        outputs = forward_in_windows(model, features, classes.text, given_mask)
        outputs = replace(outputs, video_cosine=model.video_cosine(features, classes.text))
        instances = data.segments[row][known]
        found.append(similarities(outputs, instances[None])[0].cpu())
        labels.append(data.labels[row][known].cpu())
        shares.append(torch.full((len(instances),), 1 / max(len(instances), 1)))
        for source in options.proposals if len(instances) else ():
            segments, quality = (item[0, :_BEST] for item in agnostic_proposals(outputs, options, source))
            hit = tiou(segments, instances).amax(1) >= _HIT  # M
            sums[SOURCES.index(source)] += torch.stack([quality * hit, quality.square()]).double().sum(1).cpu()
    weights = _fit_class_weights(torch.cat(found), torch.cat(labels), torch.cat(shares))
    model.class_weights.copy_(weights)
    model.quality_scales.copy_(torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], 1.0))


@torch.enable_grad()
def _fit_class_weights(similarity: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """The weights (2,) of similarities (N, K, 2) that make the classes (N,) likeliest, instances weighted (N,)."""
    log_weights = torch.full((2,), 3.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = similarity @ log_weights.exp()  # N × K
        mean = (shares * F.cross_entropy(logits, labels, reduction="none")).sum() / shares.sum()
        mean.backward()
        return mean

    optimizer.step(loss)
    return log_weights.detach().exp().nan_to_num(_LARGEST).clamp(max=_LARGEST)
