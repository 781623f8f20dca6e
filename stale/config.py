"""Every setting once, with its unit or reason; strict reading of YAML files and ``--set section.key=value``.

Sources: [P] the paper's poster, [C] the released code, [U] recalled of the paper and not checked, else ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stale.errors import StaleError
from stale.files import read_text, write_text


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


def _at_least(default: float | None, minimum: float) -> Any:
    return field(default=default, metadata={"minimum": minimum})


_MOST = 1_000_000  # any whole number without a maximum of its own: a slip of the keyboard must not ask for all memory


def _between(default: float, minimum: float, maximum: float) -> Any:
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


@dataclass
class DataConfig:
    """What to train and test on."""

    dataset: str = "activitynet"  # names the splits' sub-folder and the tIoUs
    annotations: str = ""  # JSON in ActivityNet's layout
    features: str | list[str] = ""  # folder of .npy or HDF5 file; of several, the features stand side by side
    splits: str | None = None  # folder of the official lists; null draws seeded random splits
    setting: str = _choice("75_25", "50_50", "closed", "seen_cv")  # seen_cv: a fold of the seen classes is tested
    split: int = _between(0, 0, 9)
    cv_setting: str = _choice("50_50", "75_25")  # whose seen classes seen_cv cuts
    folds: int = _at_least(3, 2)  # of seen_cv
    fold: int = _at_least(0, 0)  # the one whose classes are pseudo-unseen
    num_snippets: int = _at_least(100, 2)  # T: 100 ActivityNet, 256 THUMOS14 [U]
    missing: str = _choice("stop", "skip")  # videos without features
    misfit: str = _choice("stop", "skip", "keep")  # features far longer or shorter than the annotated duration
    resident: str = _choice("auto", "always", "never")  # features in memory; never: packed ones stay in their file
    instances: str = _choice("all", "last")  # of a training video; [C] keeps the last alone
    shrink: float = _at_least(0.0, 0)  # snippets taken off a training instance on each side; [C] 1
    drop_shorter: float = _at_least(0.0, 0)  # snippets: training instances that are then shorter are dropped [C]
    train_subset: str = "training"
    test_subset: str = "validation"
    holdout: float = 0.1  # share of the seen training videos that chooses the checkpoint

    @property
    def number(self) -> int:
        """The split, or the fold of seen_cv: what tells the runs of one setting apart."""
        return self.fold if self.setting == "seen_cv" else self.split

    @property
    def tested_subset(self) -> str:
        """The subset whose videos are tested: pseudo-unseen classes have only the training videos."""
        return self.train_subset if self.setting == "seen_cv" else self.test_subset


@dataclass
class TextConfig:
    """Language embedding (section 2)."""

    weights: str = ""  # a file, or the name of an OpenAI model such as ViT-B/16
    encoder: str = _choice("finetune", "frozen", "none")  # [P]; none: an embedding a seen class, blind to other names
    prompt: str = _choice("learned", "template")  # [P]; [C] used a template
    context_tokens: int = _at_least(16, 1)  # N is not published; 16 is CoOp's
    context_init: str | None = None  # words the context tokens start as, in place of N random ones (CoOp)
    template: str = "a video of action {}"  # [C]
    start_share: float = _between(0.0, 0, 1)  # of tested weights: the starting tower's and context_init's (ours)


@dataclass
class TemporalConfig:
    """Context over time (section 1)."""

    kind: str = _choice("transformer", "conv", "none")  # [P]
    layers: int = _at_least(1, 1)  # [C]
    heads: int = _at_least(4, 1)  # [C]
    dropout: float = _between(0.2, 0, 1)  # [C]


@dataclass
class MaskingConfig:
    """Representation masking (section 3)."""

    kind: str = _choice("maskformer", "conv1d", "none", "gt", "conv_stack")  # [P]; gt an oracle; conv_stack ours
    applied: bool = True  # to the features; [C] learns the mask and does not apply it
    queries: int = _at_least(20, 1)  # Q [P]
    layers: int = _at_least(2, 1)
    heads: int = _at_least(8, 1)
    hidden: int = _at_least(128, 1)  # channels of conv_stack
    dropout: float = _between(0.1, 0, 1)
    threshold: float = _between(0.5, 0, 1)  # θ_bin, not published
    gradient: str = _choice("hard", "straight_through", "soft")


@dataclass
class AdaptationConfig:
    """Cross-adaptation (section 4)."""

    enabled: bool = True  # [P]
    heads: int = _at_least(8, 1)
    dropout: float = _between(0.1, 0, 1)
    alpha: float = 1e-3  # initial weight of the residual [U]


@dataclass
class LocalizerConfig:
    """Mask localizer (section 5)."""

    kind: str = _choice("dynamic", "plain")  # [P]; [C] is plain
    coordinates: str = _choice("absolute", "relative")  # output channels are places [P] or offsets (ours)
    layers: int = _at_least(3, 1)  # [P]
    hidden: int = _at_least(256, 1)  # channels
    kernel_size: int = _at_least(3, 1)  # not published
    bank: int = _at_least(4, 1)  # kernels mixed by attention


@dataclass
class ModelConfig:
    """STALE's components."""

    text: TextConfig = field(default_factory=TextConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    localizer: LocalizerConfig = field(default_factory=LocalizerConfig)
    visual_projection: bool = False  # learn D → C, for features of another width (I3D)
    temperature: float = 0.01  # τ [P, C]
    classifier_features: str = _choice("shared", "raw", "own")  # F_vis; as extracted; own temporal model (baselines)
    raw_similarity: float = _between(0.0, 0, 1)  # of the class logits: features as extracted, unadapted text (ours)


@dataclass
class LossConfig:
    """Weights of the objectives (section 7) and their constants."""

    classification: float = _at_least(1.0, 0)  # [U]
    localization: float = _at_least(1.0, 0)  # [U]
    foreground: float = _at_least(1.0, 0)  # [U]
    consistency: float = _at_least(1.0, 0)  # [U]
    dice: float = _at_least(0.4, 0)  # weight of 1 - Dice inside the localization loss [U]
    classification_form: str = _choice("cross_entropy", "focal", "pooled")  # [U]; [C] focal; of whole instances
    foreground_form: str = _choice("dice", "bce", "dice_bce")  # [U]; [C] bce; the sum is ours: Dice alone can stall
    consistency_snippets: int = _at_least(10, 1)  # top-scoring snippets that both branches pool
    consistency_threshold: float = _between(0.5, 0, 1)  # on class scores and masks
    consistency_gradient: str = _choice("both", "visual")  # into both heads; [C] into F_vis alone
    anchor: float = _at_least(0.0, 0)  # weight of 1 - cos of the text and the starting tower's of the template (KgCoOp)
    center: float = _between(1.0, 0, 1)  # share of an instance whose snippets answer for it (as in ActionFormer)


@dataclass
class TrainConfig:
    """Optimisation."""

    epochs: int = _at_least(15, 1)  # authors, issue 35
    batch_size: int = _at_least(100, 1)  # [C]
    learning_rate: float = _at_least(1e-4, 0)  # 1e-4 ActivityNet, 1e-5 THUMOS14 [U]
    text_learning_rate: float | None = _at_least(None, 0)  # of text tower and context tokens; null: the same
    weight_decay: float = _at_least(0.02, 0)  # decoupled [C for the value]
    clip_norm: float = _at_least(1.0, 0)  # of the gradient; 0 turns clipping off
    seed: int = _between(0, 0, 2**32 - 1)
    deterministic: bool = False  # on a GPU: the same to the bit every time, slower; a CPU is so anyway
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    compile: bool = False  # the step, by torch.compile: minutes at the start; not measured on a GPU
    precision: str = _choice("auto", "float32", "bfloat16", "float16")  # auto: bfloat16 on a GPU, else float32
    choose_on: str = _choice("held_out", "unseen_loss")  # the best checkpoint; [C] the loss on unseen TEST classes
    validate_every: int = _at_least(1, 1)  # epochs between two looks at the held-out seen videos
    log_interval: int = _at_least(10, 1)  # steps
    save_minutes: float = _at_least(10.0, 0)  # inside a long epoch, besides at its end; 0: only there


@dataclass
class DetectionConfig:
    """From masks to detections (section 8)."""

    top_snippets: int = _at_least(100, 1)  # (snippet, class) pairs whose masks are read; [C] 10
    templates: list[str] | None = None  # around a class's phrase after the context; their mean is the class (ours)
    background_bias: float = 0.0  # added to the background's logit, for vocabularies of another size (ours)
    foreground_weight: bool = True  # class score × L: a masked-out snippet is no evidence of any class (ours)
    regions: str = _choice("masks", "foreground", "both")  # of what: the snippets' masks [P], L (ours), or both
    video_evidence: bool = False  # class scores × the probability of the class in the whole video (ours)
    video_temperature: float = _at_least(0.01, 1e-4)  # of that probability
    foreground_score: str = _choice("max", "mean", "contrast")  # of L inside its regions, as region_score
    fineness: int = _between(1, 1, 8)  # L's regions are read at this many times T snippets (ours)
    windows: bool = False  # masks also read in windows of T of these snippets, half overlapping (ours)
    thresholds: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])  # Θ
    fill_holes: bool = False  # a curve's regions become one, first to last; [C] merges instances so
    region_score: str = _choice("max", "mean", "contrast")  # of a mask inside a candidate: max [U]; the others are ours
    min_length: float = _between(0.0, 0, 1)  # of a candidate, as a share of the video; [C] 0.02
    nms: str = _choice("gaussian", "official")  # official: × exp(-10·tIoU²) / 0.6, which can raise a score [C]
    nms_sigma: float = _at_least(0.5, 1e-6)  # Gaussian SoftNMS (Bodla et al. 2017)
    candidates: int = _at_least(400, 1)  # best candidates a video that enter SoftNMS
    max_detections: int = _at_least(100, 1)  # a video [C]
    name_by: str = _choice("snippets", "proposals")  # proposals: found without classes, then named (baselines)
    oracle: str = _choice("none", "masks", "proposals")  # ground truth in place of L, or of all candidates
    batch_size: int = _at_least(32, 1)  # videos


