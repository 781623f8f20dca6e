"""Measure how long the package takes: evaluation, data loading, training steps, inference, the whole pipeline.

    python scripts/bench.py all                        # every row
    python scripts/bench.py step inference --json OUT  # some rows, also as JSON
    python scripts/bench.py all --scale 0.2            # smaller problems, for a CPU or a quick look

The sizes are those of ActivityNet with CLIP ViT-B/16; data and weights are random. Where there is a straightforward
implementation of ours, the row shows its time and the ratio as well, and checks that both give the same. It is no
other project's code. Both run in the same process; of short ones each time is the least of several, the one least
disturbed by others. Set OMP_NUM_THREADS=1 to measure one core.
"""

import json
import multiprocessing
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stale.commands import CommandParser
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
    device: "torch.device"
    folder: Path

    def count(self, full: int, least: int) -> int:
        """Scale a count down, to ``least`` at least."""
        return max(round(full * self.scale), least)

    def compare(self, fast: Callable[[], object], slow: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
        """Return the least wall-clock seconds of both, which take turns, for the end of a :class:`Row`."""
        times = [(self.seconds(fast), self.seconds(slow)) for _ in range(repeats)]
        return min(first for first, _ in times), min(second for _, second in times)

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

    yield Row("eval: eval.py, from start to end", *whole_command(bench, *case(bench.count(4728, 20))))


def whole_command(bench: Bench, truth: Any, found: Any) -> tuple[float, str]:
    """Write annotations and detections, and evaluate them in a process of its own: seconds, size."""
    from stale.io import write_json

    database = {
        name: {"subset": "validation", "duration": float(duration), "annotations": []}
        for name, duration in zip(truth.videos, truth.durations, strict=True)
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in truth.videos}
    for video, label, segment in zip(truth.video, truth.label, truth.segments.tolist(), strict=True):
        database[truth.videos[video]]["annotations"].append({"segment": segment, "label": truth.classes[label]})
    columns = (found.video, found.label, found.segments.round(3).tolist(), found.scores.round(5).tolist())
    for video, label, segment, score in zip(*columns, strict=True):
        results[truth.videos[video]].append({"label": truth.classes[label], "score": score, "segment": segment})
    write_json(bench.folder / "activitynet.json", {"database": database})
    write_json(bench.folder / "detections.json", {"results": results})
    line = [sys.executable, str(ROOT / "eval.py"), "--predictions", str(bench.folder / "detections.json")]
    line += ["--annotations", str(bench.folder / "activitynet.json")]
    seconds = bench.best(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL), 2)
    return seconds, f"{len(truth.videos):,} videos, {len(found):,} detections"


def same_ap(ap: "np.ndarray", truth: Any, found: Any, tious: Sequence[float]) -> None:
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

    from data_preparation.pack import pack
    from stale.data.dataset import load_features
    from stale.data.features import open_features

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
        return torch.cat([F.interpolate(array, snippets, mode="linear") for array in arrays]).mT.contiguous()

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


