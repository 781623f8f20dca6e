"""Class labels as the phrases a text encoder reads."""

from __future__ import annotations

import re


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
