"""All settings of a run, each with default, range and description; YAML files and ``--set section.key=value``.

A description ends with the source of the default: [P] the authors' poster, [C] the released code, [I] an issue thread,
[U] recalled of the paper and not checked; without a tag it is this project's own.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from stale.errors import StaleError
from stale.io import read_text, write_text

# OpenAI's models: name → SHA-256 of the file, which is a part of its address too.
MODELS = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
_MOST = 1_000_000  # limit of sizes that have no other: a typing error must not allocate all memory
Size = Annotated[int, Field(ge=1, le=_MOST)]
Layers = Annotated[int, Field(ge=1, le=100)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float | None, Field(ge=0, le=10)]

# Settings that have no effect on results.
WITHOUT_EFFECT = {"train.device", "train.log_interval", "detection.batch_size"}

# Common abbreviations, and the setting that each stands for.
ABBREVIATIONS = {
    "lr": "train.learning_rate",
    "wd": "train.weight_decay",
    "bs": "train.batch_size",
    "amp": "train.precision",
    "tau": "model.temperature",
    "theta": "model.masking.threshold",
    "n_ctx": "model.text.context_tokens",
    "num_frames": "data.num_snippets",
    "topk": "detection.top_snippets",
}


class Section(BaseModel):
    """A section of the configuration. Values are plain Python, or the text that stands in a YAML file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class DataConfig(Section):
    """What to train and test on."""

    dataset: str = Field("activitynet", description="names the folder of its split lists, and its protocol")
    annotations: str = Field("", description="JSON file in ActivityNet's layout")
    features: str | list[str] = Field("", description="folder or file of features; several are concatenated along C")
    splits: str | None = Field(None, description="folder of split lists; null: ten seeded random splits")
    setting: Literal["75_25", "50_50", "closed", "seen_cv"] = Field(
        "75_25", description="share of seen and unseen classes; seen_cv: a fold of the seen classes is tested"
    )
    split: int = Field(0, ge=0, le=9, description="number of the split")
    cv_setting: Literal["50_50", "75_25"] = Field("50_50", description="setting whose seen classes seen_cv divides")
    folds: int = Field(3, ge=2, le=_MOST, description="folds of seen_cv")
    fold: int = Field(0, ge=0, le=_MOST, description="fold of seen_cv whose classes are pseudo-unseen")
    id_pattern: str = Field("{id}", description="names of features around a video's id, such as {id}_clip")
    stride: int = Field(1, ge=1, le=_MOST, description="frames between features that others extracted in windows")
    fps: float | None = Field(None, gt=0, le=1000, description="frames a second of the videos; null: as annotated")
    window: int | None = Field(None, ge=1, le=_MOST, description="frames of each window; null: stride")
    localizer_features: str | None = Field(
        None, description="folder or file of further features, of any rate and width, for the point head alone"
    )
    sampling: Literal["rescale", "native"] = Field(
        "rescale", description="native: videos keep their rate; every video has num_snippets: rescale [P, C]"
    )
    num_snippets: int = Field(100, ge=2, le=_MOST, description="T; THUMOS14: 256 [U], ActivityNet: 100 [C]")
    rate: float | None = Field(None, gt=0, le=1000, description="native: snippets a second; null: the features' own")
    max_snippets: int = Field(
        2304, ge=64, le=_MOST, description="native: longest crop, and window at detection, there a multiple of 128"
    )
    missing: Literal["stop", "skip"] = Field("stop", description="videos without features")
    duration_mismatch: Literal["stop", "skip", "keep"] = Field(
        "stop", description="features that last over 10 % (at least 3 s) more or less than the annotated duration"
    )
    instances: Literal["all", "last"] = Field("all", description="training instances of a video; released code: last")
    shrink: Weight = Field(0.0, description="snippets removed from each side of a training instance; released code: 1")
    drop_shorter: Weight = Field(0.0, description="snippets; shorter training instances are dropped; released code: 1")
    train_subset: str = Field("training", description="subset of the annotations to train on")
    test_subset: str = Field("validation", description="subset of the annotations to test on; several: validation+test")
    tious: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, min_length=1, description="tIoU thresholds of mAP; null: those of the data set's protocol"
    )
    holdout: float = Field(0.1, ge=0, lt=1, description="share of seen training videos; 0: the last checkpoint")

    @property
    def longest(self) -> int:
        """The number of snippets of every video, or the most that the model sees at once."""
        return self.max_snippets if self.sampling == "native" else self.num_snippets

    @property
    def number(self) -> int:
        """The split, or the fold of seen_cv: what distinguishes the runs of one setting."""
        return self.fold if self.setting == "seen_cv" else self.split

    @property
    def tested_subset(self) -> str:
        """The subset whose videos are tested: pseudo-unseen classes have only the training videos."""
        return self.train_subset if self.setting == "seen_cv" else self.test_subset


