"""A batch's features from each of their forms: a file a video, one HDF5 file, a packed block, memory.

B videos, T snippets, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.benchmarks.models import Size, random_phrases, random_videos
from scripts.benchmarks.rows import Row, best_of, clock_of, require_equal
from stale.data.annotations import Video
from stale.data.dataset import VideoDataset, load_features
from stale.data.features import open_features
from stale.data.pack import pack

_ROUNDING = 2**-10  # of half precision, in which features are packed


def bench(scale: float, device: torch.device) -> Iterator[Row]:
    """Batches of 100 of 200 videos with 200 to 1,000 snippets each; all files are in the system's cache."""
    size, B = Size.scaled(scale, classes=150), max(int(100 * scale), 4)
    phrases, clock = random_phrases(size.classes), clock_of(device)
    videos = random_videos(2 * B, phrases)
    chosen = torch.randperm(len(videos), generator=torch.Generator().manual_seed(0))[:B]
    ids = [videos[i].id for i in chosen.tolist()]
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder, videos, size, max(int(200 * scale), 4))
        pack(open_features(folder / "npy"), folder / "packed.h5", size.snippets)
        by_video, packed = open_features(folder / "videos.h5"), open_features(folder / "packed.h5")
        mapped = VideoDataset(videos, packed, phrases, size.snippets, "never", device).to(device)
        resident = VideoDataset(videos, packed, phrases, size.snippets, "always", device).to(device)
        here = chosen.to(resident.index_device)

        expected = plain_batch(folder / "npy", ids, size.snippets)
        require_equal("pack: HDF5 a video", load_features(ids, by_video, size.snippets), expected, _ROUNDING)
        require_equal("pack: packed file", mapped.batch(chosen).features.cpu(), expected, _ROUNDING)
        require_equal("pack: resident", resident.batch(here).features.cpu(), mapped.batch(chosen).features.cpu())
        plain = best_of(lambda: plain_batch(folder / "npy", ids, size.snippets).to(device), 3, clock)
        ours = {
            "an HDF5 file with a dataset a video": lambda: load_features(ids, by_video, size.snippets).to(device),
            "a packed file": lambda: mapped.batch(chosen),
            "packed features resident on the device": lambda: resident.batch(here),
        }
        of = f"a batch of {B}, {size.snippets} snippets, {size.width} wide, half precision"
        for what, batch in ours.items():
            yield Row(f"pack: {what} against a folder of .npy", plain, best_of(batch, 10, clock), of)


def write_features(folder: Path, videos: Sequence[Video], size: Size, least: int) -> None:
    """Random features of each video in ``npy/`` and in ``videos.h5``: ``least`` to five times as many snippets."""
    rng = np.random.default_rng(0)
    (folder / "npy").mkdir()
    with h5py.File(folder / "videos.h5", "w") as file:
        for video in videos:
            features = rng.standard_normal((rng.integers(least, 5 * least), size.width), np.float32).astype(np.float16)
            np.save(folder / "npy" / f"{video.id}.npy", features)
            file[video.id] = features


def plain_batch(folder: Path, ids: Sequence[str], num_snippets: int) -> Tensor:
    """The batch (B, T, D): each video's file loaded and rescaled."""
    rows = []
    for video_id in ids:
        features = torch.from_numpy(np.load(folder / f"{video_id}.npy")).float()  # snippets × D
        rows.append(F.interpolate(features.T[None], num_snippets, mode="linear", align_corners=False)[0].T)
    return torch.stack(rows)
