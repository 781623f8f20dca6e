"""Configuration: strict, without YAML's surprises, every problem in one message, and the same after a round trip."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stale.config import (
    ABBREVIATIONS,
    Config,
    flat,
    load_config,
    missing_files,
    save_config,
    settings,
    settings_table,
)
from stale.errors import StaleError
from tests.helpers import REPOSITORY

CONFIGS = REPOSITORY / "configs"


def config_file(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(*assignments: str, files: tuple[Path, ...] = ()) -> str:
    with pytest.raises(StaleError) as caught:
        load_config(files, assignments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Values arrive as they were written


@pytest.mark.parametrize(
    ("key", "written", "value", "trap"),
    [
        ("data.setting", "75_25", "75_25", 7525),
        ("train.learning_rate", "1e-4", 1e-4, "1e-4"),
        ("train.epochs", "010", 10, 8),
        ("data.dataset", "on", "on", True),
        ("data.dataset", "null", "null", None),
        ("model.adaptation.enabled", "FALSE", False, False),
        ("data.splits", "None", None, "None"),
        ("train.text_learning_rate", "", None, None),
        ("model.text.context_init", '"  "', None, "  "),
        ("detection.thresholds", "[0.3, .4, 5e-1]", [0.3, 0.4, 0.5], [0.3, 0.4, "5e-1"]),
        ("data.features", "[a, b]", ["a", "b"], ["a", "b"]),
        ("detection.oracle", "masks", ["masks"], "masks"),
    ],
)
def test_values_are_as_written(tmp_path: Path, key: str, written: str, value: Any, trap: Any) -> None:
    """In a file and behind --set; ``trap`` is what YAML 1.1 makes of it."""
    assert yaml.safe_load(written) == trap
    *sections, name = key.split(".")
    nested = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    path = config_file(tmp_path, f"{nested}{'  ' * len(sections)}{name}: {written}\n")
    for config in (load_config([path]), load_config([], [f"{key}={written}"])):
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)


def test_later_files_win_and_the_command_line_wins_over_all(tmp_path: Path) -> None:
    first = config_file(tmp_path, "train: {epochs: many, seed: 1, batch_size: 1}", "first.yaml")
    second = config_file(tmp_path, "train: {epochs: 2, seed: 2}", "second.yaml")
    train = load_config([first, second], ["train.epochs=3"]).train
    assert (train.epochs, train.seed, train.batch_size) == (3, 2, 1), "a replaced value may even be wrong"


@pytest.mark.parametrize("text", ["", "# nothing\n", "data:\ntrain:\n  # epochs: 3\n"])
def test_empty_files_and_sections_change_nothing(tmp_path: Path, text: str) -> None:
    assert load_config([config_file(tmp_path, text)]) == Config()


# The round trip


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(1e-12, 10), st.floats(0, 1) | st.none())
@hypothesis_settings(max_examples=30, deadline=None)
def test_a_saved_configuration_is_loaded_the_same(
    tmp_path_factory: pytest.TempPathFactory, text: str, rate: float, optional: float | None
) -> None:
    config = Config()
    config.data.annotations, config.train.learning_rate, config.train.text_learning_rate = text, rate, optional
    path = tmp_path_factory.mktemp("round") / "a.yaml"
    save_config(config, path)
    assert load_config([path]) == config
    assert all(f"{key.rpartition('.')[2]}:" in path.read_text() for key in settings(Config))


# Errors


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.localiser.bank", "model.localizer.bank"),
        ("train.lr", "train.learning_rate"),
        *(("optimizer.wd", "train.weight_decay"), ("model.n_ctx", "model.text.context_tokens")),
        ("zzz", None),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, nearest: str | None) -> None:
    message = f"unknown key '{key}'" + (f"; did you mean '{nearest}'?" if nearest else "")
    assert refused(f"{key}=3") == f"--set {key}=3: {message}"
    path = config_file(tmp_path, yaml.safe_dump({key: 3}))
    assert refused(files=(path,)) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs=many", "train.epochs must be a valid integer, not 'many'"),
        ("train.learning_rate=nan", "train.learning_rate must be a finite number, not 'nan'"),
        ("model.adaptation.enabled=yes", "model.adaptation.enabled must be true or false, not 'yes'"),
        ("data.annotations={a: b}", "data.annotations must be a valid string, not {'a': 'b'}"),
        ("train.epochs=0", "train.epochs must be greater than or equal to 1, not '0'"),
        ("data.setting=60_40", "data.setting must be '75_25', '50_50', 'closed' or 'seen_cv', not '60_40'"),
        ("model.temporal.kind=ms_tcn model.temporal.layers=9", "layers=9 dilate beyond the 100 snippets of a video"),
        ("model.localizer.kernel_size=4", "model.localizer.kernel_size is 4; it must be odd"),
        ("model.text.template=a video", "model.text.template 'a video' has no {} for the class name"),
        ("detection.thresholds=0.5", "detection.thresholds must be a list such as [a, b], not '0.5'"),
        ("detection.thresholds=[]", "detection.thresholds must have at least 1 item, not []"),
        ("model.masking.kind=none detection.proposals=foreground", "=foreground needs the predicted foreground"),
        ("model.masking.crop=localizer", "model.masking.crop=localizer puts M in the place of L on F_vis; set"),
        ("model.localizer.kind=none model.masking.crop=localizer", "crop=localizer puts M in the place of L"),
        ("detection.one_label=true detection.classify_by=proposals", "set it false with detection.classify_by=prop"),
        ("loss.classification_form=pooled loss.classification_video=1", "form=pooled has no term of the video"),
        ("model.localizer.kind=none loss.classification_form=pooled", "pooled needs the targets of M; model.localizer"),
        ("detection.classify_by=calibrated detection.video_score=true", "set detection.video_score=false"),
        ("detection.oracle=[masks, M]", "oracle must be 'masks', 'localizer', 'labels' or 'proposals', not 'M'"),
        ("detection.oracle=[proposals, labels, masks]", "detection.oracle=proposals replaces what masks and localizer"),
        ("train=3", "train is a section, not a setting"),
        ("train.epochs", "--set train.epochs: write section.key=value"),
    ],
)
def test_a_wrong_value_is_told_what_is_right(assignment: str, message: str) -> None:
    assert message in refused(*(assignment.split() if assignment.count("=") == 2 else [assignment]))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = config_file(tmp_path, "train: {epochs: 0, sede: 1}\ndata: {setting: 60_40}")
    text = refused("model.temperature=-1", "data.missing=maybe", files=(path,))
    for part in ("train.epochs must be", "'train.sede'", "'60_40'", "model.temperature must be", "'maybe'"):
        assert part in text
    assert text.count(str(path)) == 3
    assert "--set data.missing=maybe: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "not valid YAML") for text in ("train: [", "train:\n\tepochs: 3", "? [a, b]\n: 3", "[" * 5_000)),
        ("train: {epochs: 3}\ntrain: {seed: 3}", "key 'train' given twice"),
        ("train: &a {seed: 3}\nloss: *a", "aliases (*name) are not supported"),
        ("data: {split: {a: 1}}", "unknown key 'data.split.a'; did you mean 'data.split'?"),
        ("train: {seed: !!python/object/apply:os.mkdir ['evil']}", "must be a valid integer, not ['evil']"),
        (None, "configuration not found"),
    ],
)
def test_faulty_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = config_file(tmp_path, text) if text else tmp_path / "absent.yaml"
    error = refused(files=(path,))
    assert str(path) in error
    assert message in error


def test_a_plain_value_of_set_stands_as_it_is() -> None:
    assert load_config([], ["data.annotations = a #1: b.json"]).data.annotations == "a #1: b.json"


# The files of the repository

OVERLAYS = [*CONFIGS.glob("official_code*.yaml"), *CONFIGS.glob("baselines/*.yaml")]
OVERLAYS += [CONFIGS / "stale_plus.yaml", CONFIGS / "recalled_values.yaml"]


@pytest.mark.parametrize(
    "config", sorted({*CONFIGS.glob("*.yaml")} - {*OVERLAYS, CONFIGS / "tables.yaml"}), ids=lambda path: path.stem
)
def test_the_configurations_of_the_repository_are_sound(config: Path) -> None:
    assert all(path for _, path in missing_files(load_config([config]))), "everything is set"
    assert not any(str(value).startswith(("..", "/")) for value in flat(load_config([config])).values())


@pytest.mark.parametrize("overlay", sorted(OVERLAYS), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["activitynet", "thumos14_captions"])
def test_overlays_fit_the_configurations_of_the_data_sets(name: str, overlay: Path) -> None:
    base = load_config([CONFIGS / f"{name}.yaml"])
    combined = load_config([CONFIGS / f"{name}.yaml", overlay])
    assert combined != base
    assert combined.data.features == base.data.features


def test_the_list_of_settings_is_that_of_the_code() -> None:
    """After a change of a setting, put ``python train.py --settings`` below the mark."""
    assert [key for key, field in settings(Config).items() if not field.description] == []
    assert set(ABBREVIATIONS.values()) <= set(settings(Config))
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert text.split("<!-- settings -->\n")[1] == settings_table()
