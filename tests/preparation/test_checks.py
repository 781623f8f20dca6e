"""The report names what is missing and what is faulty, and its verdict is the exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_preparation.checks import Report, check
from data_preparation.converters import Annotations, write_as
from data_preparation.prepare import find_features
from scripts import prepare_data as command
from stale.data.annotations import Instance, Video, read_annotations
from stale.data.datasets import DATASETS
from stale.errors import StaleError
from stale.io import read_json, write_json
from tests.helpers import REPOSITORY, exit_code, make_clip, make_clip_data_set, write_lists

WIDTH = 8
LABELS = ["Diving", "Rowing", "Sailing", "Surfing"]


def make_root(folder: Path, count: int = 40, duration: float = 20.0) -> dict[str, Video]:
    """Annotations, lists and ``.npy`` features of two subsets, 5 snippets a second in one and 10 in the other."""
    videos = {}
    rng = np.random.default_rng(0)
    (folder / "features").mkdir(parents=True)
    for number in range(count):
        name, subset = f"x{number:02d}", ("training", "validation")[number % 2]
        videos[name] = Video(name, subset, duration, (Instance(1.0, 5.0, LABELS[number // 2 % 4]),))
        features = rng.standard_normal((int(duration * (5 if number % 2 else 10)), WIDTH))
        np.save(folder / "features" / f"v_{name}.npy", features.astype(np.float16))
    videos["y"] = Video("y", "testing", duration, ())
    write_as("activitynet", Annotations(videos), folder / "annotations.json")
    write_lists(folder / "splits", LABELS[1:], LABELS[:1], "75_25", splits=10)
    write_lists(folder / "splits", LABELS[2:], LABELS[:2], "50_50", splits=10)
    return videos


def report_on(folder: Path, **options: object) -> Report:
    annotations, features = folder / "annotations.json", find_features(folder)
    return check("tiny", annotations, features=features, splits=folder / "splits", **options)


def test_a_sound_root_is_ready(tmp_path: Path) -> None:
    make_root(tmp_path)
    report = report_on(tmp_path)
    assert report.verdict == "ready" and not report.faults and not report.missing and not report.remarks
    subsets = report.subsets
    assert [subsets[name]["with segments"] for name in ("training", "validation", "testing")] == [20, 20, 0]
    assert [subsets[name]["snippets a second"] for name in ("training", "validation")] == [10, 5]
    assert report.features["width"] == WIDTH
    assert "tiny: READY" in report.as_text()
    assert report_on(tmp_path, id_pattern="v_{id}").verdict == "ready"
    assert "no name fits data.id_pattern=v_" in report_on(tmp_path, id_pattern="v_").faults[0]
    samples = [report_on(tmp_path, sample=sample).subsets["training"]["loaded"] for sample in (3, 100)]
    assert samples == [3, 20]


def test_missing_features_are_counted_by_subset_and_class(tmp_path: Path) -> None:
    make_root(tmp_path)
    for number in (0, 8, 2, 1):
        (tmp_path / "features" / f"v_x{number:02d}.npy").unlink()
    report = report_on(tmp_path)
    assert report.verdict == "incomplete"
    assert report.features["missing"]["validation"] == ["x01"]
    assert report.missing[0] == "features: 3 of 20 training videos: x00, x02, x08 (Diving: 2, Rowing: 1)"
    assert report.missing[0] in report.as_text()


def test_unusable_features_and_those_that_do_not_fit_the_duration_are_faults(tmp_path: Path) -> None:
    make_root(tmp_path)
    folder = tmp_path / "features"
    np.save(folder / "v_x01.npy", np.full((5, WIDTH), np.nan, np.float32))
    (folder / "v_x03.npy").write_bytes(b"half")
    write_json(folder / "v_x07.json", {"fps": 25.0})
    np.save(folder / "v_other.npy", np.zeros((30, WIDTH), np.float16))
    report = report_on(tmp_path)
    assert report.verdict == "faulty"
    assert report.features["unusable"].keys() == {"x01", "x03"}
    assert "2 unusable: features of video 'x01' in" in report.faults[0]
    assert re.search(r"annotated duration: x07 in .*features \(4.0 s, annotated 20.0 s\)", report.faults[1])
    assert report.remarks == ["features of 1 videos are not annotated: v_other"]


def test_features_that_say_they_are_simulated(tmp_path: Path) -> None:
    videos = make_root(tmp_path)
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file.attrs["simulated"] = True
        file.update({name: np.ones((16, WIDTH), np.float16) for name in videos})
    report = report_on(tmp_path)
    assert report.features["simulated"] and report.verdict == "ready"
    assert "SIMULATED" in report.as_text() and "every video has 16 snippets" in report.as_text()


def test_splits_that_do_not_fit(tmp_path: Path) -> None:
    make_root(tmp_path)
    base = tmp_path / "splits"
    (base / "train_75_test_25" / "Tiny" / "test" / "split_1.list").write_text("Skating\n")
    (base / "train_50_test_50" / "Tiny" / "test" / "split_2.list").unlink()
    first, second = report_on(tmp_path).faults
    assert first.startswith("splits: 75_25, split 1: ") and "Skating" in first
    assert second.startswith("splits: 50_50, split 2: split file not found")


def test_without_anything(tmp_path: Path) -> None:
    report = report_on(tmp_path)
    assert report.verdict == "incomplete" and "no " in report.missing[0]
    make_root(tmp_path / "a")
    annotations = tmp_path / "a" / "annotations.json"
    report = check("tiny", annotations)
    assert report.missing == ["features: none found"]
    assert report.remarks[0].startswith("no split lists")
    report = check("thumos14", annotations, public=DATASETS["thumos14"])
    assert any("unknown subset" in fault for fault in report.faults)
    assert any("no lists of THUMOS14" in item for item in report.missing)


def test_labels_hostile_ids_and_damaged_files_are_faults(tmp_path: Path) -> None:
    videos = make_root(tmp_path)
    videos["z"] = Video("z", "training", 9.0, (Instance(0, 1, "diving "),))
    write_as("activitynet", Annotations(videos), tmp_path / "annotations.json")
    assert "classes diving in neither train nor test" in report_on(tmp_path).faults[0]
    assert "'Diving', 'diving'" in report_on(tmp_path).remarks[1]
    (tmp_path / "features.h5").write_bytes(b"not HDF5")
    assert "not an HDF5 file" in report_on(tmp_path).faults[-1]
    write_json(tmp_path / "annotations.json", {"database": {"../x": {"subset": "a", "duration": 1}}})
    assert "cannot name a file" in report_on(tmp_path).faults[0]


def test_the_verdict_is_the_exit_code(tmp_path: Path, capsys) -> None:
    def code(*extra: object) -> int:
        return exit_code(command.main, "custom", "--root", tmp_path, "--name", "tiny", "--check", *extra)

    make_root(tmp_path)
    assert code("--json", tmp_path / "report.json") == 0
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "ready"
    (tmp_path / "features" / "v_x00.npy").unlink()
    assert code() == 1
    np.save(tmp_path / "features" / "v_x01.npy", np.full((5, WIDTH), np.inf, np.float16))
    assert code() == 3
    assert "tiny: FAULTY" in capsys.readouterr().out


def test_a_table_of_own_data_is_complete_and_agrees_with_itself(tmp_path: Path) -> None:
    def prepared(*rows: str) -> int:
        (tmp_path / "annotations.csv").write_text("\n".join(rows))
        return exit_code(command.main, "custom", "--root", tmp_path)

    head = "video,fps,duration,subset,start,end,label"
    with pytest.raises(StaleError, match="line 3: video 'a' has another subset or duration"):
        prepared(head, "a,25,30,training,0,1,Diving", "a,25,20,training,2,3,Diving")
    with pytest.raises(StaleError, match="of 1 video none is for validation: add a column subset"):
        prepared("video,duration,start,end,label", "a,30,0,1,Diving")
    assert not (tmp_path / "annotations.json").exists()
    assert prepared(head, "a,25,30,training,0,1,Diving", "a,,,,2,3,Diving", "b,,9,validation,,,") == 1
    first, second = read_annotations(tmp_path / "annotations.json").values()
    assert (first.duration, first.fps, len(first.instances), second.instances) == (30, 25, 2, ())


@pytest.mark.slow
def test_the_recipe_for_own_data_word_for_word(tmp_path: Path) -> None:
    pytest.importorskip("av")
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```bash\n(.*?)```", page[page.index("## Your own data") :], re.DOTALL)
    clip_weights = make_clip_data_set(tmp_path / "weights").parent / "text_encoder.pt"
    commands = re.sub("(--config configs/custom.yaml)", r"\1 --set train.epochs=1", commands)
    commands = commands.replace("train.epochs=1", f"train.epochs=1 model.text.weights={clip_weights}")
    for name in ("scripts", "configs", "train.py", "inference.py", "eval.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "data/mine/videos").mkdir(parents=True)
    for number in range(1, 6):
        make_clip(tmp_path / f"data/mine/videos/plot_{number}.mkv")
    search = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": os.environ | search}
    commands = commands.replace("ViT-B/16", str(clip_weights))
    result = subprocess.run(["bash", "-e"], input=commands, **options)
    assert result.returncode == 0, result.stderr
    assert "custom: READY" in result.stdout
    annotated = read_json(tmp_path / "data/mine/annotations.json", "annotations")["database"]
    assert {entry["duration"] for entry in annotated.values()} == {4.0}
    assert [name for name, entry in annotated.items() if entry["subset"] == "validation"] == ["plot_5"]
    metrics = read_json(tmp_path / "runs/mine/metrics.json", "metrics")
    assert (metrics["num_classes"], metrics["protocol"]["setting"]) == (2, "closed")
    card = (tmp_path / "runs/mine/model_card.md").read_text(encoding="utf-8")
    assert metrics["protocol"]["line"] in card and "`python train.py --config configs/custom.yaml" in card
    assert f"| detections | {100 * metrics['mAP']['0.50']:.2f} |" in card
