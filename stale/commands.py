"""The command-line parser that all commands share: help within 80 columns, defaults, exit codes, ``--version``."""

import argparse
import re
import textwrap
from typing import Any

from stale.version import __version__

_EXIT_CODES = """\
exit codes: 0 done; 1 done, but something needs a look; 2 bad input, in one line that names the fix; 130 and 143
stopped by Ctrl-C or SIGTERM"""


class CommandParser(argparse.ArgumentParser):
    """A parser whose description is a docstring: paragraphs are filled, and examples are indented by four spaces."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"epilog": _EXIT_CODES, **options}, formatter_class=_Help)
        self.add_argument("--version", action="version", version=f"stale {__version__}", help="print the version")
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")


def add_set(parser: argparse._ActionsContainer, text: str) -> None:
    """Add ``--set KEY=VALUE ...``, single settings of the configuration, with this help ``text``."""
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="assignments", help=text
    )


def add_library(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which library has a vision-language model, and how its weights are to be taken."""
    parser.add_argument("--library", choices=("clip", "open_clip"), default="clip", help="library of the model")
    parser.add_argument("--pretrained", default="", metavar="TAG|FILE", help="weights of open_clip's model")
    activations = ("auto", "quick_gelu", "gelu")
    parser.add_argument("--activation", choices=activations, default="auto", help="of clip; default that of OpenAI's")
    parser.add_argument("--heads", type=int, help="of clip's encoder; default by its width")


class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        stated = "default" in text or action.default in (None, False, argparse.SUPPRESS, "") or action.default == []
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return text if stated else f"{text}; default {default}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = []
        for block in re.split(r"\n\n+", text.strip()):
            filled = textwrap.fill(block, 80, break_on_hyphens=False)
            blocks.append("\n".join(map(_example, block.split("\n"))) if block[0] == " " else filled)
        return "\n\n".join(blocks)


def _example(line: str) -> str:
    """An example of at most 80 columns: its remark, then lines that part no option from its value, and no phrase."""
    if len(line) <= 80:
        return line
    command, remark = (*re.split(r" +# ", line, maxsplit=1), "")[:2]
    glued = re.sub(r'"[^"]*"|--[\w-]+ (?!--)', lambda part: part[0].replace(" ", "\xa0"), " ".join(command.split()))
    options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False, "initial_indent": " " * 4}
    pieces = textwrap.wrap(glued, 78, subsequent_indent=" " * 8, **options)
    return "\n".join([*([f"    # {remark}"] if remark else []), " \\\n".join(pieces).replace("\xa0", " ")])
