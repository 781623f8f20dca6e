"""What the tests share: a tiny data set, made in a second; commands in processes of their own; clips made with PyAV."""

import json
import multiprocessing
import os
import resource
import runpy
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from stale.checkpoint import load_checkpoint
from stale.config import Config, TextConfig, load_config
from stale.data.annotations import Instance, Video
from stale.data.classes import phrase
from stale.data.splits import SPLIT_FOLDERS
from stale.io import write_json, write_text
from stale.model.clip import load_clip_module, load_text_weights
from stale.model.text import TextEncoder, TextTransformer
from stale.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"  # reference data beside the checkout
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no reference data beside the checkout")


def on_a_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


WIDTH = 64  # of the text encoder, the embedding and the features
SNIPPETS = 16
SEEN = ("BaseballPitch", "CleanAndJerk", "Diving", "HammerThrow", "LongJump", "Shotput")
UNSEEN = ("GolfSwing", "PoleVault")
NUM_TRAINING, NUM_TEST = 24, 16

# The layers of a block of the text encoder: name, rows and columns in widths.
LAYERS = (("attn.in_proj_", 3, 1), ("attn.out_proj.", 1, 1), ("mlp.c_fc.", 4, 1), ("mlp.c_proj.", 1, 4))


def random_text_encoder_weights(
    width: int = WIDTH, layers: int = 2, output_width: int = WIDTH, num_tokens: int = 49408
) -> dict[str, Tensor]:
    """Random weights under the names of OpenAI's state dicts."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = width**-0.5) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {"token_embedding.weight": normal(num_tokens, width, scale=1.0).half()}
    weights |= {"positional_embedding": normal(77, width, scale=0.1), "text_projection": normal(width, output_width)}
    weights |= {"ln_final.weight": torch.ones(width), "ln_final.bias": torch.zeros(width)}
    weights["logit_scale"] = torch.tensor(4.6)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            weights |= {f"{block}{norm}.weight": torch.ones(width), f"{block}{norm}.bias": torch.zeros(width)}
        for name, rows, columns in LAYERS:
            weights[f"{block}{name}weight"] = normal(rows * width, columns * width)
            weights[f"{block}{name}bias"] = normal(rows * width)
    return weights


def tiny_text_transformer(num_tokens: int = 49408, layers: int = 2) -> TextTransformer:
    """The text transformer of :func:`random_text_encoder_weights`."""
    weights = random_text_encoder_weights(num_tokens=num_tokens, layers=layers)
    del weights["logit_scale"]
    return TextTransformer.from_weights(weights)


def make_data_set(folder: Path) -> Path:
    """Write the data set into ``folder``; returns its configuration file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_text_encoder_weights(), folder / "text_encoder.pt")
    database = _annotations(np.random.default_rng(0))
    write_json(folder / "annotations.json", {"database": database})
    _write_features(folder, database)
    write_lists(folder / "splits", SEEN, UNSEEN)
    write_text(folder / "tiny.yaml", yaml.safe_dump(_configuration(folder)))
    return folder / "tiny.yaml"


def tiny_config(file: Path, *assignments: str) -> Config:
    """The data set's configuration with some settings changed."""
    return load_config([file], assignments)


def write_folder(folder: Path, arrays: dict[str, np.ndarray], **attributes: object) -> Path:
    """Features in a folder of .npy, each with ``attributes`` recorded."""
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        if attributes:
            write_json(folder / f"{name}.json", attributes)
    return folder


def write_lists(
    folder: Path, seen: Sequence[str], unseen: Sequence[str], setting: str = "75_25", splits: int = 1
) -> Path:
    """Split lists of the data set Tiny."""
    for part, labels in (("train", seen), ("test", unseen)):
        for index in range(splits):
            write_text(folder / SPLIT_FOLDERS[setting] / "Tiny" / part / f"split_{index}.list", "\n".join(labels))
    return folder


def copy_data_set(config: Path, folder: Path) -> Path:
    """A copy of the data set in ``folder``, which is returned."""
    shutil.copytree(config.parent, folder)
    write_text(folder / config.name, config.read_text().replace(str(config.parent), str(folder)))
    return folder


