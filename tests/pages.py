"""The code of the pages of documentation, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def sections(name):
    """Text of each section of a page by its title; what stands before the first is of no title."""
    parts = re.split(r"^## (.+)$", (DOCS / name).read_text(), flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def blocks(text):
    """Blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def steps(text):
    """What a tutorial does, in order: the language of each block, its code, and what it says that the block prints."""
    return re.findall(r"^```(python|bash)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", text, flags=re.M | re.S)


def rows(text):
    """Cells of the rows of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in re.split(r" \| ", line.strip("| "))] for line in lines if "there | here" not in line
    ]


def code_in(text):
    """Spans of code between words."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def run(code, known):
    """Run what we wrote ourselves."""
    exec(compile(code, "page", "exec"), known)  # noqa: S102


def value(code, known):
    """The value of an expression that we wrote ourselves."""
    return eval(compile(code, "page", "eval"), known)  # noqa: S307
