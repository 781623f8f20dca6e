"""Which rows each table has, and by which settings of the configuration each row is made."""

from __future__ import annotations

from dataclasses import dataclass

from stale.errors import StaleError

OURS_IN_PLACE_OF_BMN = "class-agnostic proposals: our mask localizer in place of BMN"
ORACLE = "an oracle, no result: ground truth at test time"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        key: what ``--rows`` calls it.
        name: what the table calls it.
        method, variant: of the published figure, as ``configs/published.csv`` has them.
        overlays: configuration files laid over the data set's, in the folder of configurations.
        overlays_50_50: laid over those in the 50/50 setting.
        settings: ``section.key=value``, laid over all files.
        oracle: ``masks`` or ``proposals`` at test time.
        ground_truth: which ground truth is counted, as ``eval.py --ground-truth`` has it.
        vocabulary: the classes under test: ``unseen``, or ``seen`` ones in their test videos.
        baseline: the row that this one is paired with, split by split.
        note: what a reader must know of it.
    """

    key: str
    name: str
    method: str = "STALE"
    variant: str = ""
    overlays: tuple[str, ...] = ()
    overlays_50_50: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    oracle: str | None = None
    ground_truth: str = "all"
    vocabulary: str = "unseen"
    baseline: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under one or several settings of classes, and the published table they stand beside."""

    name: str
    title: str
    rows: tuple[Row, ...]
    settings: tuple[str, ...]
    published: str = ""


_B2 = Row("b2", "B-II (one stage, fixed CLIP text)", "B-II", overlays=("baselines/b2.yaml",))
_B1 = Row("b1", "B-I (two stages)", "B-I", overlays=("baselines/b1.yaml",), note=OURS_IN_PLACE_OF_BMN)
_EFFPROMPT = Row(
    "effprompt",
    "EffPrompt (two stages)",
    "EffPrompt",
    overlays=("baselines/effprompt.yaml",),
    note=OURS_IN_PLACE_OF_BMN,
)
_SYSTEMS = (_B2, _B1, _EFFPROMPT, Row("stale", "STALE"))


def _masking(key: str, variant: str, *settings: str, note: str = "") -> Row:
    return Row(key, variant, variant=variant, settings=settings, note=note)


def _queries(number: int) -> Row:
    settings = ("model.masking.kind=maskformer", f"model.masking.queries={number}")
    return _masking(f"q{number}", f"MaskFormer Q={number}", *settings)


_MASKING = (
    _masking("none", "no mask", "model.masking.kind=none"),
    _masking("gt", "GT mask", "model.masking.kind=gt", note=ORACLE),
    _masking("conv1d", "1-D CNN", "model.masking.kind=conv1d"),
    *map(_queries, (5, 20, 100)),
)
_TEXT = (
    Row(
        "none",
        "no encoder",
        variant="no encoder",
        settings=("model.text.encoder=none", "model.text.context_init=null"),
        note="a learned embedding per seen class: every unseen name looks the same to it",
    ),
    Row("frozen", "CLIP text frozen", variant="CLIP text frozen", settings=("model.text.encoder=frozen",)),
    Row("finetune", "CLIP text fine-tuned", variant="CLIP text fine-tuned", settings=("model.text.encoder=finetune",)),
)
_PROPAGATION = (
    Row(
        "b1_gt",
        "B-I, GT proposals",
        "B-I",
        "GT proposals",
        _B1.overlays,
        oracle="proposals",
        note=ORACLE,
    ),
    Row("b1", "B-I, predicted proposals", "B-I", "predicted proposals", _B1.overlays, note=OURS_IN_PLACE_OF_BMN),
    Row("stale_gt", "STALE, GT masks", variant="GT masks", oracle="masks", note=ORACLE),
    Row("stale", "STALE, predicted masks", variant="predicted masks"),
)


def _released(key: str, name: str, *settings: str, note: str = "") -> Row:
    return Row(key, name, "released code", settings=settings, note=note)