def video(name: str, *instances: tuple[float, float, str], duration: float = 10.0) -> Video:
    return Video(name, "training", duration, tuple(Instance(*instance) for instance in instances))


def _configuration(folder: Path) -> dict:
    return {
        "data": {
            "dataset": "tiny",
            "annotations": str(folder / "annotations.json"),
            "features": str(folder / "features.h5"),
            "splits": str(folder / "splits"),
            "setting": "75_25",
            "num_snippets": SNIPPETS,
            "train_subset": "validation",
            "test_subset": "test",
        },
        "model": {
            "text": {"weights": str(folder / "text_encoder.pt"), "context_tokens": 4},
            "masking": {"queries": 4, "layers": 1},
            "localizer": {"hidden": 16, "bank": 2},
        },
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "log_interval": 1, "device": "cpu"},
        "detection": {"top_snippets": 20},
    }


def _annotations(rng: np.random.Generator) -> dict:
    """Every class in both subsets; every fourth training video also has an instance of an unseen class."""
    database = {}
    for number in range(NUM_TRAINING + NUM_TEST):
        training = number < NUM_TRAINING
        labels = [(SEEN if training else SEEN + UNSEEN)[number % (len(SEEN) + (0 if training else len(UNSEEN)))]]
        labels *= int(rng.integers(1, 3))
        if training and number % 4 == 0:
            labels.append(UNSEEN[number % 8 // 4])
        duration = float(rng.uniform(20, 60))
        edges = np.sort(rng.uniform(0, duration, 2 * len(labels))).reshape(-1, 2).round(2).tolist()
        database[f"video_{number:03d}"] = {
            "subset": "Validation" if training else "Test",
            "duration": duration,
            "annotations": [{"segment": edge, "label": label} for edge, label in zip(edges, labels, strict=True)],
        }
    return database


def _write_features(folder: Path, database: dict) -> None:
    """Two snippets a second: noise, and inside an instance its class's text embedding besides."""
    transformer = TextTransformer.from_weights(load_text_weights(folder / "text_encoder.pt"))
    encoder = TextEncoder(transformer, TextConfig(prompt="template"))
    labels = SEEN + UNSEEN
    with torch.no_grad():
        text = encoder(encoder.tokenize([phrase(label) for label in labels]))
    text = torch.nn.functional.normalize(text - text.mean(0), dim=-1).numpy() * WIDTH**0.5
    rng = np.random.default_rng(1)
    with h5py.File(folder / "features.h5", "w") as file:
        for name, entry in database.items():
            features = rng.standard_normal((int(entry["duration"] * 2), WIDTH))
            for item in entry["annotations"]:
                start, end = (round(2 * time) for time in item["segment"])
                features[start : end + 1] += 2 * text[labels.index(item["label"])]
            file[name] = features.astype(np.float16)


# A server imports torch once and forks for every command: a process costs a tenth of a second, not three.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["stale.training.trainer", "stale.detection.run", "torch._dynamo", "torch.utils.tensorboard"]
)


@dataclass(frozen=True)
class Running:
    """A command at work; ``errors`` takes what it says on stderr."""

    process: BaseProcess
    errors: Path

    def wait(self, until: Callable[[], bool], seconds: float = 300.0) -> bool:
        """Wait for ``until`` or the process's end; whether ``until`` came true."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < end:
            if until():
                return True
            time.sleep(0.01)
        return until()

    def finish(self, seconds: float = 300.0) -> int:
        """Wait for the end; the exit code, negative for a signal that killed."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still at work after {seconds} s: {self.said()}"
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal, to a process that may have come to its end."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def said(self) -> str:
        """All of its stderr so far."""
        return self.errors.read_text(encoding="utf-8")


def start(
    errors: Path,
    script: str,
    *arguments: str,
    largest_file: int | None = None,
    environment: dict[str, str] | None = None,
) -> Running:
    """Start ``python script arguments``. A file that would grow beyond ``largest_file`` bytes meets a full disk."""
    settings = (str(errors), script, arguments, largest_file, environment or {})
    process = _CONTEXT.Process(target=_run, args=settings, daemon=True)
    process.start()
    return Running(process, errors)


def exit_code(main: Callable[[list[str]], None], *arguments: object) -> int:
    """Call a command's ``main`` in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def start_together(errors: Path, count: int, script: str, *arguments: str) -> list[Running]:
    """Start ``count`` processes of a command as ``torchrun`` does, each with a file of its own in ``errors``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    errors.mkdir(parents=True, exist_ok=True)

    def start_one(rank: int) -> Running:
        environment = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return start(errors / f"{rank}.txt", script, *arguments, environment=environment)

    return [start_one(rank) for rank in range(count)]


def _run(
    errors: str, script: str, arguments: tuple[str, ...], largest_file: int | None, environment: dict[str, str]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [script, *arguments]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")


RESOLUTION = 32  # of the small image encoder
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
    rate: int = 10,
    cover: bool = False,
    last: float = 0.1,
) -> Path:
    """Write a frame at each of ``times`` (seconds; default: 4, 10 a second); ``options`` are the container's.

    ``cover`` puts a white picture before them as a stream of its own; the last frame lasts ``last`` seconds.
    """
    import av

    times = np.arange(40) / 10 if times is None else times
    paint = paint or grey()
    height, width = paint(0.0).shape[:2]
    with av.open(str(path), "w", options=options or {}) as container:
        if cover:
            picture = container.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj444p"}.get(codec, "yuv420p")
        unit = Fraction(1, rate if path.suffix in (".avi", ".h264") else 1000)  # AVI stores a frame for every unit
        stream.time_base = stream.codec_context.time_base = unit
        if codec == "libx264":
            stream.options = {"crf": "5", "bf": "2" if rate == 1 else "0"}
        if cover:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), "rgb24")))
        packets = []
        for time in times:
            frame = av.VideoFrame.from_ndarray(paint(float(time)), "rgb24")
            frame.pts, frame.time_base = round(float(time) / unit), unit
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[-1].duration = round(last / packets[-1].time_base)
        container.mux(packets)
    return path


