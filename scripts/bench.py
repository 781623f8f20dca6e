"""Measure how long the package takes: evaluation, data loading, a training step, inference, the whole pipeline.

    python scripts/bench.py all                        every row
    python scripts/bench.py step inference --json OUT  some rows, also as JSON
    python scripts/bench.py all --scale 0.2            smaller problems, for a CPU or a quick look

The sizes are those of ActivityNet with CLIP ViT-B/16; data and weights are random. Where there is a straightforward
implementation, the row shows its time as well and checks that both give the same. Set OMP_NUM_THREADS=1 to measure
one core. Each time is the least of several, the one least disturbed by other processes.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stale.errors import run_command

if TYPE_CHECKING:  # imported where they are used: --help answers at once
    import numpy as np
    import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One measurement: seconds for what ``name`` says, at which size, and of a straightforward implementation."""

    name: str
    seconds: float
    size: str
    straightforward: float | None = None


@dataclass(frozen=True)
class Bench:
    """What a benchmark is given: the scale, the device, and an empty folder."""

    scale: float
    device: torch.device
    folder: Path

    def count(self, full: int, least: int) -> int:
        """Scale a count down, to ``least`` at least."""
        return max(round(full * self.scale), least)

    def best(self, function: Callable[[], object], repeats: int = 3) -> float:
        """Return the least wall-clock seconds of some calls, waiting for the GPU at the end of each."""
        return min(self.seconds(function) for _ in range(repeats))

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the wall-clock seconds of one call."""
        import torch

        start = time.perf_counter()
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def bench_eval(bench: Bench) -> Iterator[Row]:
    """mAP of ActivityNet's validation videos with 100 detections each, and of ten times as many."""
    import numpy as np

    from stale.evaluation import Detections, GroundTruth, evaluate

    tious = np.linspace(0.5, 0.95, 10)

    def case(videos: int, classes: int = 200, seed: int = 0) -> tuple[GroundTruth, Detections]:
        """Videos of one class with one instance, and detections near it, half of them of the right class."""
        rng = np.random.default_rng(seed)
        durations, label = rng.uniform(30.0, 240.0, videos), rng.integers(0, classes, videos)
        segments = np.sort(rng.random((videos, 2)), axis=1) * durations[:, None]
        names = tuple(map(str, range(videos))), tuple(map(str, range(classes)))
        video = np.repeat(np.arange(videos), 100)
        found = np.sort(segments[video] + rng.normal(0.0, 8.0, (len(video), 2)), axis=1)
        labels = np.where(rng.random(len(video)) < 0.5, label[video], rng.integers(0, classes, len(video)))
        truth = GroundTruth(*names, durations, np.arange(videos), label, segments)
        return truth, Detections(video, labels, found, rng.random(len(video)))

    for videos in (bench.count(4728, 20), bench.count(47280, 200)):
        truth, found = case(videos)
        slow = None
        if videos == bench.count(4728, 20):
            slow = bench.seconds(lambda: same_ap(evaluate(truth, found, tious).ap, truth, found, tious))  # noqa: B023
        seconds = bench.best(lambda: evaluate(truth, found, tious))  # noqa: B023
        size = f"{videos:,} videos, {len(found):,} detections, 200 classes, 10 tIoUs"
        yield Row("eval: mAP", seconds, size, slow and slow - seconds)


def same_ap(ap: np.ndarray, truth: Any, found: Any, tious: Sequence[float]) -> None:
    """Compute AP by the definition, one detection after another, and compare it with ``ap`` (tIoU × class)."""
    import numpy as np

    for label in sorted(set(truth.label.tolist())):
        of_video: dict[int, list[int]] = {}
        for instance in np.flatnonzero(truth.label == label).tolist():
            of_video.setdefault(int(truth.video[instance]), []).append(instance)
        total = sum(map(len, of_video.values()))
        chosen = np.flatnonzero(found.label == label)
        chosen = chosen[np.argsort(found.scores[chosen], kind="stable")[::-1]]
        for row, least in enumerate(tious):
            free, correct = {one for several in of_video.values() for one in several}, []
            for detection in chosen.tolist():
                start, end = found.segments[detection]
                best, match = 0.0, -1
                for instance in of_video.get(int(found.video[detection]), ()):
                    low, high = truth.segments[instance]
                    shared = max(min(end, high) - max(start, low), 0.0)
                    tiou = shared / ((end - start) + (high - low) - shared)
                    if instance in free and tiou > best:
                        best, match = tiou, instance
                correct.append(best >= least)
                free -= {match} if correct[-1] else set()
            precision = np.cumsum(correct) / np.arange(1, len(correct) + 1)
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            expected = envelope[np.asarray(correct, bool)].sum() / total
            if abs(ap[row, label] - expected) > 1e-9:
                raise AssertionError(f"AP of class {label} is {ap[row, label]}, {expected} by the definition")


