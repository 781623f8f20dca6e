"""Training targets as loops over snippets and instances. T snippets, K classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stale.data.dataset import IGNORED
from stale.training.targets import Targets

Row = tuple[float, float, int]  # start, end in snippets, label


def plain_targets(rows: Sequence[Row], num_classes: int, num_snippets: int) -> Targets:
    """Build one video's targets, without the batch dimension."""
    classes = torch.zeros(num_classes + 1, num_snippets)
    masks = torch.zeros(num_snippets, num_snippets, dtype=torch.bool)
    foreground = torch.zeros(num_snippets, dtype=torch.bool)
    valid = torch.zeros(num_snippets, dtype=torch.bool)
    for t in range(num_snippets):
        around = [row for row in rows if t in snippets_of(row, num_snippets)]
        known = [row for row in around if row[2] >= 0]
        foreground[t] = bool(known)
        valid[t] = bool(known) or not any(row[2] == IGNORED for row in around)
        labels = {row[2] for row in known} or {num_classes}  # the background comes last
        for label in labels:
            classes[label, t] = 1 / len(labels)
        if known:
            own = min(known, key=lambda row: row[1] - row[0])  # the first of the shortest
            masks[snippets_of(own, num_snippets), t] = True
    return Targets(classes=classes, masks=masks, foreground=foreground, valid=valid)


def snippets_of(row: Row, num_snippets: int) -> list[int]:
    """Return the snippets whose centers an instance contains; if there are none, the snippet at its middle."""
    start, end, _ = row
    covered = [t for t in range(num_snippets) if start <= t + 0.5 < end]
    return covered or [min(max(math.floor((start + end) / 2), 0), num_snippets - 1)]
