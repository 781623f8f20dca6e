"""data.setting=seen_cv: pseudo-unseen classes among the seen ones, tested on training videos that are kept aside."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import SEEN, UNSEEN, make_data_set, tiny_config

from eval import main as evaluate
from stale.build import load_test_data, load_training_data
from stale.config import Config
from stale.data.annotations import read_annotations
from stale.detection.inference import infer
from stale.errors import StaleError
from stale.files import read_json
from stale.training.trainer import train


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny data set."""
    return make_data_set(tmp_path_factory.mktemp("data"))


def configuration(file: Path, fold: int, *settings: str) -> Config:
    return tiny_config(file, "data.setting=seen_cv", "data.cv_setting=75_25", f"data.fold={fold}", *settings)


@pytest.mark.parametrize("fold", range(3))
def test_a_video_of_a_pseudo_unseen_class_is_tested_and_not_trained_on(file: Path, fold: int):
    config = configuration(file, fold)
    training, test = load_training_data(config), load_test_data(config, "unseen")
    trained = {video.id for part in (training.train, training.held_out) for video in part.videos}
    tested = {video.id for video in test.videos}
    assert trained
    assert tested
    assert not trained & tested
    assert set(training.split.seen) | set(test.classes) == set(SEEN)
    assert {item.label for video in training.train.videos for item in video.instances} <= {*training.split.seen, ""}


def test_no_video_of_the_test_subset_and_no_unseen_class_is_touched(file: Path):
    config = configuration(file, 0)
    subset = {video.id: video.subset for video in read_annotations(config.data.annotations).values()}
    test = load_test_data(config, "unseen")
    assert {subset[video.id] for video in test.videos} == {"validation"}
    assert not set(test.classes) & set(UNSEEN)


@pytest.mark.parametrize("vocabulary", ["seen", "all"])
def test_only_the_pseudo_unseen_classes_are_tested(file: Path, vocabulary: str):
    with pytest.raises(StaleError, match=f"tests pseudo-unseen classes alone, not {vocabulary}"):
        load_test_data(configuration(file, 0), vocabulary)


def test_a_fold_is_trained_tested_and_evaluated_like_any_run(file: Path, tmp_path: Path):
    run = train(configuration(file, 1, "train.epochs=1"), tmp_path / "run")
    infer(run)
    evaluate(["--run", str(run.path)])
    protocol = read_json(run.path / "metrics.json", "metrics")["protocol"]
    assert (protocol["setting"], protocol["split"], protocol["subset"]) == ("seen_cv", 1, "validation")
    assert "3 folds of the seen classes of split 0" in protocol["split_source"]