def bench_data(bench: Bench) -> Iterator[Row]:
    """A batch of 100 videos, rescaled to T snippets, from each form of features; files are in the system's cache."""
    import h5py
    import numpy as np
    import torch
    from torch.nn import functional as F

    from stale.data.dataset import load_features
    from stale.data.features import open_features
    from stale.data.pack import pack

    batch, snippets, width = bench.count(100, 4), bench.count(100, 16), 64 * bench.count(8, 1)
    rng, folder = np.random.default_rng(0), bench.folder / "npy"
    folder.mkdir()
    ids = [f"video_{number:04d}" for number in range(batch)]
    with h5py.File(bench.folder / "videos.h5", "w") as file:
        for video in ids:
            file[video] = rng.standard_normal((rng.integers(2, 10) * snippets, width), np.float32).astype(np.float16)
            np.save(folder / f"{video}.npy", file[video][()])
    pack(open_features(folder), bench.folder / "packed", num_snippets=snippets)

    def straightforward() -> torch.Tensor:
        arrays = [torch.from_numpy(np.load(folder / f"{video}.npy")).float().T[None] for video in ids]
        return torch.cat([F.interpolate(array, snippets, mode="linear") for array in arrays]).transpose(1, 2)

    slow, expected = bench.best(straightforward), straightforward()
    size = f"a batch of {batch}, {snippets} snippets, {width} wide, half precision"
    for form, path in (("a folder of .npy", folder), ("HDF5", "videos.h5"), ("packed", "packed")):
        store = open_features(bench.folder / path)
        torch.testing.assert_close(load_features(ids, store, snippets).float(), expected, rtol=2e-3, atol=2e-3)
        yield Row(f"data: {form}", bench.best(lambda: load_features(ids, store, snippets)), size, slow)  # noqa: B023


def bench_step(bench: Bench) -> Iterator[Row]:
    """A training step with the text encoder fine-tuned: three quarters of the classes, batches of 100 videos."""
    from stale.io import read_text

    run, batch, size = train_random(bench)
    records = [json.loads(line) for line in read_text(run.history, "history").splitlines()]
    times = [value for record in records for key, value in record.items() if key.startswith("seconds")]
    yield Row("step: a training step", min(times), f"a batch of {batch}; {size}")


def bench_inference(bench: Bench) -> Iterator[Row]:
    """Detection in the test videos of the unseen classes with loading and writing, and in single videos."""
    import stale
    from stale.data.features import open_features
    from stale.io import read_json

    run, _, size = train_random(bench)
    arguments = ("inference.py", "--run", str(run.path), "--device", str(bench.device))
    seconds = bench.best(lambda: command(*arguments), 2)
    videos, classes = len(read_json(run.detections("unseen"), "detections")["results"]), class_names(50)
    yield Row("inference: inference.py, per video", seconds / videos, f"{videos} videos of unseen classes; {size}")
    detector, store = stale.load(run.path, device=str(bench.device)), open_features(bench.folder / "features.h5")
    arrays = [store.read(f"test_{number:04d}") for number in range(8)]
    seconds = bench.best(lambda: [detector.detect(array, fps=1.0, classes=classes) for array in arrays])
    yield Row("inference: Detector.detect, per video", seconds / len(arrays), f"50 classes under test; {size}")