class TextConfig(Section):
    """Language embedding."""

    weights: str = Field("", description="file of CLIP weights, or the name of an OpenAI model such as ViT-B/16")
    activation: Literal["auto", "quick_gelu", "gelu"] = Field(
        "auto", description="activation in the weights; auto: OpenAI's quick_gelu; open_clip's weights mostly need gelu"
    )
    embeddings: str = Field(
        "", description="file of class embeddings of any model, in place of weights; prompt: template, encoder: frozen"
    )
    adapter: Literal["none", "linear"] = Field("none", description="learned residual of embeddings, 0 at the start")
    heads: Size | None = Field(None, description="attention heads of weights; null: width / 64, as in all of OpenAI's")
    encoder: Literal["finetune", "frozen", "none"] = Field(
        "finetune", description="none: a learned embedding for each seen class, which cannot name others; finetune [P]"
    )
    prompt: Literal["learned", "template"] = Field("learned", description="released code: template; learned [P]")
    context_tokens: Size = Field(16, description="N learned tokens; not published, 16 is CoOp's")
    context_init: str | None = Field(None, description="words that initialize the context tokens, in place of N (CoOp)")
    template: str = Field("a video of action {}", description="text around the class name [C]")

    @model_validator(mode="before")
    @classmethod
    def _without_encoder(cls, values: Any) -> Any:
        """Class embeddings from a file leave nothing to train, unless a setting asks for it."""
        given = isinstance(values, dict) and values.get("embeddings")
        return {"prompt": "template", "encoder": "frozen", **values} if given else values


class TemporalConfig(Section):
    """Temporal model of the snippet features."""

    kind: Literal["transformer", "conv", "ms_tcn", "none"] = Field("transformer", description="transformer [P]")
    layers: Layers = Field(1, description="layers; of ms_tcn the n-th has dilation 2^(n - 1) [C]")
    heads: Size = Field(4, description="attention heads [C]")
    dropout: Share = Field(0.2, description="dropout [C]")


class MaskingConfig(Section):
    """Class-agnostic representation masking."""

    kind: Literal["maskformer", "conv1d", "none", "gt"] = Field(
        "maskformer", description="gt: the ground truth, an oracle; others: rows of the ablation [P]"
    )
    applied: bool = Field(True, description="multiply the features by the mask; released code: false; true [P]")
    crop: Literal["none", "localizer"] = Field("none", description="localizer: to where M is high; released code")
    queries: Size = Field(20, description="Q mask queries [P]")
    layers: Layers = Field(2, description="decoder layers")
    heads: Size = Field(8, description="attention heads of the decoder")
    blocks: int = Field(3, ge=0, le=100, description="convolutions before the queries; 0: queries on F_vis")
    hidden: Size = Field(128, description="channels of the convolutions and queries, with blocks")
    feature_dropout: Share = Field(0.3, description="dropout of F_vis and the convolutions, with blocks")
    dropout: Share = Field(0.1, description="dropout of the decoder")
    open_start: bool = Field(True, description="L starts at about 0.6; at a random start it can mask every snippet")
    threshold: Share = Field(0.3, description="θ_bin; not published. A snippet that is masked out tells no class")
    gradient: Literal["hard", "straight_through", "soft"] = Field("hard", description="gradient of the thresholding")


class AdaptationConfig(Section):
    """Vision-language cross-adaptation."""

    enabled: bool = Field(True, description="adapt the text to each video [P]")
    heads: Size = Field(8, description="attention heads")
    dropout: Share = Field(0.1, description="dropout")
    residual: bool = Field(True, description="F_lan + α · T_c, not T_c alone; released code: false; true [P]")
    gate: bool = Field(True, description="weigh T_c by how similar a class is to the foreground; poster: false")
    alpha: float = Field(3.0, description="initial weight α of T_c; recalled: 1e-3, which changes nothing")


