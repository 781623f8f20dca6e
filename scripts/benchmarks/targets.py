"""Training targets, snippet by snippet, instance by instance: what :func:`stale.training.targets.build_targets` equals.

T snippets, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stale.data.dataset import IGNORED
from stale.training.targets import Targets

Row = tuple[float, float, int]  # start, end in snippets, label


def plain_targets(rows: Sequence[Row], num_classes: int, num_snippets: int, center: float = 1.0) -> Targets:
    """One video's targets, without the dimension of the batch."""
    classes = torch.zeros(num_classes + 1, num_snippets)
    masks = torch.zeros(num_snippets, num_snippets, dtype=torch.bool)
    foreground = torch.zeros(num_snippets, dtype=torch.bool)
    answering = torch.zeros(num_snippets, dtype=torch.bool)
    valid = torch.zeros(num_snippets, dtype=torch.bool)
    for t in range(num_snippets):
        around = [row for row in rows if t in snippets_of(row, num_snippets)]
        known = [row for row in around if row[2] >= 0]
        foreground[t] = bool(known)
        valid[t] = bool(known) or not any(row[2] == IGNORED for row in around)
        known = [row for row in known if t in snippets_of(central(row, center), num_snippets)]
        answering[t] = bool(known)
        labels = {row[2] for row in known} or {num_classes}  # the background comes last
        for label in labels:
            classes[label, t] = 1 / len(labels)
        if known:
            own = min(known, key=lambda row: row[1] - row[0])  # the first of the shortest
            for s in snippets_of(own, num_snippets):
                masks[s, t] = True
    return Targets(classes, masks, foreground, answering, valid)


def central(row: Row, share: float) -> Row:
    """The part of an instance around its middle."""
    start, end, label = row
    cut = (end - start) * (1 - share) / 2
    return start + cut, end - cut, label


def snippets_of(row: Row, num_snippets: int) -> list[int]:
    """The snippets whose centres an instance contains; of one too short for any, the snippet at its middle."""
    start, end, _ = row
    covered = [t for t in range(num_snippets) if start <= t + 0.5 < end]
    return covered or [min(max(math.floor((start + end) / 2), 0), num_snippets - 1)]
