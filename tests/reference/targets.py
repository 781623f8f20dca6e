"""Training targets as loops over snippets and instances. T snippets, K classes."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from stale.data.dataset import IGNORED
from stale.training.targets import _ROUNDS, Targets

Row = tuple[float, float, int]  # start, end in snippets, label


def plain_targets(rows: Sequence[Row], num_classes: int, num_snippets: int) -> Targets:
    """Build one video's targets, without the batch dimension."""
    classes = torch.zeros(num_classes + 1, num_snippets)
    masks = torch.zeros(num_snippets, num_snippets, dtype=torch.bool)
    foreground = torch.zeros(num_snippets, dtype=torch.bool)
    valid = torch.zeros(num_snippets, dtype=torch.bool)
    unambiguous = torch.zeros(num_snippets, dtype=torch.bool)
    owner = plain_owners(rows, num_snippets)
    for t in range(num_snippets):
        around = [row for row in rows if t in snippets_of(row, num_snippets)]
        known = [row for row in around if row[2] >= 0]
        foreground[t] = bool(known)
        unambiguous[t] = not any(row[2] == IGNORED for row in around)
        valid[t] = bool(known) or bool(unambiguous[t])
        labels = {row[2] for row in known} or {num_classes}  # the background comes last
        for label in labels:
            classes[label, t] = 1 / len(labels)
        if known:
            masks[snippets_of(rows[owner[t]], num_snippets), t] = True
    return Targets(classes=classes, masks=masks, foreground=foreground, valid=valid, unambiguous=unambiguous)


def plain_owners(rows: Sequence[Row], num_snippets: int) -> dict[int, int]:
    """Assign an instance to each foreground snippet: snippet → index into ``rows``."""
    covered = {n: snippets_of(row, num_snippets) for n, row in enumerate(rows) if row[2] >= 0}
    owner = {}
    for t in range(num_snippets):
        around = [n for n, snippets in covered.items() if t in snippets]
        if around:
            owner[t] = min(around, key=lambda n: rows[n][1] - rows[n][0])  # the first of the shortest
    for _ in range(_ROUNDS):
        before, owned = dict(owner), Counter(owner.values())
        asked = set()
        for n, snippets in covered.items():
            free = [] if owned[n] else [t for t in snippets if owned[before[t]] > 1]
            if free:
                middle = (rows[n][0] + rows[n][1]) / 2
                nearest = min(free, key=lambda t: abs(t + 0.5 - middle))
                if before[nearest] not in asked:
                    owner[nearest] = n
                asked.add(before[nearest])
    return owner


def snippets_of(row: Row, num_snippets: int) -> list[int]:
    """Return the snippets whose centers an instance contains; if there are none, the snippet at its middle."""
    start, end, _ = row
    covered = [t for t in range(num_snippets) if start <= t + 0.5 < end]
    return covered or [min(max(math.floor((start + end) / 2), 0), num_snippets - 1)]