class LocalizerConfig(Section):
    """Action mask localizer."""

    kind: Literal["dynamic", "plain", "none"] = Field("dynamic", description="released code: plain; dynamic [P]")
    coordinates: Literal["absolute", "pairwise"] = Field(
        "absolute", description="output; pairwise: an embedding of the snippet to compare; positions in the video [P]"
    )
    bottleneck: int = Field(0, ge=0, le=_MOST, description="channels to which F_vis is reduced first; 0: not reduced")
    dropout: Share = Field(0.5, description="dropout before the bottleneck")
    embedding: Size = Field(16, description="output channels of pairwise coordinates")
    layers: Layers = Field(3, description="convolutions [P]")
    hidden: Size = Field(256, description="channels")
    kernel_size: Size = Field(3, description="kernel size, odd; not published")
    bank: Size = Field(4, description="kernels that attention mixes")


class PointsConfig(Section):
    """Class-agnostic point head, beside or in place of the action mask localizer [ours]."""

    enabled: bool = Field(False, description="locate instances at points of several temporal scales (ActionFormer)")
    levels: int = Field(6, ge=1, le=8, description="levels of the pyramid, each at half the rate of the one before")
    hidden: Size = Field(128, description="channels")
    layers: Layers = Field(2, description="convolutions of the embedding, and of each head before its output")
    dropout: Share = Field(0.3, description="dropout of the input features")
    radius: float = Field(1.5, gt=0, description="positive points lie this near an instance's center, in their strides")


class ModelConfig(Section):
    """STALE's components."""

    text: TextConfig = Field(default_factory=TextConfig)
    temporal: TemporalConfig = Field(default_factory=TemporalConfig)
    masking: MaskingConfig = Field(default_factory=MaskingConfig)
    adaptation: AdaptationConfig = Field(default_factory=AdaptationConfig)
    localizer: LocalizerConfig = Field(default_factory=LocalizerConfig)
    points: PointsConfig = Field(default_factory=PointsConfig)
    background_init: Literal["mean_text", "random"] = Field("mean_text", description="start of the background")
    visual_projection: bool = Field(False, description="learn D → C, for features of another width (I3D)")
    temperature: float = Field(0.01, gt=0, description="τ of the classifier, at the start where it is learned [P, C]")
    clamp: float | None = Field(None, description="least value of F_fg in the classifier; released code: 1e-4")
    classifier_features: Literal["shared", "raw", "own"] = Field(
        "shared", description="features that are classified: F_vis; as extracted; of an own temporal model (baselines)"
    )


class LossConfig(Section):
    """Weights and constants of the losses."""

    classification: Weight = Field(1.0, description="weight of L_c [U]")
    localization: Weight = Field(1.0, description="weight of L_m [U]")
    foreground: Weight = Field(1.0, description="weight of L_comp [U]")
    consistency: Weight = Field(1.0, description="weight of L_const [U]")
    points: Weight = Field(1.0, description="weight of the point head's loss")
    bce: Weight = Field(1.0, description="weight of the balanced BCE inside L_m; released code: 0.4 [U]")
    dice: Weight = Field(0.4, description="weight of 1 - Dice inside L_m; released code: 0.6 [U]")
    localization_balance: Literal["column", "all"] = Field(
        "column", description="BCE balanced in each foreground column; all: over all pairs of snippets (released code)"
    )
    consistency_centered: bool = Field(True, description="less the video's mean feature; released code: false")
    classification_snippets: Weight = Field(1.0, description="weight of the snippets inside L_c; released code: 0.9")
    classification_video: Weight = Field(0.0, description="weight of the whole video inside L_c; released code: 1")
    classification_form: Literal["cross_entropy", "focal", "batch_focal", "pooled", "sigmoid"] = Field(
        "cross_entropy",
        description="sigmoid: each class by itself, at test time too, for classes that happen at once; pooled: over "
        "whole instances (EffPrompt); released code: batch_focal, focal on the batch's mean; cross_entropy [U]",
    )
    foreground_form: Literal["dice", "bce", "dice_bce"] = Field("dice", description="released code: bce; dice [U]")
    consistency_snippets: Size = Field(10, description="top-scoring snippets that both branches pool")
    consistency_threshold: Share = Field(0.5, description="threshold of class scores and masks")
    consistency_gradient: Literal["both", "visual"] = Field("both", description="released code: visual, F_vis alone")
    consistency_background: bool = Field(False, description="the background's scores count too; released code: true")