@dataclass
class Config:
    """All of it. Sections and keys are exactly those of the YAML files."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)

    @property
    def tested_snippets(self) -> int:
        """Snippets at which a video is read for detection: a multiple of T."""
        return self.data.num_snippets * self.detection.fineness


def load_config(files: Sequence[str | Path] = (), assignments: Sequence[str] = ()) -> Config:
    """Read YAML ``files`` (later ones win), then ``section.key=value`` assignments.

    Raises:
        StaleError: unreadable YAML, an unknown key (the nearest is named), a wrong type or value; all at once.
    """
    values: dict[str, tuple[Any, str]] = {}  # dotted key → (text as written, where)
    for file in files:
        values.update({key: (value, str(file)) for key, value in _flatten(_read_yaml(file))})
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise StaleError(f"--set {assignment}: write section.key=value")
        values[key.strip()] = (_parse_yaml(text, f"--set {assignment}"), f"--set {assignment}")

    config, problems = Config(), []
    for key, (value, where) in values.items():
        try:
            _assign(config, key, value)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    problems.extend(_impossible(config))
    if problems:
        raise StaleError("; ".join(problems))
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that :func:`load_config` reads back."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def differing_keys(first: Config, second: Config) -> list[str]:
    """The dotted keys whose values differ."""
    values, others = (dict(_flatten(dataclasses.asdict(config))) for config in (first, second))
    return [key for key, value in values.items() if value != others[key]]


def require(config: Config, *keys: str) -> None:
    """Raise a StaleError that names every one of the dotted ``keys`` left empty."""
    fields = _fields(config)
    empty = [key for key in keys if not getattr(*fields[key][:2])]
    if empty:
        raise StaleError(f"not set: {', '.join(empty)}; give them in the configuration or by --set {empty[0]}=...")


def _read_yaml(path: str | Path) -> Mapping[str, Any]:
    where = f"configuration {path}"
    tree = _parse_yaml(read_text(path, "configuration"), where)
    if tree is not None and not isinstance(tree, Mapping):
        raise StaleError(f"{where}: sections such as 'train:' with their keys are expected, not {str(tree)[:40]!r}")
    return tree or {}


class _Loader(yaml.BaseLoader):
    """Leaves every scalar as written (YAML 1.1 would read 75_25 as 7525 and 1e-4 as a string), no key twice.

    Aliases are refused: a few lines of them stand for more than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read here; write it out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise StaleError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise StaleError(f"{where}: not valid YAML: nested too deep") from None


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fields(section: Any, prefix: str = "") -> dict[str, tuple[Any, str, Any, Any]]:
    """Dotted key → (owner, attribute, type, metadata) of every setting below ``section``."""
    hints, found = typing.get_type_hints(type(section)), {}
    for item in dataclasses.fields(section):
        value, key = getattr(section, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            found.update(_fields(value, f"{key}."))
        else:
            found[key] = (section, item.name, hints[item.name], item.metadata)
    return found


def _assign(config: Config, key: str, value: Any) -> None:
    fields = _fields(config)
    if any(name.startswith(f"{key}.") for name in fields):
        if value in ("", None):
            return  # a section whose keys are all left out
        raise ValueError(f"{key} is a section, not a setting; write its keys below it")
    if key not in fields:
        nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
        raise ValueError(f"unknown key '{key}'" + (f"; did you mean '{nearest[0]}'?" if nearest else ""))
    owner, attribute, kind, metadata = fields[key]
    converted = _convert(value, kind, key)
    if "choices" in metadata and converted not in metadata["choices"]:
        raise ValueError(f"{key} is '{converted}'; use one of {', '.join(metadata['choices'])}")
    if "minimum" in metadata and converted is not None and converted < metadata["minimum"]:
        raise ValueError(f"{key} is {converted}; the least is {metadata['minimum']}")
    most = metadata.get("maximum", _MOST if kind is int else math.inf)
    if isinstance(converted, (int, float)) and converted > most:
        raise ValueError(f"{key} is {_brief(converted)}; the most is {most}")
    setattr(owner, attribute, converted)


def _convert(value: Any, kind: Any, key: str) -> Any:
    """The text (or list of texts) ``value`` as the type ``kind``."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        inner = next((o for o in options if (typing.get_origin(o) is list) == isinstance(value, list)), options[0])
        optional = len(options) < len(typing.get_args(kind))
        empty = value is None or (isinstance(value, str) and value.lower() in ("", "null", "~", "none"))
        return None if optional and empty else _convert(value, inner, key)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{key} must be a list such as {_LISTS[typing.get_args(kind)[0]]}, not {_brief(value)}")
        return [_convert(item, typing.get_args(kind)[0], key) for item in value]
    if not isinstance(value, str):
        raise ValueError(f"{key} must be {_describe(kind)}, not {_brief(value)}")
    if kind is str:
        return value
    try:
        converted = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"{key} must be {_describe(kind)}, not {_brief(value)}") from None
    if kind is float and not math.isfinite(converted):
        raise ValueError(f"{key} must be {_describe(kind)}, not {_brief(value)}")
    return converted


def _brief(value: Any) -> str:
    """A value as the message shows it: a line, not a file."""
    return reprlib.repr(value)


_LISTS = {float: "[0.3, 0.5]", str: "[a.h5, b.h5]"}


def _describe(kind: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _impossible(config: Config) -> Iterator[str]:
    if not 0 < config.data.holdout < 1:
        yield f"data.holdout is {config.data.holdout}; a share between 0 and 1 chooses the checkpoint"
    if config.model.localizer.kernel_size % 2 == 0:
        yield f"model.localizer.kernel_size is {config.model.localizer.kernel_size}; it must be odd"
    if config.model.temperature <= 0:
        yield f"model.temperature is {config.model.temperature}; it must be above 0"
    if "{}" not in config.model.text.template:
        yield f"model.text.template '{config.model.text.template}' has no {{}} for the class name"
    for template in config.detection.templates or ():
        if "{}" not in template:
            yield f"detection.templates: '{template}' has no {{}} for the class name"
    yield from _clashes(config)
    if not all(0 <= threshold < 1 for threshold in config.detection.thresholds):
        yield f"detection.thresholds {config.detection.thresholds}: each must be at least 0 and below 1"


def _clashes(config: Config) -> Iterator[str]:
    """Switches that cannot go together."""
    model = config.model
    if config.detection.name_by == "proposals" and model.masking.kind == "none":
        yield "detection.name_by=proposals ranks proposals by the foreground; model.masking.kind=none has none"
    if model.classifier_features != "shared" and (model.adaptation.enabled or model.masking.applied):
        yield (
            f"model.classifier_features={model.classifier_features} names without F_fg; set "
            "model.adaptation.enabled=false and model.masking.applied=false"
        )
    if model.classifier_features == "raw" and model.visual_projection:
        yield "model.classifier_features=raw compares features with text as they are; a learned projection cannot"
    if config.detection.regions != "masks" and model.masking.kind in ("none", "gt"):
        yield (
            f"detection.regions={config.detection.regions} reads the predicted foreground; "
            f"model.masking.kind={model.masking.kind} predicts none"
        )
    if config.detection.regions == "foreground" and config.detection.name_by == "proposals":
        yield "detection.name_by=proposals has candidates of its own; leave out detection.regions=foreground"
    if config.detection.windows and (config.detection.fineness == 1 or model.masking.kind == "gt"):
        yield "detection.windows=true needs detection.fineness of 2 or more, and a mask that is predicted"
    if model.text.encoder == "none" and (model.text.start_share or config.loss.anchor):
        yield "model.text.encoder=none has no starting text; leave out model.text.start_share and loss.anchor"
    if model.text.encoder == "none" and model.text.context_init:
        yield "model.text.encoder=none has no prompt; leave out model.text.context_init"
