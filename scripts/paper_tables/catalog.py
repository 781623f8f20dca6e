"""The tables of configs/tables.yaml: their rows, and the settings of the configuration that make each row."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stale.config import parse_yaml
from stale.errors import StaleError
from stale.io import read_text
from stale.records import describe_fault

SETTING_TITLES = {"75_25": "75/25", "50_50": "50/50", "closed": "closed set", "seen_cv": "pseudo-unseen classes"}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Fields):
    """One row of a table; configs/tables.yaml describes the fields."""

    key: str
    name: str
    method: str = "STALE"
    variant: str = ""
    overlays: tuple[str, ...] = ()
    overlays_50_50: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    oracle: tuple[str, ...] = ()
    ground_truth: Literal["all", "predicted-videos"] = "all"
    vocabulary: Literal["unseen", "seen"] = "unseen"
    tested_on: str = ""
    external: bool = False
    trivial: str = ""
    i3d: bool = False
    published: str = ""
    baseline: str = ""
    note: str = ""


class Table(_Fields):
    """Rows under one or several settings of classes, and the published table they are compared with."""

    name: str = ""  # its key in the file
    title: str
    settings: tuple[Literal["75_25", "50_50", "closed", "seen_cv"], ...]
    published: str = ""
    defaults: dict[str, Any] = {}
    rows: tuple[Any, ...]  # each a Row, and in the file a key or its fields


class _File(_Fields):
    rows: dict[str, dict[str, Any]] = {}
    tables: dict[str, Table]


_Kind = TypeVar("_Kind", bound=_Fields)


def load_tables(path: Path) -> dict[str, Table]:
    """Load the tables by name; a StaleError names the table, the row and the field that is wrong."""
    where = f"tables {path}"
    file = _check(_File, parse_yaml(read_text(path, "tables"), where), where)
    tables = {}
    for name, table in file.tables.items():
        where = f"{path}: table {name}"
        rows: dict[str, Row] = {}
        for item in table.rows:
            shared = {"key": item, **file.rows.get(str(item), {})}
            fields = {**table.defaults, **item} if isinstance(item, dict) else shared
            row = _check(Row, fields, f"{where}, row {fields.get('key', len(rows) + 1)}")
            if row.key in rows:
                raise StaleError(f"{where}, row {row.key}: its key is given twice")
            rows[row.key] = row
        for row in rows.values():
            if row.baseline and row.baseline not in rows:
                raise StaleError(f"{where}, row {row.key}: there is no baseline {row.baseline}")
        tables[name] = table.model_copy(update={"name": name, "rows": tuple(rows.values())})
    return tables


def _check(kind: type[_Kind], fields: Any, where: str) -> _Kind:
    """Return ``fields`` as a ``kind``; a StaleError names the first that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise StaleError(f"{where}: {describe_fault(error)}") from None


def choose_rows(table: Table, keys: list[str] | None) -> tuple[Row, ...]:
    """Return the rows of ``table`` with these ``keys`` (None: all); a StaleError if it has no such row."""
    known = {row.key: row for row in table.rows}
    unknown = [key for key in keys or () if key not in known]
    if unknown:
        raise StaleError(f"table {table.name} has no row {', '.join(unknown)}; its rows: {', '.join(known)}")
    return table.rows if keys is None else tuple(row for row in table.rows if row.key in keys)
