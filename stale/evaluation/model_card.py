"""``model_card.md`` of a run: what it was trained on and how, the hashes of its files, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import file_digest
from typing import Any

from stale.evaluation.tables import map_table, result_rows
from stale.io import read_json, read_text, write_text
from stale.run_folder import VOCABULARIES, RunFolder, command_line
from stale.version import __version__

_RESULTS = "## Results\n"


def write_model_card(run: RunFolder, backbone: Mapping[str, Any]) -> None:
    """Write the card of a training that has just ended; ``backbone`` is what the features record of their encoder."""
    config, split = run.load_config(), run.read_split()
    data, text = config.data, config.model.text
    with run.checkpoint("best").open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    facts = {
        "model": f"STALE, stale {__version__}, revision {split['revision'] or 'unknown'}",
        "command": f"`{command_line()}`",
        "data": f"{data.dataset}, subset {data.train_subset}, setting {data.setting}, split {data.number}",
        "annotations": f"{data.annotations}; SHA-256 of the training segments: {split['segments']}",
        "features": f"{data.features}; SHA-256 of a sample: {split['features']}",
        "image encoder": ", ".join(f"{key} {value}" for key, value in backbone.items() if value) or "not recorded",
        "text encoder": text.embeddings or text.weights,
        "seen classes": ", ".join(split["seen"]),
        "unseen classes": ", ".join(split["unseen"]) or "none",
        "checkpoint": f"checkpoints/best.pt; SHA-256: {digest}",
    }
    table = "".join(f"| {name} | {value.replace('|', chr(92) + '|')} |\n" for name, value in facts.items())
    write_text(run.card, f"# Model card: {run.path.resolve().name}\n\n| | |\n|---|---|\n{table}\n{_RESULTS}")
    update_results(run)


def update_results(run: RunFolder) -> None:
    """Write the run's metrics into its card, if it has one."""
    if not run.card.is_file():
        return
    head = read_text(run.card, "model card").partition(_RESULTS)[0]
    found = [run.metrics(name) for name in VOCABULARIES if run.metrics(name).is_file()]
    parts = ["Not tested yet: `inference.py`, then `eval.py`." if not found else ""]
    for path in found:
        metrics = read_json(path, "metrics file")
        parts.append(f"{metrics['protocol']['line']}\n\n```\n{map_table('mAP, %', result_rows(metrics))}\n```")
    write_text(run.card, "\n\n".join([head + _RESULTS.strip(), *filter(None, parts)]) + "\n")
