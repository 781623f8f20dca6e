"""The bench of the evaluator runs, and its loop form agrees with the reference."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache

import numpy as np
from conftest import REPOSITORY
from evaluation_reference import reference_per_class

from stale.evaluation import evaluate


@cache
def load_bench():
    """``scripts/bench.py`` as a module."""
    spec = importlib.util.spec_from_file_location("bench", REPOSITORY / "scripts" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def test_bench_writes_its_rows(tmp_path, capsys):
    load_bench().main(["eval", "--scale", "0.001", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 2
    for row in rows:
        assert set(row) == {"name", "reference_seconds", "seconds", "ratio", "size"}
        assert row["ratio"] == row["reference_seconds"] / row["seconds"]
    assert "bench" in capsys.readouterr().out


def test_loop_form_is_a_third_opinion():
    truth, found = load_bench().random_case(20, num_classes=4, a_video=10)
    tious = np.array([0.3, 0.5, 0.7])
    expected = reference_per_class(truth, found, tious)
    np.testing.assert_allclose(load_bench().loop_form(truth, found, tious), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(evaluate(truth, found, tious).ap, expected, rtol=0, atol=1e-12)