class TrainConfig(Section):
    """Optimization."""

    epochs: Size = Field(15, description="epochs [I]")
    batch_size: Size = Field(100, description="videos in a batch, of all processes together [C]")
    learning_rate: float = Field(1e-4, ge=0, le=10, description="1e-4 ActivityNet, 1e-5 THUMOS14 [U]")
    text_learning_rate: Rate = Field(None, description="of the text encoder; null: learning_rate")
    prompt_learning_rate: Rate = Field(None, description="of the context tokens; null: learning_rate")
    temperature_learning_rate: float = Field(0.0, ge=0, le=10, description="of log τ; 0: τ is fixed [P, C]")
    localizer_learning_rate: Rate = Field(None, description="of the localizer; null: learning_rate")
    temporal_learning_rate: Rate = Field(1e-5, description="of the temporal model; a higher one loses unseen classes")
    schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: the learning rates fall to 0")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the learning rates rise from 0")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weights' moving average, which is tested; 0: none")
    weight_decay: float = Field(0.02, ge=0, le=10, description="weight decay; the value is [C]")
    coupled_decay: bool = Field(False, description="L2 inside the gradient (Adam, not AdamW); released code: true")
    clip_norm: Weight = Field(1.0, description="norm to which the gradient is clipped; 0: no clipping (released code)")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of weights, batches and held-out videos")
    deterministic: bool = Field(False, description="deterministic algorithms on a GPU, slower; a CPU always is")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: bfloat16 on a GPU")
    choose_on: Literal["held_out", "unseen_loss"] = Field(
        "held_out",
        description="what chooses the best epoch; released code: unseen_loss, on the unseen TEST classes",
    )
    validate_every: Size = Field(1, description="epochs between two validations on held-out videos")
    log_interval: Size = Field(10, description="steps between two records of the losses")


