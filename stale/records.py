"""What the files hold that the commands write and load again. Fields that are not named here pass unchecked."""

import reprlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stale.errors import StaleError


class Record(BaseModel):
    """A JSON object, or the plain values of a checkpoint."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)


class Protocol(Record):
    """``protocol`` of a results or metrics file: what was tested."""

    dataset: str | None = None
    subset: str | None = None
    split: int | None = None
    classes: list[str] | None = None
    unseen_classes: list[str] | None = None
    annotations: str | None = None
    tious: list[float] | None = None
    skipped_videos: int | None = None


class Summary(Record):
    """One row of results, as fractions: mAP by tIoU threshold, and the average."""

    mAP: dict[str, float | None]  # noqa: N815, the files' name
    average_mAP: float | None  # noqa: N815


class MetricsFile(Summary):
    """``metrics.json``."""

    protocol: Protocol
    baselines: dict[str, Summary]
    groups: dict[str, Summary] = {}
    trivial: dict[str, Summary] = {}


class SplitFile(Record):
    """``split.json``; the last three are not in runs of earlier versions."""

    source: str
    seen: list[str]
    unseen: list[str]
    held_out: list[str]
    segments: str = ""
    features: str = ""
    revision: str = ""


class CheckpointFile(Record):
    """A checkpoint, without the states of the optimizer and the random number generators."""

    model: dict[Any, Any]
    feature_width: int = Field(ge=1, le=1 << 16)
    localizer_width: int = Field(0, ge=0, le=1 << 16)
    epoch: int = Field(ge=0)
    best: dict[str, float]
    features: dict[str, Any] = {}


def check_record(kind: type[Record], content: Any, where: str, fix: str) -> Any:
    """Return ``content`` if it is of this ``kind``, else raise a StaleError that names the file and the field."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise StaleError(f"{where} is incomplete or damaged ({describe_fault(error)}): {fix}") from None
    return content


def describe_fault(error: ValidationError) -> str:
    """The first field that is wrong, and what is wrong with it."""
    fault = error.errors(include_url=False)[0]
    field = ".".join(map(str, fault["loc"])) or "it"
    wanted = fault["msg"].removeprefix("Input ").partition(" or instance of ")[0]
    words = {"missing": "is missing", "extra_forbidden": "is unknown"}
    return f"{field} {words.get(fault['type'], f'{wanted}, not ' + reprlib.repr(fault['input']))}"
