"""Videos longer than ``data.max_snippets`` at their own rate: the model's outputs from overlapping windows."""

from dataclasses import replace

import torch
from torch import Tensor

from stale.model.points import PointGrid, Points
from stale.model.stale import Outputs, Stale

_ALIGNED = 32  # Windows begin at multiples of this, so that the points of the first six levels coincide.


def forward_in_windows(model: Stale, features: Tensor, text: Tensor, given_mask: Tensor | None) -> Outputs:
    """Outputs for features (B, T, D) of any length, in windows where they are longer than ``model.num_snippets``.

    Windows overlap by half, and each gives its middle half; adapted text is the mean over them.
    """
    T, step = features.shape[1], max(model.num_snippets // (4 * _ALIGNED), 1) * 2 * _ALIGNED  # half a window
    if max(model.num_snippets, 2 * step) >= T:
        return model(features, text, given_mask)
    starts = list(range(0, T - step, step))  # the last window reaches the end
    found, spans = [], []
    for start in starts:
        window = slice(start, min(start + 2 * step, T))
        found.append(model(features[:, window], text, None if given_mask is None else given_mask[:, window]))
        first = 0 if start == 0 else step // 2
        last = window.stop - start if start == starts[-1] else 3 * step // 2
        spans.append((first, last))

    def join(name: str, dim: int) -> Tensor | None:
        """The spans of a tensor whose dimension ``dim`` is time, one after the other."""
        if getattr(found[0], name) is None:
            return None
        tensors = [getattr(part, name) for part in found]
        cut = (x.narrow(dim, first, last - first) for x, (first, last) in zip(tensors, spans, strict=True))
        return torch.cat(list(cut), dim)

    names = ("visual", "class_logits", "foreground_logits", "mask", "given_mask", "classifier_features")
    joined = {name: join(name, 2 if name == "class_logits" else 1) for name in names}
    language = torch.stack([part.language for part in found if part.language is not None]).mean(0)
    return replace(found[0], **joined, language=language, points=_join_points(found, starts, spans))


def _join_points(found: list[Outputs], starts: list[int], spans: list[tuple[int, int]]) -> Points | None:
    """The points inside the windows' spans, at their positions in the whole video."""
    parts = []
    for part, start, (first, last) in zip(found, starts, spans, strict=True):
        if part.points is None:
            return None
        points, grid = part.points, part.points.grid
        kept = (grid.positions >= first) & (grid.positions < last)
        values = points.actionness[:, kept], points.distances[:, kept], points.tiou[:, kept]
        parts.append((*values, grid.positions[kept] + start, grid.strides[kept]))
    columns = (torch.cat(column, min(1, column[0].ndim - 1)) for column in zip(*parts, strict=True))
    actionness, distances, tiou, positions, strides = columns
    return Points(actionness, distances, tiou, PointGrid(positions, strides))
