"""Class labels, and the phrases that describe them to the text encoder."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stale.errors import StaleError, name_some
from stale.io import clean_name, read_text

_log = logging.getLogger(__name__)


def phrase(label: str) -> str:
    """The words of a label: ``HammerThrow`` → "hammer throw", "Baking cookies" unchanged.

    Camel case and underscores become lower-case words. A label with spaces (ActivityNet's) or of one plain word,
    hyphens and capitals included, stays as the data set wrote it.
    """
    label = label.strip()
    if " " in label:
        return label
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", label).strip()
    return spaced.lower() if spaced != label else label


@dataclass(frozen=True)
class NamedClass:
    """A class to detect: its label in the output, and its phrases for the text encoder."""

    label: str
    phrases: tuple[str, ...]


def parse_classes(classes: Sequence[str] | Sequence[NamedClass] | Mapping[str, Sequence[str]]) -> list[NamedClass]:
    """Parse classes from texts ``name | another phrase | …`` (the name is a phrase too), or from label → phrases.

    No class, an empty name, and the same label twice are a StaleError.
    """
    if isinstance(classes, str):
        classes = [classes]
    elif isinstance(classes, Mapping):
        pairs = classes.items()
        classes = [NamedClass(label, (texts,) if isinstance(texts, str) else tuple(texts)) for label, texts in pairs]
    named = []
    for item in classes:
        if isinstance(item, str):
            label, *others = item.split("|")
            item = NamedClass(label, (phrase(label), *others))
        label, texts = clean_name(item.label), tuple(map(clean_name, item.phrases))
        if not label or not texts or not all(texts):
            raise StaleError(f"class '{label}': a name or a phrase is empty")
        named.append(NamedClass(label, texts))
    if not named:
        raise StaleError("no classes: name at least one to look for")
    repeated = [label for label, count in Counter(item.label for item in named).items() if count > 1]
    if repeated:
        raise StaleError(f"class named twice: {name_some(repeated)}")
    return named


def same_text(classes: Iterable[str | NamedClass]) -> list[list[str]]:
    """The groups of labels whose phrases the text encoder cannot tell apart: its tokens have no capitals."""
    groups: dict[frozenset[str], list[str]] = {}
    for item in classes:
        label, texts = (item, [phrase(item)]) if isinstance(item, str) else (item.label, item.phrases)
        groups.setdefault(frozenset(text.lower() for text in texts), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def warn_of_same_text(classes: Iterable[str | NamedClass]) -> None:
    """Log the groups of :func:`same_text`."""
    for group in same_text(classes):
        _log.warning("classes with the same text are one to the text encoder: %s", ", ".join(map(repr, group)))


def read_classes(path: str | Path) -> list[NamedClass]:
    """Load classes, one a line as :func:`parse_classes` takes them; # starts a comment line."""
    lines = [line.strip() for line in read_text(path, "classes file").splitlines()]
    try:
        return parse_classes([line for line in lines if line and not line.startswith("#")])
    except StaleError as error:
        raise StaleError(f"classes file {path}: {error}") from None


def fill_template(phrases: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Put every phrase into every template, in the place of its ``{}``; a StaleError if it has none."""
    for template in templates:
        if "{}" not in clean_name(template):
            raise StaleError(f"template '{template}' has no {{}} for the class name")
    return [template.replace("{}", text) for text in phrases for template in templates]
