"""Configuration: strict, without YAML's surprises, and the same after a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from stale.config import Config, load_config, require, save_config
from stale.errors import StaleError


def config_file(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refuse(*assignments: str) -> str:
    with pytest.raises(StaleError) as caught:
        load_config([], assignments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Values arrive as they were written


@pytest.mark.parametrize("written", ["75_25", '"75_25"', "'75_25'", "75_25  # a comment"])
def test_the_setting_is_no_number(tmp_path: Path, written: str) -> None:
    assert yaml.safe_load("75_25") == 7525  # the trap
    path = config_file(tmp_path, f"data:\n  setting: {written}\n")
    assert load_config([path]).data.setting == "75_25"
    assert load_config([], [f"data.setting={written}"]).data.setting == "75_25"


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", " 1e-4 "])
def test_exponents_are_numbers(tmp_path: Path, written: str) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # the trap
    assert load_config([config_file(tmp_path, f"train: {{learning_rate: {written}}}")]).train.learning_rate == 1e-4
    assert load_config([], [f"train.learning_rate={written}"]).train.learning_rate == 1e-4


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "Yes", "y", "1", "0", ""])
def test_only_true_and_false_are_true_and_false(word: str) -> None:
    assert yaml.safe_load("on") is True  # the trap
    assert "model.adaptation.enabled must be true or false, not " in refuse(f"model.adaptation.enabled={word}")


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("FALSE", False), ("false", False)])
def test_true_and_false(word: str, value: bool) -> None:
    assert load_config([], [f"model.adaptation.enabled={word}"]).model.adaptation.enabled is value


@pytest.mark.parametrize("word", ["on", "no", "null", "12:30:00", "010", "0x10", "1_000", "2024-01-01", "~", "1.0"])
def test_texts_stay_texts(tmp_path: Path, word: str) -> None:
    """Each of these is something else to YAML 1.1; as a data set's name it is a name."""
    assert load_config([config_file(tmp_path, f"data:\n  dataset: {word}")]).data.dataset == word


def test_leading_zeros_are_decimal() -> None:
    assert yaml.safe_load("010") == 8  # the trap
    assert load_config([], ["train.epochs=010"]).train.epochs == 10


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~", "none", "None", ""])
def test_null_where_a_value_is_optional(tmp_path: Path, word: str) -> None:
    path = config_file(tmp_path, f"data: {{splits: {word}}}\ntrain: {{text_learning_rate: {word}}}")
    config = load_config([path], [f"data.splits={word}"])
    assert config.data.splits is None
    assert config.train.text_learning_rate is None
    assert load_config([], ["train.text_learning_rate=1e-5"]).train.text_learning_rate == 1e-5


def test_lists_from_files_and_from_the_command_line(tmp_path: Path) -> None:
    path = config_file(tmp_path, "detection:\n  thresholds:\n  - 0.1\n  - 5e-1\n")
    assert load_config([path]).detection.thresholds == [0.1, 0.5]
    assert load_config([path], ["detection.thresholds=[0.3, .4,0.5]"]).detection.thresholds == [0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5", "must be a list such as [0.3, 0.5], not '0.5'"),
        ("[]", "must be a list"),
        ("[0.5, high]", "must be a number, not 'high'"),
        ("[0.5, [0.6]]", "must be a number, not ['0.6']"),
        ("[0.5, 1.0]", "each must be at least 0 and below 1"),
        ("[0.5", "not valid YAML"),
    ],
)
def test_lists_that_are_none(text: str, message: str) -> None:
    assert message in refuse(f"detection.thresholds={text}")


def test_a_value_may_hold_an_equals_sign() -> None:
    assert load_config([], ["data.annotations=a=b.json"]).data.annotations == "a=b.json"


# Files and the command line together


def test_later_files_win_and_the_command_line_wins_over_all(tmp_path: Path) -> None:
    first = config_file(tmp_path, "train: {epochs: 1, seed: 1, batch_size: 1}", "first.yaml")
    second = config_file(tmp_path, "train: {epochs: 2, seed: 2}", "second.yaml")
    train = load_config([first, second], ["train.epochs=3"]).train
    assert (train.epochs, train.seed, train.batch_size) == (3, 2, 1)


