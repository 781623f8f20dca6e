"""Every bench runs and writes its rows; the plain references that no other test uses agree with ours."""

from __future__ import annotations

import importlib.util
import io
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from evaluation_reference import reference_per_class
from tiny import tiny_tower
from torch import nn

from scripts.benchmarks import step
from scripts.benchmarks.evaluation import loop_form, random_case
from scripts.benchmarks.floor import EDGES, count_flops, describe, largest_batch, measured_rate
from scripts.benchmarks.models import Size, random_phrases
from scripts.benchmarks.pack import plain_batch
from scripts.benchmarks.rows import Row, best_of, require_equal, table
from scripts.benchmarks.step import random_trainer, require_same_step
from scripts.benchmarks.text import pad_prompts, plain_text
from stale.data.dataset import load_features
from stale.data.features import open_features
from stale.evaluation import evaluate
from stale.model.text import TextEncoder

WORDS = ("eval", "text", "step", "pack", "decode", "nms", "inference", "pipeline")
COMMANDS = (
    "train.py",
    "inference.py",
    "eval.py",
    *sorted(f"scripts/{path.name}" for path in (REPOSITORY / "scripts").glob("*.py")),
)


@cache
def load_bench() -> ModuleType:
    """``scripts/bench.py`` as a module."""
    spec = importlib.util.spec_from_file_location("bench", REPOSITORY / "scripts" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def small_products() -> Iterator[None]:
    """Seconds are not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EDGES, "cpu", 64)
        yield


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Rows and print of all benches at once, each of which checks that both its sides agree."""
    path, printed = tmp_path_factory.mktemp("bench") / "out.json", io.StringIO()
    with redirect_stdout(printed):
        load_bench().main(["all", "--scale", "0.01", "--device", "cpu", "--json", str(path)])
    return json.loads(path.read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def rows(output: tuple[list[dict[str, Any]], str]) -> list[dict[str, Any]]:
    return output[0]


@pytest.mark.parametrize("word", WORDS)
def test_every_bench_has_rows_of_its_name(word: str, rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["name"].startswith(f"{word}: ")]


def test_rows_are_whole(rows: list[dict[str, Any]]) -> None:
    assert {row["name"].split(":")[0] for row in rows} == set(WORDS)
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"name", "reference_seconds", "seconds", "ratio", "size"}
        assert row["seconds"] > 0
        assert row["ratio"] == row["reference_seconds"] / row["seconds"]


def test_one_table_names_rows_and_machine(output: tuple[list[dict[str, Any]], str]) -> None:
    rows, printed = output
    assert all(row["name"] in printed and row["size"] in printed for row in rows)
    assert f", Python {platform.python_version()}, torch {torch.__version__}" in printed
    assert ("1 thread, CPU seconds" in printed) == (torch.get_num_threads() == 1)
    assert printed.count("reference s") == 1
    assert "Arithmetic floor of the step: " in printed


def test_a_single_bench(tmp_path: Path) -> None:
    load_bench().main(["nms", "--scale", "0.01", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    assert {row["name"].split(":")[0] for row in json.loads((tmp_path / "out.json").read_text())} == {"nms"}


@pytest.mark.parametrize("arguments", [["unknown"], [], ["nms", "--scale", "0"]])
def test_impossible_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_bench().main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print({'torch', 'pandas', 'h5py', 'matplotlib'} & set(sys.modules)))\n"
        f"sys.argv = [{command!r}, '--help']\n"
        f"runpy.run_path({command!r}, run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "set()"


def test_loop_form_is_a_third_opinion() -> None:
    truth, found = random_case(20, num_classes=4, a_video=10)
    tious = np.array([0.3, 0.5, 0.7])
    expected = reference_per_class(truth, found, tious)
    np.testing.assert_allclose(loop_form(truth, found, tious), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(evaluate(truth, found, tious).ap, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompt", ["learned", "template"])
@torch.no_grad()
def test_text_of_77_tokens(prompt: str) -> None:
    encoder = TextEncoder(tiny_tower(), prompt)
    prompts = encoder.tokenize(["jump", "throwing a long javelin", "cricket bowling"])
    padded = pad_prompts(encoder, prompts)
    assert padded.tokens.shape[1] + (16 if prompt == "learned" else 0) == 77
    torch.testing.assert_close(encoder(prompts), plain_text(encoder, padded), rtol=1e-4, atol=1e-5)


def test_a_step_is_that_of_its_videos_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = random_trainer(tmp_path, Size(4, 16, 64, 2), 6, torch.device("cpu"))
    require_same_step(trainer, 6)
    monkeypatch.setattr(step, "plain_text", lambda *arguments: plain_text(*arguments).roll(1, 0))
    with pytest.raises(AssertionError, match="step: loss"):
        require_same_step(trainer, 6)


def test_batches_of_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("a", 3), ("b", 40)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((count, 8)).astype(np.float32))
    expected = load_features(["b", "a"], open_features(tmp_path), 16)
    torch.testing.assert_close(plain_batch(tmp_path, ["b", "a"], 16), expected)


def test_disagreement_stops_a_bench() -> None:
    require_equal("same", [1.0, 2.0], [1.0, 2.0])
    require_equal("close", [1.0, 2.0], [1.0, 2.001], 1e-3)
    for ours, tolerance in (([1.0, 2.1], 1e-3), ([1.0], 1.0), ([1.0, float("nan")], 1.0)):
        with pytest.raises(AssertionError, match="figures: "):
            require_equal("figures", ours, [1.0, 2.0], tolerance)


def test_the_least_time_counts() -> None:
    times = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    assert best_of(lambda: None, 3, lambda: next(times)) == 2.0
    assert "2.5" in table([Row("a", 5.0, 2.0, "size")]).splitlines()[-1]


def test_names_are_enough_and_distinct() -> None:
    names = random_phrases(150)
    assert len(set(names)) == 150
    assert all(2 <= len(name.split()) <= 4 for name in names)


def test_products_and_attention_are_counted() -> None:
    layer, x = nn.Linear(16, 32, bias=False), torch.randn(8, 16, requires_grad=True)
    assert count_flops(lambda: layer(x)) == 2 * 8 * 16 * 32
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 8 * 16 * 32
    q = torch.randn(2, 4, 8, 16)
    assert (
        count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
        == 2 * 2 * 8 * 8 * 8 * 16
    )


def test_floor_in_words() -> None:
    assert measured_rate(torch.device("cpu"), torch.float32) > 0
    floor, line = describe(10**9, 10.0, torch.device("cpu"), torch.float32)
    assert 0 < floor < 10
    assert "0.001 TFLOP" in line
    assert f"{10 / floor:.2f} times" in line


@pytest.mark.parametrize("fitting", [0, 1, 2, 5, 64, 99, 100])
def test_the_largest_batch_is_found(fitting: int) -> None:
    def memory_of(batch: int) -> int:
        if batch > fitting + 10:
            raise torch.cuda.OutOfMemoryError
        return batch

    assert largest_batch(memory_of, fitting + 0.5, most=100) == fitting
