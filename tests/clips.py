"""Clips made with PyAV, and CLIP towers of small random weights, for the tests of everything about videos."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stale.files import write_text
from stale.model.tokenizer import load_clip_module
from tests.tiny import WIDTH, make_data_set

RESOLUTION = 32  # of the small image tower
Paint = Callable[[float], np.ndarray]


def grey(height: int = 48, width: int = 64, seconds: float = 4.0) -> Paint:
    """Frames whose brightness tells their time: 20 at the start, 220 at ``seconds``."""
    return lambda time: np.full((height, width, 3), round(20 + 200 * time / seconds), dtype=np.uint8)


def time_of(image: np.ndarray, seconds: float = 4.0) -> float:
    """The time that a frame of :func:`grey` was painted for."""
    return (float(image.mean()) - 20) / 200 * seconds


def make_clip(
    path: Path,
    times: np.ndarray | list[float] | None = None,
    paint: Paint | None = None,
    codec: str = "ffv1",
    options: dict[str, str] | None = None,
) -> Path:
    """Write a frame at each of ``times`` (seconds; default: 4, 10 a second); ``options`` are the container's."""
    import av

    times = np.arange(40) / 10 if times is None else times
    paint = paint or grey()
    height, width = paint(0.0).shape[:2]
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj444p"}.get(codec, "yuv420p")
        unit = Fraction(1, 10 if path.suffix == ".avi" else 1000)  # AVI stores a frame for every unit
        stream.time_base = stream.codec_context.time_base = unit
        if codec == "libx264":
            stream.options = {"crf": "5", "bf": "0"}
        for time in times:
            frame = av.VideoFrame.from_ndarray(paint(float(time)), "rgb24")
            frame.pts, frame.time_base = round(float(time) / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate_header(path: Path, width: int, height: int, quarter_turns: int) -> None:
    """Write a rotation, clockwise as phones do, into the matrix of an MP4's track header."""
    matrices = {1: (0, 1, -1, 0, height, 0), 2: (-1, 0, 0, -1, width, height), 3: (0, -1, 1, 0, 0, width)}
    a, b, c, d, x, y = (65536 * value for value in matrices[quarter_turns])
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, x, y, 1 << 30)
    path.write_bytes(content)


def image_tower_weights(seed: int = 0, width: int = 64, output_width: int = WIDTH, patch: int = 8) -> dict[str, Tensor]:
    """Random weights of CLIP's image tower under OpenAI's names."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = load_clip_module("model").VisionTransformer(RESOLUTION, patch, width, 2, width // 64, output_width)
    torch.set_rng_state(state)
    return {f"visual.{name}": tensor.half().float() for name, tensor in model.state_dict().items()}


def make_clip_data_set(folder: Path) -> Path:
    """The tiny data set with a whole CLIP: its features say that ``folder``/text_tower.pt's image tower made them.

    Returns:
        Its configuration file.
    """
    import h5py

    from stale.video.encoder import ImageEncoder

    config = make_data_set(folder)
    weights = torch.load(folder / "text_tower.pt") | image_tower_weights()
    torch.save(weights, folder / "text_tower.pt")
    with h5py.File(folder / "features.h5", "a") as file:
        file.attrs.update(ImageEncoder(weights, torch.device("cpu")).tower.as_dict())
    return config


def write_classes(path: Path, *lines: str) -> Path:
    """A classes file."""
    write_text(path, "\n".join(lines))
    return path