_UNSEEN = "BREAKS ZERO-SHOT: the checkpoint is chosen by test labels of unseen classes"
_ALL = ("official_code.yaml",)
_ALL_50_50 = ("official_code_50_50.yaml",)
_HONEST = "train.choose_on=held_out"
_OFFICIAL = (
    Row("stale", "STALE as here", "released code"),
    _released("template", "template prompt", "model.text.prompt=template"),
    _released("mask_not_applied", "mask learned, not applied", "model.masking.applied=false"),
    _released("last_instance", "a video's last instance alone", "data.instances=last"),
    _released("shrunk", "instances shrunk, short ones dropped", "data.shrink=1", "data.drop_shorter=1"),
    _released(
        "plain_localizer",
        "two plain convolutions",
        *("model.localizer.kind=plain", "model.localizer.layers=2", "model.localizer.coordinates=absolute"),
    ),
    _released("focal", "focal classification", "loss.classification_form=focal"),
    _released("bce", "BCE foreground", "loss.foreground_form=bce"),
    _released("consistency", "consistency reaches F_vis alone", "loss.consistency_gradient=visual"),
    _released("no_foreground_weight", "scores not weighed by L", "detection.foreground_weight=false"),
    _released("ten_snippets", "masks of 10 snippets", "detection.top_snippets=10"),
    _released("thresholds", "thresholds 0, .2, .4, .6, .8", "detection.thresholds=[0, 0.2, 0.4, 0.6, 0.8]"),
    _released("fill_holes", "holes filled", "detection.fill_holes=true"),
    _released("min_length", "at least 2 % of the video", "detection.min_length=0.02"),
    _released("nms", "its SoftNMS", "detection.nms=official"),
    _released("unseen_loss", "checkpoint by the unseen loss", "train.choose_on=unseen_loss", note=_UNSEEN),
    Row(
        "predicted_videos",
        "ground truth in predicted videos",
        "released code",
        ground_truth="predicted-videos",
        note="not all ground truth is counted",
    ),
    Row("all_held_out", "all, chosen on held-out seen", "released code", "", _ALL, _ALL_50_50, (_HONEST,)),
    Row("all", "all", "released code", "", _ALL, _ALL_50_50, ground_truth="predicted-videos", note=_UNSEEN),
)

_PLUS = ("stale_plus.yaml",)
_BEYOND = (
    Row("stale", "STALE"),
    Row("plus", "STALE plus", overlays=_PLUS, baseline="stale"),
    Row("stale_seen", "STALE, seen classes", vocabulary="seen"),
    Row("plus_seen", "STALE plus, seen classes", overlays=_PLUS, vocabulary="seen", baseline="stale_seen"),
)


def _direction(key: str, name: str, *settings: str) -> Row:
    """The paper's configuration with one thing changed."""
    return Row(key, name, settings=settings, baseline="stale")


def _without(key: str, name: str, *settings: str) -> Row:
    """The overlay with one part changed, mostly back to the paper's."""
    return Row(key, name, overlays=_PLUS, settings=settings, baseline="plus")


