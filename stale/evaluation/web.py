"""HTML pages that are one file each: everything inside, nothing fetched, every text from outside escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.protocol{background:#f2f4f7;padding:.6em 1em}h2{margin-top:2em}"
)
# The browser itself then refuses to fetch anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page; ``body`` is HTML, ``style`` and ``script`` are the page's own."""
    head = [
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>",
    ]
    lines = ["<!DOCTYPE html>", f'<html lang="en"><head>{"".join(head)}</head>', f"<body><h1>{html.escape(title)}</h1>"]
    return "\n".join([*lines, body, *([f"<script>{script}</script>"] if script else []), "</body></html>"]) + "\n"


def html_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of escaped cells."""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def embed_json(name: str, value: Any) -> str:
    """``value`` as a data block with the id ``name``; no text in it can close the block."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{html.escape(name)}">{text}</script>'
