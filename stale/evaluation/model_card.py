"""``model_card.md`` of a run: what it was trained on and how, the hashes of its files, and its results."""

from collections.abc import Mapping
from typing import Any

from stale.evaluation.tables import map_table, render, result_rows
from stale.io import file_sha256, read_json, read_text, write_text
from stale.run_folder import VOCABULARIES, RunFolder, command_line
from stale.version import __version__

_RESULTS = "## Results\n"


def write_model_card(run: RunFolder, backbone: Mapping[str, Any]) -> None:
    """Write the card of a training that has just ended; ``backbone`` is what the features record of their encoder."""
    config, split = run.load_config(), run.read_split()
    data, text = config.data, config.model.text
    encoder = ", ".join(f"{key} {value}" for key, value in backbone.items() if value)
    write_text(
        run.card,
        f"# Model card: {run.path.resolve().name}\n\n"
        f"* Model: STALE, stale {__version__}, revision {split['revision'] or 'unknown'}\n"
        f"* Command: `{command_line()}`\n"
        f"* Data: {data.dataset}, subset {data.train_subset}, setting {data.setting}, split {data.number}\n"
        f"* Annotations: {data.annotations}; SHA-256 of the training segments {split['segments']}\n"
        f"* Features: {data.features}; SHA-256 of a sample {split['features']}\n"
        f"* Image encoder: {encoder or 'not recorded'}; text encoder: {text.embeddings or text.weights}\n"
        f"* Seen classes: {', '.join(split['seen'])}\n"
        f"* Unseen classes: {', '.join(split['unseen']) or 'none'}\n"
        f"* Checkpoint: checkpoints/best.pt, SHA-256 {file_sha256(run.checkpoint('best'))}\n\n{_RESULTS}",
    )
    update_results(run)


def update_results(run: RunFolder) -> None:
    """Write the run's metrics into its card, if it has one."""
    if not run.card.is_file():
        return
    text = read_text(run.card, "model card").partition(_RESULTS)[0] + _RESULTS
    for path in (run.metrics(name) for name in VOCABULARIES):
        if path.is_file():
            metrics = read_json(path, "metrics file")
            table = render([map_table("mAP, %", result_rows(metrics))], "markdown")
            text += f"\n{metrics['protocol']['line']}\n\n{table}\n"
    write_text(run.card, text)
