"""Masks → candidates: one batch against a loop over videos, snippets, thresholds and places.

B videos, T snippets, K classes under test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.benchmarks.rows import Row, best_of, clock_of, require_equal
from stale.config import DetectionConfig
from stale.detection.decode import Candidates, decode_masks

COLUMNS = ["label", "start", "end", "score"]


@torch.inference_mode()
def bench(scale: float, device: torch.device) -> Iterator[Row]:
    """A batch of ActivityNet's size with the default settings; seconds a video."""
    options = DetectionConfig()
    B, K, T = options.batch_size, max(int(50 * scale), 2), max(int(100 * scale), 16)
    scores, masks = (x.to(device) for x in random_outputs(B, K, T))
    settings = (options.top_snippets, options.thresholds)
    of_a_video = list(zip(scores.cpu().numpy(), masks.cpu().numpy(), strict=True))
    everything = decode_masks(scores, masks, *settings, 10**6)
    for video, outputs in enumerate(of_a_video):
        require_same(as_table(everything, video), plain_decode(*outputs, *settings))
    clock = clock_of(device)
    plain = best_of(lambda: [plain_decode(*one, *settings, options.candidates) for one in of_a_video[:8]], 3, clock) / 8
    ours = best_of(lambda: decode_masks(scores, masks, *settings, options.candidates), 20, clock) / B
    size = (
        f"a video of {B} (plain: of 8), {T} snippets, {K} classes, {settings[0]} masks, {len(settings[1])} thresholds"
    )
    yield Row("decode: candidates of a video", plain, ours, size)


def random_outputs(B: int, K: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class scores (B, K, T) and masks (B, T, T) of videos with one action each, as uneven as a trained model's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centre, length = T * torch.rand(B, 1, generator=generator), 4 + 0.4 * T * torch.rand(B, 1, generator=generator)
    inside = length / 2 - (torch.arange(T) + 0.5 - centre).abs()  # B × T: snippets from the action's nearer end
    uneven = F.interpolate(normal(B, T, max(T // 8, 2)), T, mode="linear").transpose(1, 2)
    scores = (2 * normal(B, K + 1, T)).softmax(1)[:, :-1] * inside.sigmoid().unsqueeze(1)
    return scores, (0.4 * inside.unsqueeze(2) + 1.5 * uneven).sigmoid()


def plain_decode(
    scores: np.ndarray,
    masks: np.ndarray,
    top: int,
    thresholds: Sequence[float],
    max_candidates: int | None = None,
    min_length: float = 0.0,
    region_score: str = "max",
    fill_holes: bool = False,
) -> pd.DataFrame:
    """Candidates of one video by falling score, columns :data:`COLUMNS`: scores (K, T), masks (T, T)."""
    T = scores.shape[1]
    rows = []
    for pair in np.argsort(-scores, axis=None)[:top]:
        label, snippet = divmod(int(pair), T)
        curve = masks[:, snippet]
        for threshold in np.asarray(thresholds, masks.dtype):
            regions = plain_regions(curve, threshold)
            if fill_holes and regions:
                regions = [(regions[0][0], regions[-1][1])]
            for start, end in regions:
                if end - start >= min_length * T:
                    level = plain_level(curve, start, end, region_score)
                    rows.append((label, start, end, scores[label, snippet] * level))
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table[table["score"] > 0].sort_values(
        ["score", "label", "start", "end"], ascending=[False, True, True, True]
    )
    return table.drop_duplicates(["label", "start", "end"]).head(max_candidates or len(table))


def plain_level(curve: np.ndarray, start: int, end: int, region_score: str) -> float:
    """What a curve (T) has in a region: its ``max``, its ``mean``, or the mean's ``contrast`` with what is around."""
    inside = curve[start:end]
    if region_score == "max":
        return inside.max()
    if region_score == "mean":
        return inside.mean()
    reach = max((end - start) // 4, 1)
    around = np.concatenate([curve[max(start - reach, 0) : start], curve[end : end + reach]])
    return inside.mean() - (around.mean() if len(around) else 0)


def plain_regions(curve: Sequence[float] | np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Connected regions of a curve (T) above ``threshold``: first place, place after the last."""
    regions, start = [], None
    for place in range(len(curve)):
        if curve[place] > threshold:
            if start is None:
                start = place
        elif start is not None:
            regions.append((start, place))
            start = None
    return regions if start is None else [*regions, (start, len(curve))]


def as_table(candidates: Candidates, video: int) -> pd.DataFrame:
    """The candidates of one video in the form of :func:`plain_decode`."""
    found = candidates.scores[video].cpu() > 0
    label, segment, score = (
        x[video].cpu()[found].numpy() for x in (candidates.labels, candidates.segments, candidates.scores)
    )
    return pd.DataFrame(zip(label, *segment.T.astype(int), score, strict=True), columns=COLUMNS)


def require_same(ours: pd.DataFrame, plain: pd.DataFrame) -> None:
    """Stop unless the same segments of the same classes have the same scores, save for rounding (1e-6)."""
    ours, plain = (table.sort_values(COLUMNS[:3]) for table in (ours, plain))
    require_equal("decode: classes and segments", ours[COLUMNS[:3]], plain[COLUMNS[:3]])
    require_equal("decode: scores", ours["score"], plain["score"], 1e-6)