def test_a_wrong_value_that_a_later_one_replaces_does_no_harm(tmp_path: Path) -> None:
    path = config_file(tmp_path, "train: {epochs: many}")
    assert load_config([path], ["train.epochs=3"]).train.epochs == 3


@pytest.mark.parametrize("text", ["", "# nothing\n", "data:\ntrain:\n  # epochs: 3\n", "data: {}\n"])
def test_empty_files_and_sections_change_nothing(tmp_path: Path, text: str) -> None:
    assert load_config([config_file(tmp_path, text)]) == Config()


CONFIGS = REPOSITORY / "configs"
OVERLAYS = [*CONFIGS.glob("official_code*.yaml"), CONFIGS / "stale_plus.yaml", *CONFIGS.glob("baselines/*.yaml")]


@pytest.mark.parametrize("config", sorted({*CONFIGS.glob("*.yaml")} - {*OVERLAYS}), ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_sound(config: Path) -> None:
    require(load_config([config]), "data.annotations", "data.features", "model.text.weights")


@pytest.mark.parametrize("overlay", sorted(OVERLAYS), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["activitynet", "thumos14_captions"])
def test_overlays_fit_the_data_sets_configurations(name: str, overlay: Path) -> None:
    base = load_config([CONFIGS / f"{name}.yaml"])
    laid_over = load_config([CONFIGS / f"{name}.yaml", overlay])
    assert laid_over != base
    assert laid_over.data.features == base.data.features


# The round trip


def test_the_default_survives_saving(tmp_path: Path) -> None:
    save_config(Config(), tmp_path / "a.yaml")
    assert load_config([tmp_path / "a.yaml"]) == Config()


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.floats(1e-12, 1e12),
    st.floats(0, 1) | st.none(),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_configuration_survives_saving(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    rate: float,
    optional: float | None,
    thresholds: list[float],
    flag: bool,
) -> None:
    config = Config()
    config.data.annotations, config.train.learning_rate, config.train.text_learning_rate = text, rate, optional
    config.detection.thresholds, config.model.adaptation.enabled, config.data.setting = thresholds, flag, "50_50"
    path = tmp_path_factory.mktemp("round") / "a.yaml"
    save_config(config, path)
    assert load_config([path]) == config


# Faults


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.epoch", "train.epochs"),
        ("epochs", "train.epochs"),
        ("data.anotations", "data.annotations"),
        ("train.learning-rate", "train.learning_rate"),
        ("model.text.weight", "model.text.weights"),
        ("model.localiser.bank", "model.localizer.bank"),
        ("Train.Epochs", "train.epochs"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    assert refuse(f"{key}=3") == f"--set {key}=3: unknown key '{key}'; did you mean '{nearest}'?"
    path = config_file(tmp_path, yaml.safe_dump({key: 3}))
    with pytest.raises(StaleError, match=f"^{path}: unknown key '{key}'; did you mean '{nearest}'?"):
        load_config([path])


def test_a_key_like_no_other_names_none() -> None:
    assert refuse("zzz=3") == "--set zzz=3: unknown key 'zzz'"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs=many", "train.epochs must be a whole number, not 'many'"),
        ("train.epochs=1.5", "train.epochs must be a whole number, not '1.5'"),
        ("train.epochs=1e3", "train.epochs must be a whole number, not '1e3'"),
        ("train.epochs=true", "train.epochs must be a whole number, not 'true'"),
        ("train.epochs=[3]", "train.epochs must be a whole number, not ['3']"),
        ("train.epochs=", "train.epochs must be a whole number, not None"),
        ("train.learning_rate=fast", "train.learning_rate must be a number, not 'fast'"),
        ("train.learning_rate=nan", "train.learning_rate must be a number, not 'nan'"),
        ("train.learning_rate=inf", "train.learning_rate must be a number, not 'inf'"),
        ("data.annotations={a: b}", "data.annotations must be text, not {'a': 'b'}"),
        ("data.annotations=*.json", "not valid YAML"),
        ("train.epochs=0", "train.epochs is 0; the least is 1"),
        ("train.learning_rate=-1e-4", "train.learning_rate is -0.0001; the least is 0"),
        ("train.text_learning_rate=-1", "train.text_learning_rate is -1.0; the least is 0"),
        ("train.seed=-1", "train.seed is -1; the least is 0"),
        ("train.seed=99999999999999999999", "train.seed is 99999999999999999999; the most is 4294967295"),
        ("data.split=10", "data.split is 10; the most is 9"),
        ("data.setting=60_40", "data.setting is '60_40'; use one of 75_25, 50_50, closed"),
        ("data.missing=ignore", "data.missing is 'ignore'; use one of stop, skip"),
        ("data.holdout=0", "data.holdout is 0.0"),
        ("data.holdout=1", "data.holdout is 1.0"),
        ("model.temporal.dropout=20", "model.temporal.dropout is 20.0; the most is 1"),
        ("model.localizer.kernel_size=4", "model.localizer.kernel_size is 4; it must be odd"),
        ("model.temperature=0", "model.temperature is 0.0; it must be above 0"),
        ("model.text.template=a video", "has no {} for the class name"),
        ("train=3", "train is a section, not a setting"),
        ("model.text=[a]", "model.text is a section, not a setting"),
        ("train.epochs", "--set train.epochs: write section.key=value"),
    ],
)
def test_a_wrong_value_is_told_what_is_right(assignment: str, message: str) -> None:
    error = refuse(assignment)
    assert message in error


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = config_file(tmp_path, "train: {epochs: 0, sede: 1}\ndata: {setting: 60_40}")
    with pytest.raises(StaleError) as caught:
        load_config([path], ["model.temperature=-1", "data.missing=maybe"])
    text = str(caught.value)
    for part in ("train.epochs is 0", "'train.sede'", "'60_40'", "model.temperature is -1.0", "'maybe'"):
        assert part in text
    assert text.count(str(path)) == 3
    assert "--set data.missing=maybe: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "not valid YAML"),
        ("train:\n\tepochs: 3", "not valid YAML"),
        ("train: {epochs: 3}\ntrain: {seed: 3}", "key 'train' given twice"),
        ("train:\n  epochs: 3\n  epochs: 4", "key 'epochs' given twice"),
        ("- train\n- data", "sections such as 'train:' with their keys are expected"),
        ("just words", "sections such as 'train:' with their keys are expected"),
        ("train: 3", "train is a section, not a setting"),
        ("data: {split: {a: 1}}", "unknown key 'data.split.a'; did you mean 'data.split'?"),
        ("? [a, b]\n: 3", "not valid YAML"),
        ("--- 1\n--- 2", "not valid YAML"),
    ],
)
def test_faulty_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = config_file(tmp_path, text)
    with pytest.raises(StaleError) as caught:
        load_config([path])
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match=f"^configuration not found: {tmp_path}/none.yaml$"):
        load_config([tmp_path / "none.yaml"])


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_no_text_behind_set_crashes(text: str) -> None:
    for key in ("train.epochs", "data.splits", "data.annotations", "detection.thresholds", "train"):
        try:
            load_config([], [f"{key}={text}"])
        except StaleError:
            continue


def test_require_names_every_empty_key() -> None:
    config = load_config([], ["data.features=f.h5"])
    with pytest.raises(StaleError, match="^not set: data.annotations, model.text.weights; .* --set data.annotations="):
        require(config, "data.annotations", "data.features", "model.text.weights")


def test_two_configurations_share_nothing() -> None:
    """Mutable defaults would leak one run's settings into the next."""
    first: Any = Config()
    first.detection.thresholds.append(0.95)
    first.model.text.prompt = "template"
    assert Config().detection.thresholds[-1] == 0.9
    assert Config().model.text.prompt == "learned"
