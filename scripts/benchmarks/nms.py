"""SoftNMS: many videos at once against pandas tables, a class and a candidate after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scripts.benchmarks.rows import Row, best_of, clock_of, require_equal
from stale.config import DetectionConfig
from stale.detection.soft_nms import soft_nms

_CLASSES = 5  # in a video's candidates


def bench(scale: float, device: torch.device) -> Iterator[Row]:
    """150 candidates a video, of five classes: one video, and 256 at once."""
    M = max(int(150 * scale), 10)
    yield _compare("nms: one video", 1, M, device, 20)
    B = max(int(256 * scale), 2)
    yield _compare(f"nms: {B} videos at once", B, M, device, 3)


@torch.inference_mode()
def _compare(name: str, B: int, M: int, device: torch.device, repeats: int) -> Row:
    options, clock = DetectionConfig(), clock_of(device)
    settings = (options.nms_sigma, options.max_detections)
    segments, scores, labels = (x.to(device) for x in random_candidates(B, M))
    picked, lowered = soft_nms(segments, scores, labels, *settings)
    tables = list(map(as_table, segments.cpu(), scores.cpu(), labels.cpu()))[: max(B // 8, 1)]
    for video, table in enumerate(tables):
        plain = plain_soft_nms(table, *settings)
        require_equal("nms: scores", lowered[video].cpu(), plain["score"], 1e-5)
        require_equal("nms: candidates", picked[video].cpu(), plain["candidate"])
    measured = best_of(lambda: [plain_soft_nms(table, *settings) for table in tables], repeats, clock)
    ours = best_of(lambda: soft_nms(segments, scores, labels, *settings), repeats + 5, clock)
    size = f"{M} candidates of {_CLASSES} classes, {picked.shape[1]} picks"
    if len(tables) < B:
        size += f"; plain: {len(tables)} videos, scaled up"
    return Row(name, measured * B / len(tables), ours, size)


def random_candidates(B: int, M: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Segments (B, M, 2) between snippets, falling scores (B, M) and labels (B, M)."""
    generator = torch.Generator().manual_seed(seed)
    segments = (100 * torch.rand(B, M, 2, generator=generator)).floor().sort(2).values
    segments[..., 1] += 1
    scores = torch.rand(B, M, generator=generator).sort(1, descending=True).values
    return segments, scores, torch.randint(0, _CLASSES, (B, M), generator=generator)


def as_table(segments: Tensor, scores: Tensor, labels: Tensor) -> pd.DataFrame:
    """One video's candidates (M, 2), (M), (M) with the columns of :func:`plain_soft_nms`."""
    start, end = segments.double().numpy().T
    return pd.DataFrame({"label": labels.numpy(), "start": start, "end": end, "score": scores.double().numpy()})


def plain_soft_nms(candidates: pd.DataFrame, sigma: float, max_detections: int) -> pd.DataFrame:
    """Bodla et al. 2017, figure 2, with the Gaussian penalty, for each class of one video, as released codes write it.

    Args:
        candidates: columns label, start, end, score.

    Returns:
        The best, by falling score, with the lowered score and the index in ``candidates`` as ``candidate``.
    """
    kept = [_plain_of_class(table, sigma) for _, table in candidates.groupby("label")]
    ranked = pd.concat(kept).sort_values(["score", "candidate"], ascending=[False, True])
    return ranked.head(max_detections).reset_index(drop=True)


def _plain_of_class(table: pd.DataFrame, sigma: float) -> pd.DataFrame:
    candidate, start, end, score = (list(table.index), *(list(table[name]) for name in ("start", "end", "score")))
    rows = []
    while score:
        best = int(np.argmax(score))
        picked = [values.pop(best) for values in (candidate, start, end, score)]
        rows.append((table["label"].iloc[0], *picked))
        tiou = _plain_tiou(picked[1], picked[2], np.array(start), np.array(end))
        for other in range(len(score)):
            if tiou[other] > 0:
                score[other] = score[other] * np.exp(-np.square(tiou[other]) / sigma)
    return pd.DataFrame(rows, columns=["label", "candidate", "start", "end", "score"])


def _plain_tiou(start: float, end: float, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    overlap = np.maximum(np.minimum(end, ends) - np.maximum(start, starts), 0.0)
    union = (end - start) + (ends - starts) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