class DetectionConfig(Section):
    """From the model's outputs to detections."""

    top_snippets: Size = Field(100, description="(snippet, class) pairs whose masks are decoded; released code: 10")
    foreground_weight: bool = Field(True, description="multiply class scores by L")
    proposals: list[Literal["masks", "foreground", "points", "classes"]] = Field(
        ["masks"], min_length=1, description="masks of snippets [P], regions of L, point head, regions of each class"
    )
    smoothing: int = Field(2, ge=0, description="classes: snippets on either side that a similarity is averaged over")
    video_score: bool = Field(False, description="multiply class scores by the probability of the class in the video")
    video_temperature: float = Field(0.01, ge=1e-4, description="temperature of that probability")
    one_label: bool = Field(False, description="only the class of highest mean logit in the video; released code: true")
    foreground_score: Literal["max", "contrast"] = Field("max", description="proposal_score of regions of L / max L")
    thresholds: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1, description="Θ, the mask thresholds"
    )
    fill_holes: bool = Field(False, description="a single region, from first to last snippet; released code: true")
    proposal_score: Literal["max", "contrast"] = Field("max", description="contrast: mean less that around; max [U]")
    min_length: Share = Field(0.0, description="shortest region of a mask, share of the video; released code: 0.02")
    nms: Literal["gaussian", "official"] = Field("gaussian", description="SoftNMS; released code: official")
    nms_sigma: float = Field(0.5, ge=1e-6, description="σ of Gaussian SoftNMS")
    voting: Share = Field(0.0, description="tIoU from which proposals vote on a detection's segment; 0: off")
    max_proposals: Size = Field(400, description="proposals of each source that enter SoftNMS")
    max_detections: Size = Field(100, description="detections of a video [C]")
    classify_by: Literal["snippets", "proposals", "video", "calibrated"] = Field(
        "snippets",
        description="proposals: class-agnostic proposals, then classified (baselines); video: by video_score alone; "
        "calibrated: by video and proposal, with weights fitted to the seen classes",
    )
    confidence: float = Field(0.2, gt=0, le=1, description="calibrated: factor on fitted weights, for unseen classes")
    oracle: list[Literal["masks", "localizer", "labels", "proposals"]] = Field(
        [], description="ground truth in place of L (masks), M (localizer), the video's classes, or all proposals"
    )
    batch_size: Size = Field(32, description="videos in a batch")

    @field_validator("oracle", "proposals", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        """Take a single word for a list of one."""
        return [value] if isinstance(value, str) else value


class Config(Section):
    """All sections."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    detection: DetectionConfig = Field(default_factory=DetectionConfig)

    @property
    def tested_snippets(self) -> int | None:
        """Number of snippets of a video at detection: T, or None for the videos' own rate."""
        return None if self.data.sampling == "native" else self.data.num_snippets

    @model_validator(mode="after")
    def _compatible(self) -> "Config":
        """Name all settings that exclude each other."""
        if problems := list(self._conflicts()):
            raise ValueError("; ".join(problems))
        return self

    def _conflicts(self) -> Iterator[str]:
        """One line for each pair of settings that exclude each other, or for a part that is needed and left out."""
        data, model, detection = self.data, self.model, self.detection
        text, masking, sources = model.text, model.masking, detection.proposals
        shared, no_masks = model.classifier_features == "shared", model.localizer.kind == "none"
        classifier, by = f"model.classifier_features={model.classifier_features}", detection.classify_by
        if data.id_pattern.count("{id}") != 1:
            yield f"data.id_pattern '{data.id_pattern}' must hold {{id}} once"
        if "{}" not in text.template:
            yield f"model.text.template '{text.template}' has no {{}} for the class name"
        if model.localizer.kernel_size % 2 == 0:
            yield f"model.localizer.kernel_size is {model.localizer.kernel_size}; it must be odd"
        if model.temporal.kind == "ms_tcn" and 2 ** (model.temporal.layers - 1) > data.longest:
            yield f"model.temporal.layers={model.temporal.layers} dilate beyond the {data.longest} snippets of a video"
        if not shared and (model.adaptation.enabled or masking.applied):
            yield f"{classifier} classifies without F_fg; set model.adaptation.enabled and model.masking.applied false"
        if masking.crop != "none" and (masking.applied or not shared or no_masks):
            change = "model.masking.applied=false, model.classifier_features=shared and model.localizer.kind"
            yield f"model.masking.crop={masking.crop} puts M in the place of L on F_vis; set {change}"
        if model.classifier_features == "raw" and model.visual_projection:
            yield f"{classifier} has no projection; set model.visual_projection=false"
        if text.context_init and (text.encoder == "none" or text.embeddings):
            yield "model.text.context_init is for a prompt, which there is not; set it null"
        if text.embeddings and (text.prompt, text.encoder) != ("template", "frozen"):
            change = "set model.text.prompt=template and model.text.encoder=frozen; model.text.adapter=linear learns"
            yield f"model.text.embeddings: no text encoder that could be fine-tuned or take learned prompts; {change}"
        if text.adapter != "none" and not text.embeddings:
            yield "model.text.adapter is for model.text.embeddings; set it none"
        form = self.loss.classification_form
        if form in ("sigmoid", "pooled") and self.loss.classification_video:
            yield f"loss.classification_form={form} has no term of the video; set loss.classification_video=0"
        if form == "pooled" and no_masks:
            yield "loss.classification_form=pooled needs the targets of M; model.localizer.kind=none has none"
        if "proposals" in detection.oracle and {"masks", "localizer"} & {*detection.oracle}:
            yield "detection.oracle=proposals replaces what masks and localizer are for; leave one out"
        if "localizer" in detection.oracle and no_masks:
            yield "detection.oracle=localizer replaces the masks M; model.localizer.kind=none predicts none"
        if "masks" in sources and no_masks:
            yield "detection.proposals=masks needs the masks M; model.localizer.kind=none predicts none"
        if "foreground" in sources and masking.kind in ("none", "gt"):
            yield f"detection.proposals=foreground needs the predicted foreground: model.masking.kind={masking.kind}"
        if "points" in sources and not model.points.enabled:
            yield "detection.proposals=points needs the point head; set model.points.enabled=true"
        if "classes" in sources and by != "calibrated":
            yield f"detection.proposals=classes needs detection.classify_by=calibrated, not {by}"
        if data.localizer_features and not model.points.enabled:
            yield "data.localizer_features are for the point head; set model.points.enabled=true"
        if by != "snippets" and "masks" in sources and masking.kind == "none":
            yield f"detection.classify_by={by} needs the foreground; model.masking.kind=none has none"
        if by == "video" and (sources != ["points"] or not detection.video_score):
            yield "detection.classify_by=video needs detection.proposals=points and detection.video_score=true"
        if by != "snippets" and detection.one_label:
            yield f"detection.one_label is of the snippets' scores; set it false with detection.classify_by={by}"
        if by == "calibrated" and detection.video_score:
            yield "detection.classify_by=calibrated weighs the video by itself; set detection.video_score=false"
        if data.sampling == "native" and not no_masks:
            yield "data.sampling=native has no fixed number of snippets for the masks M; set model.localizer.kind=none"
        if data.sampling == "native" and (data.shrink or data.drop_shorter):
            yield "data.shrink and data.drop_shorter count snippets of data.sampling=rescale; leave them out"


def load_config(files: Sequence[str | Path] = (), assignments: Sequence[str] = ()) -> Config:
    """Load YAML ``files`` (later ones win), then ``section.key=value``; a StaleError names all that is wrong."""
    values: dict[str, tuple[Any, str]] = {}  # dotted key → (value as written, where it was written)
    for file in files:
        values.update({key: (value, str(file)) for key, value in read_settings(file).items()})
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise StaleError(f"--set {assignment}: write section.key=value")
        where, text = f"--set {assignment}", text.strip()
        # A plain value stands as it is: in YAML " #" would begin a comment.
        values[key.strip()] = (parse_yaml(text, where) if text[:1] in tuple("[{'\"") else text, where)

    sections: dict[str, Any] = {}
    problems, known = [], settings(Config)
    for key, field in known.items():  # all sections, which their defaults would build one after another
        *path, name = key.split(".")
        section = reduce(lambda section, part: section.setdefault(part, {}), path, sections)
        value, where = values.get(key, (None, ""))
        word = value.strip().lower() if isinstance(value, str) else None
        if word in ("", "null", "~", "none") and "None" in str(field.annotation):
            section[name] = None
        elif word is not None and field.annotation is bool and word not in ("true", "false"):
            problems.append(f"{where}: {key} must be true or false, not {reprlib.repr(value)}")
        elif key in values:
            section[name] = value
    for key, (value, where) in values.items():
        if key not in known and not any(name.startswith(f"{key}.") for name in known):
            problems.append(f"{where}: unknown key '{key}'{_suggestion(key, known)}")
        elif key not in known and value not in ("", None):  # a section without keys is fine
            problems.append(f"{where}: {key} is a section, not a setting; write its keys below it")
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        problems += [_message(item, known, values) for item in error.errors(include_url=False)]
    if problems:
        raise StaleError("; ".join(dict.fromkeys(problems)))
    return config


def read_settings(file: str | Path) -> dict[str, Any]:
    """The settings of a YAML file by dotted key, as text and unchecked; a StaleError if it is not made of sections."""
    where = f"configuration {file}"
    tree = parse_yaml(read_text(file, "configuration"), where)
    if tree is not None and not isinstance(tree, Mapping):
        raise StaleError(f"{where}: sections such as 'train:' with their keys are expected, not {str(tree)[:40]!r}")
    return dict(_flatten(tree or {}))


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that :func:`load_config` loads."""
    write_text(path, yaml.safe_dump(config.model_dump(), sort_keys=False))


def differing_keys(first: Config, second: Config) -> list[str]:
    """The dotted keys whose values differ."""
    others = flat(second)
    return [key for key, value in flat(first).items() if value != others[key]]


def flat(config: Config) -> dict[str, Any]:
    """The value of every setting by its dotted key."""
    return dict(_flatten(config.model_dump()))


def missing_files(config: Config) -> list[tuple[str, str]]:
    """The setting and the path of every input that does not exist; the path is empty where nothing is set."""
    data, text = config.data, config.model.text
    features = [data.features] if isinstance(data.features, str) else data.features or [""]
    needed = [("data.annotations", data.annotations), *(("data.features", path) for path in features)]
    optional = {"data.localizer_features": data.localizer_features, "data.splits": data.splits}
    needed += [(key, path) for key, path in optional.items() if path]
    if text.embeddings:
        needed.append(("model.text.embeddings", text.embeddings))
    elif text.weights not in MODELS:
        needed.append(("model.text.weights", text.weights))
    return [(key, path) for key, path in needed if not path or not Path(path).exists()]


def settings(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key → field of every setting of ``section`` and of the sections in it."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found.update(settings(kind, f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def settings_table() -> str:
    """Every setting with default, range, source of the default and description, as a Markdown table."""
    lines = ["| setting | default | range | source | description |", "|---|---|---|---|---|"]
    for key, field in settings(Config).items():
        text = field.description or ""
        tag = re.search(r" ?\[([PCIU, ]+)\]$", text)
        default = yaml.safe_dump(field.default, default_flow_style=True, width=1000).splitlines()[0]
        cells = ["" if field.default == "" else f"`{default}`", _range(field), tag[1] if tag else "ours"]
        lines.append(f"| `{key}` | {' | '.join(cells)} | {text} |")
    return "\n".join(lines) + "\n"


def _range(field: FieldInfo) -> str:
    """The values that a field takes."""
    kind: Any = field.annotation
    if get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if field.annotation is bool:
        return "true, false"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs.items() if hasattr(m, name)]
    return ", ".join(limit for limit in limits if str(_MOST) not in limit)


def _suggestion(key: str, known: Iterable[str]) -> str:
    last = key.rpartition(".")[2]
    if last.lower() in ABBREVIATIONS:
        return f"; did you mean '{ABBREVIATIONS[last.lower()]}'?"
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    nearest = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def _message(item: Mapping[str, Any], known: Mapping[str, FieldInfo], values: Mapping[str, tuple[Any, str]]) -> str:
    """One line for one of pydantic's errors: where the value was written, its key, what is wrong."""
    location = [str(part) for part in item["loc"]]
    key = next((".".join(location[:n]) for n in range(len(location), 0, -1) if ".".join(location[:n]) in known), "")
    if not key:
        return item["msg"].removeprefix("Value error, ")
    where = values[key][1] if key in values else "configuration"
    wanted = re.sub("^(Input|List) should", "must", item["msg"].removeprefix("Value error, "))
    wanted = re.sub("(, unable to| after validation).*", "", wanted).replace("a valid list", "a list such as [a, b]")
    return f"{where}: {key} {wanted}, not {reprlib.repr(item['input'])}"


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML with every scalar as text (YAML 1.1 has 75_25 as 7525 and 1e-4 as a string)."""
    try:
        events = yaml.parse(text, getattr(yaml, "CBaseLoader", yaml.BaseLoader))
        start = [type(event) for _, event in zip(range(2), events, strict=False)]  # of the stream and its document
        tree = _build_tree(next(events), events) if start[1] is yaml.DocumentStartEvent else None
        if any(isinstance(event, yaml.DocumentStartEvent) for event in events):
            raise yaml.YAMLError("a single document is expected")
        return tree
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise StaleError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise StaleError(f"{where}: not valid YAML: nested too deep") from None


def _build_tree(event: yaml.Event, events: Iterator[yaml.Event]) -> Any:
    """The value that ``event`` begins. Keys are unique text, and aliases are refused: a few expand beyond memory."""
    if isinstance(event, yaml.ScalarEvent):
        return event.value
    if isinstance(event, yaml.AliasEvent):
        raise yaml.YAMLError(f"aliases (*name) are not supported; write it out{event.start_mark}")
    items = []
    while not isinstance(inner := next(events), (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
        items.append(_build_tree(inner, events))
    if isinstance(event, yaml.SequenceStartEvent):
        return items
    tree: dict[str, Any] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str) or key in tree:
            fault = f"key '{key}' given twice" if isinstance(key, str) else f"a key is text, not {reprlib.repr(key)}"
            raise yaml.YAMLError(f"{fault}{event.start_mark}")
        tree[key] = value
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