def bench_parts(bench: Bench) -> Iterator[Row]:
    """Parts of a training step beside a straightforward form of each: nothing shared, nothing packed, nothing fused."""
    import torch

    from stale.config import AdaptationConfig, TextConfig
    from stale.model.adaptation import CrossAdaptation
    from stale.model.text import Prompts, TextEncoder

    torch.manual_seed(0)
    width, names = 64 * bench.count(8, 1), class_names(bench.count(150, 4))
    text = TextEncoder(random_transformer(width, bench.count(12, 1)), TextConfig()).to(bench.device)
    prompts = text.tokenize(names).to(bench.device)
    (K, L), end = prompts.tokens.shape, prompts.end
    N = len(text.context)  # type: ignore[arg-type]
    everything = Prompts.of(prompts.tokens, torch.full_like(end, L - 1), shared=-N)
    padded = replace(everything, last=torch.arange(K, device=end.device) * everything.rest + end + N)
    torch.testing.assert_close(text(padded), text(prompts), atol=1e-3, rtol=1e-3)
    size = f"{K} classes, {text.transformer.context_length and L} tokens at most, {width} wide"
    yield compared(bench, "parts: text encoder", lambda: text(prompts), lambda: text(padded), size=size)

    batch, snippets = bench.count(100, 2), bench.count(100, 8)
    adaptation = CrossAdaptation(width, AdaptationConfig(residual=False, gate=False)).to(bench.device).eval()
    visual = torch.randn(batch, snippets, width, device=bench.device)
    mask = torch.ones(batch, snippets, device=bench.device)
    language, root = torch.randn(K + 1, width, device=bench.device) / width**0.5, width**0.5

    def every_video() -> torch.Tensor:
        return adaptation.decoder(root * language.expand(batch, -1, -1), visual) / root

    torch.testing.assert_close(adaptation(language, visual, mask), every_video(), atol=1e-4, rtol=1e-4)
    size = f"a batch of {batch}, {K} classes, {snippets} snippets, {width} wide"
    yield compared(bench, "parts: adaptation", lambda: adaptation(language, visual, mask), every_video, size=size)

    weights = [parameter.detach().clone().requires_grad_() for parameter in text.parameters()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    steps = [torch.optim.AdamW(weights, lr=1e-9, fused=fused).step for fused in (True, False)]
    size = f"{sum(weight.numel() for weight in weights):,} parameters"
    yield Row("parts: optimizer step", *swapped(bench.compare(*steps), size))


def compared(
    bench: Bench, name: str, fast: "Callable[[], torch.Tensor]", slow: "Callable[[], torch.Tensor]", *, size: str
) -> Row:
    """A row of forward and backward of both."""
    return Row(name, *swapped(bench.compare(lambda: fast().sum().backward(), lambda: slow().sum().backward()), size))


def swapped(seconds: tuple[float, float], size: str) -> tuple[float, str, float]:
    """The fields of a :class:`Row` after its name."""
    return seconds[0], size, seconds[1]


def bench_growth(bench: Bench) -> Iterator[Row]:
    """A training step by the number of classes and of snippets, each in a process of its own, with its peak memory."""
    import numpy as np

    classes, snippets = bench.count(50, 4), bench.count(100, 16)
    lengths, used = [bench.count(T, least) for T, least in ((256, 16), (512, 24), (1024, 32), (2304, 48))], {}
    sizes = [(factor * classes, snippets, 16) for factor in (1, 2, 4)] + [(classes, T, 16) for T in lengths]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["stale.training.trainer", "torch._dynamo"])  # imported once
    for K, T, batch in sizes:
        with ProcessPoolExecutor(1, processes) as process:
            work = (K, T, batch, 64 * bench.count(8, 1), bench.count(12, 1), str(bench.device))
            seconds, used[K, T] = process.submit(growth_step, *work).result()
        size = f"{used[K, T]:.2f} GB beyond what is loaded"
        if lengths[-1] == T:
            quadratic = np.polyfit(lengths[1:], [used[classes, length] for length in lengths[1:]], 2)
            if quadratic[0] > 0:  # a curve bent downwards reaches no limit
                longest = [max(np.roots(quadratic - [0, 0, limit]).real) for limit in (8, 24)]
                size += "; by a quadratic through three rows 8 GB hold T = {:.0f}, 24 GB T = {:.0f}".format(*longest)
        yield Row(f"growth: K = {K}, T = {T}, batch {batch}", seconds, size)


def growth_step(classes: int, snippets: int, batch: int, width: int, layers: int, device: str) -> tuple[float, float]:
    """Seconds of a training step and the GB that it adds to the process, or takes on a GPU."""
    import torch

    from stale.config import load_config
    from stale.model.stale import build_model
    from stale.training.losses import LossNormalizers
    from stale.training.targets import build_targets
    from stale.training.trainer import TrainStep, build_optimizer

    torch.manual_seed(0)
    config, names = load_config([], [f"data.num_snippets={snippets}"]), class_names(classes)
    model = build_model(config.model, snippets, width, random_transformer(width, layers), names).to(device).train()
    step = TrainStep(model, config.loss, names, torch.float32)
    optimizer, features = build_optimizer(model, config.train), torch.randn(batch, snippets, width, device=device)
    segments = snippets * torch.rand(batch, 2, 2, device=device).sort(2).values
    targets = build_targets(segments, torch.randint(classes, (batch, 2), device=device), classes, snippets)
    times, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        start = time.perf_counter()
        total, _ = step(features, targets, LossNormalizers.of(targets))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        total.detach().item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    if features.is_cuda:
        return min(times), torch.cuda.max_memory_allocated() / 1e9
    return min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9


def random_transformer(width: int, layers: int) -> Any:
    """A text transformer with random weights."""
    from stale.model.text import TextTransformer
    from synthetic_data import random_text_weights

    weights = random_text_weights(0, width, layers)
    weights.pop("logit_scale", None)
    return TextTransformer.from_weights(weights)


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
    from stale.training.trainer import train
    from synthetic_data import write_synthetic

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
    from stale.io import write_json
    from stale.training.trainer import train
    from synthetic_data import random_text_weights

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
    from synthetic_data import CLASSES

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
    "parts": bench_parts,
    "growth": bench_growth,
    "inference": bench_inference,
    "pipeline": bench_pipeline,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
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
    print(f"\n{where}, torch {torch.__version__}; ratio: against a straightforward implementation of ours")
    print(f"{'':48}{'seconds':>12}{'straightforward':>17}{'ratio':>9}  size")
    for row in rows:
        slow, ratio = row.straightforward, ""
        if slow is not None:
            ratio = f"{slow / row.seconds:.2f}"
        print(f"{row.name:48}{row.seconds:>12.4g}{'' if slow is None else f'{slow:.4g}':>17}{ratio:>9}  {row.size}")
    if options.json:
        write_json(options.json, [asdict(row) for row in rows], indent=1)


if __name__ == "__main__":
    run_command(main)
