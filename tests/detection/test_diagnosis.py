"""The diagnosis of a run, against plain loops over the model's outputs and against the commands."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import fmean as mean

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from scripts.diagnose import main
from stale.api import infer, load
from stale.config import save_config
from stale.data.dataset import load_features
from stale.data.selection import load_annotations, phrases, training_videos
from stale.detection.diagnosis import ADAPTATION, FOREGROUND, MASKS, MEAN_AP, SNIPPETS, VIDEOS, diagnose, report
from stale.detection.run import class_features
from stale.errors import StaleError
from stale.evaluation import evaluate_results
from stale.io import read_json
from stale.model.stale import training_free_text
from stale.run_folder import RunFolder
from stale.segments import seconds_to_snippets
from stale.training.trainer import train
from tests.helpers import SNIPPETS as T
from tests.helpers import random_text_encoder_weights, tiny_config


@pytest.fixture(scope="module")
def written(run: RunFolder) -> dict:
    main(["--run", str(run.path)])
    return json.loads(run.diagnosis.read_text())


def columns(video, classes) -> dict[int, tuple[set[int], str]]:
    """Foreground snippet → the snippets and the class of the shortest instance around it."""
    found: dict[int, tuple[float, set[int], str]] = {}
    for item in video.instances:
        start, end = (seconds_to_snippets(edge, video.duration, T) for edge in (item.start, item.end))
        inside = {t for t in range(T) if start <= t + 0.5 < end} or {min(int((start + end) / 2), T - 1)}
        for t in inside if item.label in classes else ():
            if t not in found or end - start < found[t][0]:
                found[t] = end - start, inside, item.label
    return {t: found[t][1:] for t in sorted(found)}


def iou(first: set[int], second: set[int]) -> float:
    return len(first & second) / len(first | second)


def around(t: int, half_width: int) -> set[int]:
    return {s for s in range(T) if abs(s - t) <= half_width}


@torch.no_grad()
def test_every_value_is_that_of_a_plain_loop(run: RunFolder, written: dict) -> None:
    detector = load(run.path)
    split = load_annotations(detector.config.data)[1]
    test, model, found = detector.test_data("seen"), detector.model, written["vocabularies"]["seen"]
    features = load_features([video.id for video in test.videos], test.store, T).float()
    text = class_features(model, test.classes).text
    original = training_free_text(detector.model, phrases(test.classes))
    outputs = model(features, text)
    L, M, w = outputs.foreground_logits.sigmoid(), outputs.mask_logits.sigmoid(), written["constant_mask"]
    rows: dict[tuple[str, str], list[float]] = defaultdict(list)
    for b, video in enumerate(test.videos):
        truth = columns(video, test.classes)
        labels = {item.label for item in video.instances}
        compared = {
            "as extracted, CLIP's original text": (features[b], original),
            "as extracted, learned text": (features[b], text),
            "after the temporal model, learned text": (outputs.visual[b], text),
            "after the temporal model, adapted text": (outputs.visual[b], outputs.language[b, :-1]),
        }
        for row, (x, classes) in compared.items():
            cosine = torch.stack([cosine_similarity(x, one[None]) for one in classes])  # K × T
            rows[SNIPPETS, row] += [test.classes[cosine[:, t].argmax()] == label for t, (_, label) in truth.items()]
            rows[VIDEOS, row].append(test.classes[cosine[:, list(truth)].sum(1).argmax()] in labels)
        background = [t for t in range(T) if t not in truth and t not in columns(video, split.unseen)]
        pairs = [(float(L[b, t]), float(L[b, s])) for t in truth for s in background]
        if pairs:
            order = [(first > second) + 0.5 * (first == second) for first, second in pairs]
            rows[FOREGROUND, "AUC against the true foreground, mean over videos"].append(mean(order))
        rows[FOREGROUND, "standard deviation over time, mean over videos"].append(float(L[b].std(correction=0)))
        level = (L[b] - L[b].min()) / (L[b].max() - L[b].min())
        for t, (inside, _) in truth.items():
            own = {s for s in range(T) if M[b, s, t] > 0.5}
            region = {s for s in range(T) if min(level[min(s, t) : max(s, t) + 1]) > 0.5}
            rows[MASKS, "M"].append(iou(own, inside))
            rows[MASKS, "regions of L"].append(iou(region, inside))
            rows[MASKS, f"constant mask, {w} snippets to either side"].append(iou(around(t, w), inside))
    for (title, row), values in rows.items():
        assert found[title][row] == pytest.approx(mean(values), abs=1e-6), (title, row)

    change = outputs.language[:, :-1] - normalize(text, dim=-1)  # V × K × C
    parts = {"change": 0, "part specific to classes": change.mean(1, True), "part specific to videos": change.mean(0)}
    for row, shared in parts.items():
        expected = (change - shared).square().sum(2).mean().sqrt()
        assert found[ADAPTATION][row] == pytest.approx(float(expected), rel=1e-4)


def test_the_constant_mask_fits_the_training_instances_best(run: RunFolder, written: dict) -> None:
    data = run.load_config().data
    videos, split = load_annotations(data)
    truths = [columns(video, split.seen) for video in training_videos(data, videos.values(), split)]
    found = [(t, inside) for truth in truths for t, (inside, _) in truth.items()]
    fits = [mean([iou(around(t, w), inside) for t, inside in found]) for w in range(T)]
    assert written["constant_mask"] == fits.index(max(fits)) > 0


@pytest.mark.parametrize(("name", "oracle"), [("as trained", []), ("true M, labels", ["localizer", "labels"])])
def test_a_cell_is_what_the_commands_give(run: RunFolder, written: dict, name: str, oracle: list[str]) -> None:
    infer(run, oracle=oracle)
    test = load(run.path).test_data("unseen")
    results = read_json(run.detections("unseen", oracle), "detections")["results"]
    tious = [0.5 + 0.05 * step for step in range(10)]
    expected = evaluate_results(test.videos, results, test.classes, tious).average
    assert written["vocabularies"]["unseen"][MEAN_AP][name] == pytest.approx(expected, abs=1e-9)


def test_weights_change_by_training_alone(data: Path, run: RunFolder, written: dict, tmp_path: Path) -> None:
    settings = ("train.learning_rate=0", "train.temporal_learning_rate=0", "train.epochs=1")
    still = load(train(tiny_config(data, *settings), tmp_path / "still").path)
    found = diagnose(still.config, still.model, {"unseen": still.test_data("unseen")})
    assert set(found["weights"].values()) == {0.0}
    assert found["weights"].keys() == written["weights"].keys() >= {"text.context", "text", "temporal"}
    assert min(change for name, change in written["weights"].items() if name != "log_temperature") > 0


@pytest.mark.parametrize("change", ["masking.kind=none", "masking.kind=gt", "adaptation.enabled=false"])
def test_what_a_model_lacks_is_left_out(data: Path, tmp_path: Path, change: str) -> None:
    made = load(train(tiny_config(data, f"model.{change}", "train.epochs=1"), tmp_path / "run").path)
    found = diagnose(made.config, made.model, {"seen": made.test_data("seen")})
    tables = found["vocabularies"]["seen"]
    assert (FOREGROUND in tables) == (ADAPTATION not in tables) == (change == "adaptation.enabled=false")
    if change == "masking.kind=gt":
        assert tables[MEAN_AP]["true L"] == tables[MEAN_AP]["as trained"]


def test_the_tables_fit_the_terminal_and_show_every_value(written: dict) -> None:
    text = report(written)
    assert max(map(len, text.splitlines())) <= 100
    for title, rows in written["vocabularies"]["unseen"].items():
        assert title in ("videos", "classes") or title in text
        assert all(row in text for row in (rows if isinstance(rows, dict) else ()))


def test_without_the_text_weights_of_the_run_nothing_is_written(run: RunFolder, tmp_path: Path) -> None:
    copied = RunFolder(Path(shutil.copytree(run.path, tmp_path / "run")))
    copied.diagnosis.unlink(missing_ok=True)
    torch.save(random_text_encoder_weights(layers=1), tmp_path / "other.pt")
    config = copied.load_config()
    config.model.text.weights = str(tmp_path / "other.pt")
    save_config(config, copied.config)
    with pytest.raises(StaleError, match="other.pt: not the file that the run was trained with"):
        main(["--run", str(copied.path)])
    assert not copied.diagnosis.exists()
