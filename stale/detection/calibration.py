"""Calibration, for ``detection.classify_by=calibrated`` [ours] (N instances, K seen classes, M proposals)."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stale.config import DetectionConfig
from stale.data.dataset import VideoDataset
from stale.detection.decode import SOURCES, decode, similarities
from stale.detection.run import ClassFeatures, predict
from stale.detection.soft_nms import tiou
from stale.model.stale import Outputs, Stale

_LARGEST = 1000.0  # of a weight; classes that are told apart without an error would have it infinite
_BEST = 50  # proposals of a video and source that count
_HIT = 0.5  # tIoU from which a proposal is an instance
_LEAST = 1e-3  # scale of a source without one, whose proposals must keep their order


@torch.no_grad()
def calibrate(model: Stale, data: VideoDataset, classes: ClassFeatures, options: DetectionConfig) -> None:
    """Fit ``model.class_weights`` and ``model.quality_scales`` to the instances in ``data``, which are training videos.

    The weights (2,) of :func:`stale.detection.decode.similarities` maximize the likelihood of the instances' classes,
    at their true segments; each video counts the same. The scale of a source is the least-squares factor from the
    scores of its best proposals to whether they are instances of their class, whatever sources ``options`` name.
    """
    model.eval()

    def videos() -> Iterator[tuple[Outputs, Tensor, Tensor]]:
        """The outputs of each video, and its instances: segments (G, 2) in snippets, labels (G,)."""
        for row, video in enumerate(data.videos):
            features, known = data.features[row][None].float(), data.labels[row] >= 0
            outputs = predict(model, [video], features, classes, options=options)
            outputs = replace(outputs, quality_scales=torch.ones(len(SOURCES)))
            yield outputs, data.segments[row][known], data.labels[row][known]

    found, given, shares = [], [], []
    for outputs, segments, labels in videos():
        found.append(similarities(outputs, segments[None])[0].cpu())
        given.append(labels.cpu())
        shares.append(torch.full((len(labels),), 1 / max(len(labels), 1)))
    model.class_weights.copy_(_fit_class_weights(torch.cat(found), torch.cat(given), torch.cat(shares)))

    sums = torch.zeros(len(SOURCES), 2, dtype=torch.double)  # of score · hit, and of score²
    for outputs, segments, labels in videos():
        masks = None if outputs.foreground is None else outputs.mask_logits
        parts = zip(SOURCES, (masks, outputs.foreground_logits, outputs.points, outputs.text), strict=True)
        for source in [source for source, part in parts if part is not None and len(labels)]:
            best = decode(outputs, options.model_copy(update={"proposals": [source]}))  # by falling score
            score, label = best.scores[0, :_BEST], best.labels[0, :_BEST]
            near = tiou(best.segments[0, :_BEST], segments) >= _HIT  # M × G
            hit = (near & (label.unsqueeze(1) == labels)).any(1)
            sums[SOURCES.index(source)] += torch.stack([score * hit, score.square()]).double().sum(1).cpu()
    model.quality_scales.copy_(torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], 1.0).clamp(min=_LEAST))


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
