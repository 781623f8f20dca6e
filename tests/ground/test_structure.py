"""The package's structure: imports point downwards, evaluation needs no torch."""

import ast
import subprocess
import sys
from functools import cache

import pytest

from tests.helpers import REPOSITORY

PACKAGE = REPOSITORY / "stale"
# A module may import its own floor and those below it; the first name that fits decides.
FLOORS = (
    ("commands", "config", "distributed", "device", "io", "segments", "errors", "version"),
    ("run_folder", "progress", "records"),
    ("model", "data", "video", "plots", "checkpoint", "release"),
    ("training", "detection", "evaluation", "reports"),
    ("api",),
)


def floor_of(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module.split(".")[1] in names)


@cache
def modules() -> dict[str, ast.Module]:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    return {
        name.removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
        for name, path in zip(names, paths, strict=True)
    }


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found & known


def test_imports_point_downwards_without_cycles() -> None:
    trees = modules()
    imports = {name: imported(tree, set(trees)) - {name} for name, tree in trees.items()}
    upwards = [
        f"{name} imports {other}" for name in imports for other in imports[name] if floor_of(other) > floor_of(name)
    ]
    assert upwards == []
    left = dict(imports)
    while ready := [name for name in left if not left[name] & set(left)]:
        for name in ready:
            del left[name]
    assert sorted(left) == [], "these import each other"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("import stale.evaluation, stale.reports; assert 'torch' not in sys.modules", id="no torch"),
        pytest.param(
            "import stale; assert not {'torch', 'matplotlib', 'numpy', 'av'} & set(sys.modules); stale.load", id="light"
        ),
        pytest.param(
            "sys.modules['torchvision'] = None; import stale.training.trainer, stale.detection.run, train;"
            "import inference; from stale.model import clip; assert len(clip.encode('hammer throw')) == 2",
            marks=pytest.mark.slow,
            id="no torchvision",
        ),
    ],
)
def test_imports_are_few(script: str) -> None:
    """In a process of its own."""
    command = [sys.executable, "-c", f"import sys; {script}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
