"""Class labels as the phrases a text encoder reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stale.errors import StaleError, name_some
from stale.files import read_json, read_text


def phrase(label: str) -> str:
    """The words of a label: ``HammerThrow`` → "hammer throw", "Baking cookies" as it is.

    A label that already has spaces (ActivityNet's) or is one plain word, hyphens and capitals included, is left
    as the data set wrote it; camel case and underscores are taken apart into lower-case words.
    """
    label = label.strip()
    if " " in label:
        return label
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", label).strip()
    return spaced.lower() if spaced != label else label


@dataclass(frozen=True)
class NamedClass:
    """A class to detect: its label in the output, and the texts that describe it to the text encoder."""

    label: str
    phrases: tuple[str, ...]


def parse_classes(classes: Sequence[str] | Sequence[NamedClass] | Mapping[str, Sequence[str]]) -> list[NamedClass]:
    """Classes from texts ``name | another phrase | …`` (the name is a phrase too), or from label → phrases.

    Classes already parsed stay as they are.

    Raises:
        StaleError: no class, an empty name, or the same label twice.
    """
    if isinstance(classes, str):
        classes = [classes]
    if isinstance(classes, Mapping):
        named = [_named(label, [texts] if isinstance(texts, str) else texts) for label, texts in classes.items()]
    else:
        named = [item if isinstance(item, NamedClass) else _parse_class(item) for item in classes]
    if not named:
        raise StaleError("no classes: name at least one to look for")
    repeated = [label for label, count in Counter(item.label for item in named).items() if count > 1]
    if repeated:
        raise StaleError(f"class named twice: {name_some(repeated)}")
    return named


def read_classes(path: str | Path) -> list[NamedClass]:
    """A class a line (as in :func:`parse_classes`, # starts a comment line), or a ``.json`` list or label → phrases.

    Raises:
        StaleError: the file is missing, or names no class, or one twice.
    """
    if Path(path).suffix == ".json":
        content = read_json(path, "classes file")
        if not _is_classes(content):
            raise StaleError(f'classes file {path}: a list of names, or {{"label": ["phrase", …]}}, is expected')
    else:
        lines = [line.strip() for line in read_text(path, "classes file").splitlines()]
        content = [line for line in lines if line and not line.startswith("#")]
    try:
        return parse_classes(content)
    except StaleError as error:
        raise StaleError(f"classes file {path}: {error}") from None


def fill_template(phrases: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every phrase in every template, whose ``{}`` it takes.

    Raises:
        StaleError: a template has no ``{}``.
    """
    for template in templates:
        if "{}" not in template:
            raise StaleError(f"template '{template}' has no {{}} for the class name")
    return [template.replace("{}", text) for text in phrases for template in templates]


def _parse_class(text: str) -> NamedClass:
    label, *others = text.split("|")
    return _named(label, [phrase(label), *others])


def _named(label: str, phrases: Sequence[str]) -> NamedClass:
    label, phrases = " ".join(label.split()), tuple(" ".join(text.split()) for text in phrases)
    if not label or not phrases or not all(phrases):
        raise StaleError(f"class '{label}': a name or a phrase is empty")
    return NamedClass(label, phrases)


def _is_classes(content: Any) -> bool:
    if isinstance(content, dict):
        return all(_is_texts([value] if isinstance(value, str) else value) for value in content.values())
    return _is_texts(content)


def _is_texts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(text, str) for text in content)