_MASKFORMER = ("model.masking.kind=maskformer", "model.masking.layers=2", "model.masking.dropout=0.1")
_CONV_STACK = ("model.masking.kind=conv_stack", "model.masking.layers=4", "model.masking.dropout=0.3")
_HIGHEST = ("detection.region_score=mean", "detection.foreground_score=max")  # as in the caption configuration
_TEMPLATES = "detection.templates=['{}', 'a person doing {}', 'a photo of {}']"
_FINER = ("detection.regions=both", "detection.fineness=2")
_DIRECTIONS = (
    Row("stale", "STALE"),
    _direction("no_context", "features as extracted", "model.temporal.kind=none"),
    _direction("frozen_text", "text tower frozen", "model.text.encoder=frozen"),
    _direction("template", "template prompt", "model.text.prompt=template"),
    _direction("temperature", "temperature 0.02", "model.temperature=0.02"),
    _direction("soft_mask", "soft mask", "model.masking.gradient=soft"),
    _direction("conv_stack", "convolutions find the foreground", *_CONV_STACK),
    _direction(
        "plain_localizer", "plain localizer, 9 wide", "model.localizer.kind=plain", "model.localizer.kernel_size=9"
    ),
    _direction("more_snippets", "twice the snippets", "data.num_snippets=512"),
    _direction("video_evidence", "video-level evidence", "detection.video_evidence=true"),
    _direction("regions", "regions of the foreground", "detection.regions=both"),
    _direction("fineness", "the same at twice the snippets", *_FINER),
    _direction("nms_sigma", "SoftNMS sigma 0.3", "detection.nms_sigma=0.3"),
    _direction("raw_similarity", "half the similarity unadapted", "model.raw_similarity=0.5"),
    _direction("anchor", "text kept near the template", "loss.anchor=8"),
    _direction("start_share", "text averaged with its start", "model.text.start_share=0.5"),
    _direction("templates", "three texts a class", _TEMPLATES),
    _direction("background_bias", "background lowered by 1", "detection.background_bias=-1"),
    _direction("center", "center sampling", "loss.center=0.5"),
    _direction("contrast", "regions scored against what is around", "detection.region_score=contrast"),
    _direction("windows", "windows of finer snippets", "detection.fineness=2", "detection.windows=true"),
    _direction("max_detections", "200 detections a video", "detection.max_detections=200"),
    Row("plus", "STALE plus", overlays=_PLUS, baseline="stale"),
    _without("plus_masks", "STALE plus, snippets' masks alone", "detection.regions=masks"),
    _without("plus_foreground", "STALE plus, the foreground's regions alone", "detection.regions=foreground"),
    _without("plus_highest", "STALE plus, regions scored by their highest value", *_HIGHEST),
    _without("plus_coarse", "STALE plus, at T snippets", "detection.fineness=1"),
    _without("plus_twice", "STALE plus, at twice the snippets", "detection.fineness=2"),
    _without("plus_windows", "STALE plus, windows of finer snippets", "detection.windows=true"),
    _without("plus_hundred", "STALE plus, 100 detections a video", "detection.max_detections=100"),
    _without("plus_no_evidence", "STALE plus, no video-level evidence", "detection.video_evidence=false"),
    _without("plus_templates", "STALE plus, three texts a class", _TEMPLATES),
    _without("plus_start_share", "STALE plus, text averaged with its start", "model.text.start_share=0.5"),
    _without("plus_maskformer", "STALE plus, MaskFormer", *_MASKFORMER),
    _without("plus_context", "STALE plus, temporal transformer", "model.temporal.kind=transformer"),
)

_BOTH, _MAIN = ("75_25", "50_50"), ("75_25",)
TABLES = {
    table.name: table
    for table in (
        Table("zero_shot", "Zero-shot detection", _SYSTEMS, _BOTH, "zero_shot"),
        Table("masking", "Representation masking", _MASKING, _MAIN, "masking"),
        Table("text_encoder", "Text encoder", _TEXT, _MAIN, "text_encoder"),
        Table("error_propagation", "Error propagation", _PROPAGATION, _MAIN, "error_propagation"),
        Table("closed_set", "Closed set: trained and tested on all classes", _SYSTEMS, ("closed",)),
        Table("official_code", "What each deviation of the released code does", _OFFICIAL, _MAIN),
        Table("beyond", "Beyond the paper", _BEYOND, _BOTH),
        Table("directions", "Beyond the paper: one direction at a time", _DIRECTIONS, ("seen_cv",)),
    )
}


def choose_rows(table: Table, keys: list[str] | None) -> tuple[Row, ...]:
    """The table's rows of these ``keys``; all without.

    Raises:
        StaleError: the table has no such row.
    """
    known = {row.key: row for row in table.rows}
    unknown = [key for key in keys or () if key not in known]
    if unknown:
        raise StaleError(f"table {table.name} has no row {', '.join(unknown)}; its rows: {', '.join(known)}")
    return table.rows if keys is None else tuple(row for row in table.rows if row.key in keys)