def write_display_matrix(path: Path, matrix: Sequence[int]) -> None:
    """Write a b c d x y into the matrix of an MP4's track header; a point moves to ax + cy, bx + dy."""
    a, b, c, d, x, y = (65536 * value for value in matrix)
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, x, y, 1 << 30)
    path.write_bytes(content)


def random_image_encoder_weights(
    seed: int = 0, width: int = 64, output_width: int = WIDTH, patch: int = 8
) -> dict[str, Tensor]:
    """Random weights of CLIP's image encoder under OpenAI's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_clip_module("model").VisionTransformer(RESOLUTION, patch, width, 2, width // 64, output_width)
    return {f"visual.{name}": tensor.half().float() for name, tensor in model.state_dict().items()}


def make_clip_data_set(folder: Path) -> Path:
    """The tiny data set whose features record the image encoder in ``folder``/text_encoder.pt as theirs."""
    from stale.video.image_encoder import ImageEncoder

    config = make_data_set(folder)
    weights = torch.load(folder / "text_encoder.pt") | random_image_encoder_weights()
    torch.save(weights, folder / "text_encoder.pt")
    with h5py.File(folder / "features.h5", "a") as file:
        file.attrs.update(ImageEncoder(weights, torch.device("cpu")).backbone.as_dict())
    return config


# Runs

LOSSES = ("total", "classification", "localization", "foreground", "consistency")


def history(run: RunFolder) -> list[dict[str, Any]]:
    """The run's records without their times."""
    records = [json.loads(line) for line in run.history.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds_per_step"} for record in records]


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal to the bit, in dicts and lists of tensors and values."""
    (own, form), (others, other_form) = tree_flatten_with_path(first), tree_flatten_with_path(second)
    assert form == other_form, where
    for (path, one), (_, other) in zip(own, others, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, f"{where}{keystr(path)}"


def assert_same_runs(first: RunFolder, second: RunFolder) -> None:
    assert history(first) == history(second)
    for name in ("last", "best"):
        assert_same(load_checkpoint(first.checkpoint(name)), load_checkpoint(second.checkpoint(name)), name)


def steps_done(run: Path) -> int:
    """By the run's records, of which the last may be half-written."""
    records = RunFolder(run).history
    lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]
