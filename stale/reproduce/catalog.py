"""The rows of each table, and the settings of the configuration that make each row."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from stale.errors import StaleError
from stale.evaluation.tables import EXTERNAL_LABEL

SETTING_TITLES = {"75_25": "75/25", "50_50": "50/50", "closed": "closed set", "seen_cv": "pseudo-unseen classes"}

_NO_BMN = "the class-agnostic proposals are those of this project's mask localizer, in place of BMN"
_ORACLE = "an oracle, not a result: it uses ground truth at test time"
_EXTERNAL = "WITH EXTERNAL SCORES, which replace labels: not zero-shot where their classifier knows the unseen classes"
_TEST_LABELS = "NOT ZERO-SHOT: the checkpoint is chosen by the test labels of unseen classes"


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    key: str  # its name for --rows
    name: str  # its name in the table
    method: str = "STALE"  # of the published result, as in configs/published.csv
    variant: str = ""  # likewise
    overlays: tuple[str, ...] = ()  # files in configs/ that change the data set's configuration
    overlays_50_50: tuple[str, ...] = ()  # further ones in the 50/50 setting
    settings: tuple[str, ...] = ()  # section.key=value, applied after all files
    oracle: tuple[str, ...] = ()  # values of detection.oracle at test time
    ground_truth: str = "all"  # the ground truth that is counted, as in eval.py --ground-truth
    vocabulary: str = "unseen"  # the classes under test, unseen or seen
    tested_on: str = ""  # another data set, by configs/NAME.yaml
    external: bool = False  # apply external video-level scores, by reproduce.py --video-scores
    trivial: str = ""  # a trivial row of the metrics, in place of the detections
    i3d: bool = False  # features of reproduce.py --i3d-features, in place of the configuration's
    published: str = ""  # the table in configs/published.csv, where it is not the row's own
    baseline: str = ""  # key of the row that this one is compared with, split by split
    note: str = ""  # a remark below the table


@dataclass(frozen=True)
class Table:
    """Rows under one or several settings of classes, and the published table they are compared with."""

    name: str
    title: str
    rows: tuple[Row, ...]
    settings: tuple[str, ...]
    published: str = ""


_B2 = Row("b2", "B-II (one stage, fixed CLIP text)", "B-II", overlays=("baselines/b2.yaml",))
_B1 = Row("b1", "B-I (two stages)", "B-I", overlays=("baselines/b1.yaml",), note=_NO_BMN)
_EFFPROMPT = Row(
    "effprompt", "EffPrompt (two stages)", "EffPrompt", overlays=("baselines/effprompt.yaml",), note=_NO_BMN
)
_AGNOSTIC = Row(
    "agnostic", "class-agnostic points, named by the video", "agnostic", overlays=("baselines/agnostic.yaml",)
)
_SYSTEMS = (_B2, _B1, _EFFPROMPT, Row("stale", "STALE"))


def _row(key: str, name: str, *settings: str, **others: Any) -> Row:
    return Row(key, name, settings=settings, **others)


def _stale(key: str, variant: str, *settings: str, note: str = "") -> Row:
    """STALE with some settings changed; named as the published variant."""
    return _row(key, variant, *settings, variant=variant, note=note)


_QUERIES = {number: f"model.masking.queries={number}" for number in (5, 20, 100)}
_ONE_EMBEDDING = "one learned embedding a seen class; all unseen classes get the same one"
_NO_MASK = ("model.masking.kind=none", "detection.proposals=masks")  # there are no regions of L
_MASKING = (
    _stale("none", "no mask", *_NO_MASK),
    _stale("gt", "GT mask", "model.masking.kind=gt", "detection.proposals=masks", note=_ORACLE),
    _stale("conv1d", "1-D CNN", "model.masking.kind=conv1d"),
    *(_stale(f"q{n}", f"MaskFormer Q={n}", "model.masking.kind=maskformer", _QUERIES[n]) for n in _QUERIES),
)
_TEXT = (
    _stale("none", "no encoder", "model.text.encoder=none", "model.text.context_init=null", note=_ONE_EMBEDDING),
    _stale("frozen", "CLIP text frozen", "model.text.encoder=frozen"),
    _stale("finetune", "CLIP text fine-tuned", "model.text.encoder=finetune"),
)
_GT_MASKS = (
    f"{_ORACLE}. The paper's 'GT masks' can be read in two ways: the foreground mask L, which decides which snippets "
    "are classified, or the instance masks M, which become the proposals, as B-I's GT proposals do. This row replaces"
)
_gt_masks = partial(Row, variant="GT masks")
_PROPAGATION = (
    Row(
        "b1_gt", "B-I, GT proposals", "B-I", "GT proposals", overlays=_B1.overlays, oracle=("proposals",), note=_ORACLE
    ),
    Row("b1", "B-I, predicted proposals", "B-I", "predicted proposals", overlays=_B1.overlays, note=_NO_BMN),
    _gt_masks("stale_gt", "STALE, GT masks L", oracle=("masks",), note=f"{_GT_MASKS} L"),
    _gt_masks("stale_gt_m", "STALE, GT masks M", oracle=("localizer",), note=f"{_GT_MASKS} M"),
    _gt_masks("stale_gt_both", "STALE, GT masks L and M", oracle=("masks", "localizer"), note=f"{_GT_MASKS} both"),
    Row("stale", "STALE, predicted masks", variant="predicted masks"),
)

_released = partial(_row, method="released code")
_ALL: dict[str, Any] = {"overlays": ("official_code.yaml",), "overlays_50_50": ("official_code_50_50.yaml",)}
_PREDICTED: dict[str, Any] = {"ground_truth": "predicted-videos"}
_NOT_COUNTED = "ground truth of videos without predictions is not counted"
_OFFICIAL = (
    Row("stale", "STALE", "released code"),
    _released("template", "template prompt", "model.text.prompt=template"),
    _released("one_query", "one mask query", "model.masking.queries=1"),
    _released(
        "crop", "features cropped by the localizer", "model.masking.applied=false", "model.masking.crop=localizer"
    ),
    _released("clamp", "features clamped at 1e-4", "model.clamp=1e-4"),
    _released("no_residual", "no residual in the cross-adaptation", "model.adaptation.residual=false"),
    _released("last_instance", "only the last instance of a video", "data.instances=last"),
    _released("shrunk", "instances shortened, short ones dropped", "data.shrink=1", "data.drop_shorter=1"),
    _released(
        "plain_localizer",
        "two plain convolutions",
        *("model.localizer.kind=plain", "model.localizer.layers=2", "model.localizer.coordinates=absolute"),
    ),
    _released("focal", "focal classification, on the batch's mean", "loss.classification_form=batch_focal"),
    _released(
        "video_loss",
        "classification of the whole video too",
        *("loss.classification_snippets=0.9", "loss.classification_video=1"),
    ),
    _released("bce_dice", "localizer loss 0.4 BCE + 0.6 Dice", "loss.bce=0.4", "loss.dice=0.6"),
    _released("bce", "BCE foreground", "loss.foreground_form=bce"),
    _released("consistency", "consistency gradient to F_vis only", "loss.consistency_gradient=visual"),
    _released("consistency_background", "consistency with the background", "loss.consistency_background=true"),
    _released(
        "loss_weights",
        "loss weights 0.4, 0.3, 0.1, 1",
        *("loss.classification=0.4", "loss.localization=0.3", "loss.foreground=0.1", "loss.consistency=1"),
    ),
    _released("coupled_decay", "L2 decay inside the gradient", "train.coupled_decay=true"),
    _released("no_clipping", "gradients not clipped", "train.clip_norm=0"),
    _released("no_foreground_weight", "scores not weighted by the mask", "detection.foreground_weight=false"),
    _released("one_label", "one label a video", "detection.one_label=true"),
    _released("ten_snippets", "masks of 10 snippets", "detection.top_snippets=10"),
    _released("thresholds", "thresholds 0, .2, .4, .6, .8", "detection.thresholds=[0, 0.2, 0.4, 0.6, 0.8]"),
    _released("fill_holes", "holes filled", "detection.fill_holes=true"),
    _released("min_length", "minimum length 2 % of the video", "detection.min_length=0.02"),
    _released("nms", "SoftNMS of the released code", "detection.nms=official"),
    _released("unseen_loss", "checkpoint chosen by the unseen loss", "train.choose_on=unseen_loss", note=_TEST_LABELS),
    _released("predicted_videos", "ground truth in predicted videos", **_PREDICTED, note=_NOT_COUNTED),
    _released("all_held_out", "all, chosen on held-out seen", "train.choose_on=held_out", **_ALL),
    _released("all", "all", **_ALL, **_PREDICTED, note=_TEST_LABELS),
)

_PLUS = ("stale_plus.yaml",)
_BEYOND = (
    Row("stale", "STALE"),
    Row("plus", "STALE plus", overlays=_PLUS, baseline="stale"),
    _AGNOSTIC,
    Row("stale_seen", "STALE, seen classes", vocabulary="seen"),
    Row("plus_seen", "STALE plus, seen classes", overlays=_PLUS, vocabulary="seen", baseline="stale_seen"),
)

# The paper's configuration with one ingredient of the overlay, and the overlay without one or with a further one.
_direction = partial(_row, baseline="stale")
_plus = partial(_row, overlays=_PLUS, baseline="plus")
_POINTS = ("model.points.enabled=true", "detection.proposals=points", "detection.max_proposals=2000")
_NATIVE = ("data.sampling=native", "model.localizer.kind=none", "loss.consistency=0", "detection.proposals=foreground")
_DIRECTIONS = (
    Row("stale", "STALE"),
    _direction("native", "native rate, proposals of the foreground mask", *_NATIVE),
    _direction("points", "point head at T snippets", *_POINTS),
    _direction("native_points", "point head at the native rate", *_NATIVE, *_POINTS),
    _direction("calibrated", "calibrated classes", "detection.classify_by=calibrated"),
    _direction("video_score", "video-level score", "detection.video_score=true"),
    _direction("schedule", "cosine schedule, moving average", "train.schedule=cosine", "train.ema=0.99"),
    _direction("sigmoid", "sigmoid classes", "loss.classification_form=sigmoid"),
    _direction("voting", "segment voting", "detection.voting=0.7"),
    _direction("max_detections", "200 detections per video", "detection.max_detections=200"),
    Row("plus", "STALE plus", overlays=_PLUS, baseline="stale"),
    _AGNOSTIC,
    _plus("plus_rescaled", "STALE plus at T snippets", "data.sampling=rescale"),
    _plus("plus_one_level", "STALE plus, one level", "model.points.levels=1"),
    _plus("plus_points", "STALE plus, proposals of the points only", "detection.proposals=points"),
    _plus("plus_snippets", "STALE plus, classes of the snippets", "detection.classify_by=snippets"),
    _plus("plus_confidence", "STALE plus, calibrated classes as fitted", "detection.confidence=1"),
    _plus("plus_frozen", "STALE plus, text encoder frozen", "model.text.encoder=frozen"),
    _plus("plus_original_text", "STALE plus, original text", "model.text.encoder=frozen", "model.text.prompt=template"),
    _plus("plus_no_mask", "STALE plus, no representation mask", "model.masking.kind=none", _POINTS[1]),
    _plus("plus_adaptation", "STALE plus, cross-adaptation", "model.adaptation.enabled=true"),
    _plus("plus_no_average", "STALE plus, no moving average", "train.ema=0"),
    _plus("plus_batch", "STALE plus, batches of 4", "train.batch_size=4"),
    _plus("plus_sigmoid", "STALE plus, sigmoid classes", "loss.classification_form=sigmoid"),
    _plus("plus_voting", "STALE plus, segment voting", "detection.voting=0.7"),
    _plus("plus_max_detections", "STALE plus, 200 detections per video", "detection.max_detections=200"),
)

# Further tables of the paper: one component exchanged, or left out.
_TEMPORAL = (
    _stale("none", "no temporal model", "model.temporal.kind=none"),
    _stale("conv", "1-D CNN", "model.temporal.kind=conv"),
    # Dilations 1 to 32 see 63 snippets on either side; the ten layers of MS-TCN are for thousands of frames.
    _stale("ms_tcn", "MS-TCN", "model.temporal.kind=ms_tcn", "model.temporal.layers=6"),
    _stale("transformer", "transformer", "model.temporal.kind=transformer"),
)
_LENGTHS = (4, 8, 16, 32)
_PROMPT = (
    _stale("template", "template", "model.text.prompt=template"),
    _stale("words", "learned, initialized by words", "model.text.context_init=a video of action"),
    *(
        _stale(f"n{n}", f"learned, N={n}", "model.text.context_init=null", f"model.text.context_tokens={n}")
        for n in _LENGTHS
    ),
)
_TERMS = {"classification": "L_c", "localization": "L_m", "foreground": "L_comp", "consistency": "L_const"}
_LOSS_TERMS = (
    Row("all", "all terms", variant="all terms"),
    *(
        _row(term, f"without {name}", f"loss.{term}=0", variant=f"without {name}", baseline="all")
        for term, name in _TERMS.items()
    ),
)
_PROJECTED = "a learned projection takes the features into the space of CLIP's text encoder"
_BACKBONE = (
    Row("clip", "CLIP features", variant="CLIP"),
    _row("i3d", "I3D features", "model.visual_projection=true", variant="I3D", i3d=True, note=_PROJECTED),
)
_external = partial(Row, external=True)
_EXTERNAL_SCORES = (
    Row("stale", "STALE", variant="released code rerun", published="no_external_scores"),
    _external("stale_external", "STALE, EXTERNAL SCORES", published="zero_shot", baseline="trivial", note=_EXTERNAL),
    _external("plus_external", "STALE plus, EXTERNAL SCORES", overlays=_PLUS, baseline="trivial", note=_EXTERNAL),
    _external(
        "agnostic_external",
        f"{_AGNOSTIC.name}, EXTERNAL SCORES",
        "agnostic",
        overlays=_AGNOSTIC.overlays,
        note=_EXTERNAL,
    ),
    _external(
        *("trivial", "label file on the whole video, EXTERNAL SCORES"),
        *("label file + whole video", "mean of 10 splits (all videos)"),
        trivial=EXTERNAL_LABEL,
        published="trivial_with_external",
        note=f"no model at all. {_EXTERNAL}",
    ),
)
# Without M there is nothing for the consistency loss to compare, and L gives the proposals.
_REGIONS = "proposals are regions of L; no consistency loss either"
_NO_LOCALIZER = ("loss.localization=0", "loss.consistency=0", "detection.proposals=foreground")
_PARTS = (
    Row("stale", "STALE"),
    _direction("mask", "no representation mask", *_NO_MASK),
    _direction("adaptation", "no cross-adaptation", "model.adaptation.enabled=false"),
    _direction("consistency", "no consistency loss", "loss.consistency=0"),
    _direction("prompt", "no learned prompt", "model.text.prompt=template"),
    _direction("finetune", "text encoder frozen", "model.text.encoder=frozen"),
    _direction("temporal", "no temporal model", "model.temporal.kind=none"),
    _direction("localizer", "no mask localizer M", *_NO_LOCALIZER, note=_REGIONS),
)

_CROSS_DATASET = tuple(
    Row(
        f"{method.lower()}_on_{name}",
        f"{method}, tested on {name}",
        method,
        overlays=overlays,
        tested_on=name,
        note="classes that were seen in training are left out",
    )
    for name in ("thumos14", "activitynet")
    for method, overlays in (("STALE", ()), ("B-II", _B2.overlays))
)

_BOTH, _MAIN = ("75_25", "50_50"), ("75_25",)
TABLES = {
    table.name: table
    for table in (
        Table("zero_shot", "Zero-shot detection", (*_SYSTEMS, _AGNOSTIC), _BOTH, published="zero_shot"),
        Table("masking", "Representation masking", _MASKING, _MAIN, published="masking"),
        Table("text_encoder", "Text encoder", _TEXT, _MAIN, published="text_encoder"),
        Table("error_propagation", "Error propagation", _PROPAGATION, _MAIN, published="error_propagation"),
        Table("temporal", "Temporal model", _TEMPORAL, _MAIN, published="temporal"),
        Table("prompt", "Prompt and context length", _PROMPT, _MAIN, published="prompt"),
        Table("loss_terms", "Loss terms", _LOSS_TERMS, _MAIN, published="loss_terms"),
        Table("backbone", "CLIP features against I3D features", _BACKBONE, ("75_25", "closed"), published="backbone"),
        Table("cross_dataset", "Trained on one data set, tested on another", _CROSS_DATASET, ("closed",)),
        Table("parts", "STALE without each of its parts", _PARTS, (*_BOTH, "seen_cv")),
        Table("external_scores", "External video-level scores", _EXTERNAL_SCORES, _BOTH),
        Table(
            "closed_set", "Closed set: trained and tested on all classes", _SYSTEMS, ("closed",), published="closed_set"
        ),
        Table("official_code", "Effect of each deviation of the released code", _OFFICIAL, _MAIN),
        Table("beyond", "Beyond the paper", _BEYOND, _BOTH),
        Table("directions", "Beyond the paper: one direction at a time", _DIRECTIONS, ("seen_cv",)),
    )
}


def choose_rows(table: Table, keys: list[str] | None) -> tuple[Row, ...]:
    """Return the rows of ``table`` with these ``keys`` (None: all); a StaleError if it has no such row."""
    known = {row.key: row for row in table.rows}
    unknown = [key for key in keys or () if key not in known]
    if unknown:
        raise StaleError(f"table {table.name} has no row {', '.join(unknown)}; its rows: {', '.join(known)}")
    return table.rows if keys is None else tuple(row for row in table.rows if row.key in keys)
