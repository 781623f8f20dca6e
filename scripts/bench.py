"""Measure the fast paths against plain references, both in one run, after checking that they give the same.

    python scripts/bench.py all                          every bench, one table
    python scripts/bench.py decode nms --json OUT        some, and the rows as JSON
    python scripts/bench.py text --scale 0.1             a smaller copy of every size, for a quick look
    python scripts/bench.py step --device cuda           the training step at ActivityNet's size on a GPU

The references lie beside the benches in scripts/benchmarks/. Set OMP_NUM_THREADS=1 for figures of one core.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stale.errors import run_command  # noqa: E402

BENCHES = {  # word → module of scripts.benchmarks
    "eval": "evaluation",
    "text": "text",
    "step": "step",
    "pack": "pack",
    "decode": "decode",
    "nms": "nms",
    "inference": "inference",
    "pipeline": "pipeline",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "benches", nargs="+", choices=["all", *BENCHES], metavar="BENCH", help="all, " + ", ".join(BENCHES)
    )
    parser.add_argument("--json", metavar="OUT", help="write the rows as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the problems; 1 is the stated one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    if options.scale <= 0:
        parser.error("--scale must be above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benches named on the command line."""
    options = parse_arguments(arguments)

    from scripts.benchmarks.rows import Row, table  # after parsing: --help answers at once
    from stale.build import choose_device
    from stale.files import write_json

    device = choose_device(options.device, "--device")
    rows: list[Row] = []
    notes: list[str] = []
    for word in BENCHES if "all" in options.benches else options.benches:
        for result in importlib.import_module(f"scripts.benchmarks.{BENCHES[word]}").bench(options.scale, device):
            if isinstance(result, Row):
                print(f"{result.name}: {result.ratio:.1f}", file=sys.stderr)
                rows.append(result)
            else:
                notes.append(result)
    print("\n\n".join([table(rows), *notes]))
    if options.json:
        write_json(options.json, [{**asdict(row), "ratio": row.ratio} for row in rows], indent=1)


if __name__ == "__main__":
    run_command(main)