def bench_pipeline(bench: Bench) -> Iterator[Row]:
    """One epoch on the demo's data, detection and evaluation, with loading and writing."""
    from stale.config import load_config
    from stale.data.synthetic import write_synthetic
    from stale.training.trainer import train

    counts = {"training_videos": bench.count(16, 2), "validation_videos": bench.count(8, 2)}
    videos = write_synthetic(bench.folder, **counts)
    changes = [f"data.annotations={bench.folder}/annotations.json", f"data.features={bench.folder}/features.h5"]
    changes += [f"model.text.weights={bench.folder}/text_encoder.pt", f"train.device={bench.device}", "train.epochs=1"]
    config, run = load_config([ROOT / "configs" / "demo.yaml"], changes), str(bench.folder / "run")
    size = f"{len(videos)} videos of the demo"
    yield Row("pipeline: train for one epoch", bench.seconds(lambda: train(config, run)), size)
    yield Row("pipeline: detect", bench.seconds(lambda: command("inference.py", "--run", run)), size)
    yield Row("pipeline: evaluate", bench.seconds(lambda: command("eval.py", "--run", run)), size)


def train_random(bench: Bench) -> tuple[Any, int, str]:
    """Train for an epoch on random videos of 200 classes: the run, the batch size, a description of the sizes."""
    import h5py
    import numpy as np
    import torch

    from stale.config import load_config
    from stale.data.synthetic import random_text_weights
    from stale.io import write_json
    from stale.training.trainer import train

    snippets, width, layers = bench.count(100, 16), 64 * bench.count(8, 1), bench.count(12, 2)
    batch, names, rng = bench.count(100, 4), class_names(bench.count(200, 8)), np.random.default_rng(0)
    folder, database = bench.folder, {}
    with h5py.File(folder / "features.h5", "w") as file:
        for subset, number in product(("train", "test"), range(2 * len(names))):
            start, end = sorted(rng.uniform(0, snippets, 2).round(2).tolist())
            instance = {"segment": [start, end + 0.1], "label": names[number % len(names)]}
            name = f"{subset}_{number:04d}"
            database[name] = {"subset": subset, "duration": float(snippets + 1), "annotations": [instance]}
            file[name] = rng.standard_normal((snippets + 1, width), np.float32).astype(np.float16)
    write_json(folder / "annotations.json", {"database": database})
    torch.save(random_text_weights(0, width, layers), folder / "text.pt")
    changes = [f"data.annotations={folder}/annotations.json", f"data.features={folder}/features.h5"]
    changes += ["data.dataset=random", "data.train_subset=train", "data.test_subset=test"]
    changes += [f"data.num_snippets={snippets}", f"model.text.weights={folder}/text.pt", f"train.batch_size={batch}"]
    changes += ["train.epochs=1", "train.log_interval=1"]
    run = train(load_config([], [*changes, f"train.device={bench.device}"]), folder / "run")
    return run, batch, f"{len(names)} classes, {snippets} snippets, text encoder of {layers} layers, {width} wide"


def class_names(count: int) -> list[str]:
    """Combine the verbs and objects of the demo's classes."""
    from stale.data.synthetic import CLASSES

    verbs, objects = zip(*(name.split(maxsplit=1) for name in CLASSES), strict=True)
    return [f"{verb} {thing}" for verb, thing in product(verbs, dict.fromkeys(objects))][:count]


def command(script: str, *arguments: str) -> None:
    """Run one of the project's commands in this process, without its output."""
    former, sys.argv = sys.argv, [script, *arguments]
    try:
        with redirect_stdout(None):
            runpy.run_path(str(ROOT / script), run_name="bench")["main"]()
    finally:
        sys.argv = former


BENCHES = {
    "eval": bench_eval,
    "data": bench_data,
    "step": bench_step,
    "inference": bench_inference,
    "pipeline": bench_pipeline,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="+", choices=["all", *BENCHES], metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--json", metavar="OUT", help="write the rows as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="of every size; default 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    if options.scale <= 0:
        parser.error("--scale must be above 0")

    import torch

    from stale.device import choose_device
    from stale.io import write_json

    device = choose_device(options.device, "--device")
    rows: list[Row] = []
    for name in BENCHES if "all" in options.benches else options.benches:
        with TemporaryDirectory() as folder:
            rows += BENCHES[name](Bench(options.scale, device, Path(folder)))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}\n{'':48}{'seconds':>12}{'straightforward':>17}  size")
    for row in rows:
        slow = "" if row.straightforward is None else f"{row.straightforward:.4g}"
        print(f"{row.name:48}{row.seconds:>12.4g}{slow:>17}  {row.size}")
    if options.json:
        write_json(options.json, [asdict(row) for row in rows], indent=1)


if __name__ == "__main__":
    run_command(main)
