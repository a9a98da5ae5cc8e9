"""A page put together: what it looks like, its code, and as much of its data as there is room for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_attn.stats.token_text import readable
from llama_attn.viz.report.embedding import Embedded, Part, arrays_of, embed, fit

FOLDER = Path(__file__).parent / "page"
MEGABYTE = 1_000_000
# Longer tokens are cut in a page.
LONGEST_TOKEN = 80


@dataclass(frozen=True)
class Shell:
    """A page without data.

    Args:
        html: Name of its frame.
        styles: Names of its style sheets.
        scripts: Names of its scripts, which share one scope.
        of: What it shows, for messages.
    """

    html: str
    styles: Sequence[str]
    scripts: Sequence[str]
    of: str

    def filled(self, about: dict[str, Any], plotly: Embedded, arrays: dict[str, Embedded]) -> str:
        """The page with data.

        Args:
            about: Everything but the arrays, as plain JSON types.
            plotly: The code of plotly.
            arrays: All arrays by name.
        """
        index = {name: array.described() | {"id": f"a{number}"} for number, (name, array) in enumerate(arrays.items())}
        text = json.dumps(about | {"arrays": index, "plotlySize": plotly.shape[0]}, allow_nan=False).encode()
        blocks = {"about": embed(np.frombuffer(text, np.uint8)), "plotly": plotly}
        blocks |= {f"a{number}": array for number, array in enumerate(arrays.values())}
        data = "\n".join(
            f'<script type="application/octet-stream" id="{name}">{block.text}</script>'
            for name, block in blocks.items()
        )
        content = {
            # What a page may load is said once.
            "head": _joined(("head",), "html"), "style": _joined(self.styles, "css"), "data": data,
            "code": _joined(self.scripts, "js"),
        }  # fmt: skip
        # Base64 and the package's own files only: whatever came with the run is inside the compressed blocks.
        frame = _joined((self.html,), "html")
        return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match[1]], frame)

    def fitting(self, about: dict[str, Any], parts: Sequence[Part], most: int) -> str:
        """The page with as much detail as ``most`` bytes hold.

        Raises:
            ImportError: plotly is not installed.
            ValueError: It does not fit, however little detail is left.
        """
        plotly = embed(np.frombuffer(plotly_code().encode(), np.uint8))
        room = most - len(self.filled(about, plotly, {}).encode())
        while True:
            try:
                page = self.filled(about, plotly, fit(parts, room))
            except ValueError:
                page = self.filled(about, plotly, arrays_of(parts))
                # Of the few arrays that are left, less is said than the room was reduced for.
                if (size := len(page.encode())) <= most:
                    return page
                # Rounded up, so that the number itself is enough.
                least = np.ceil(size / MEGABYTE * 100) / 100
                raise ValueError(
                    f"max_megabytes: {most / MEGABYTE:g} is too small for this {self.of}; pooled as far as it goes, it "
                    f"needs {least:g}"
                ) from None
            # What is said of the arrays takes space too, and is known only now.
            excess = len(page.encode()) - most
            if excess <= 0:
                return page
            room -= excess


def plotly_code() -> str:
    """The code of plotly, which pages carry.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'llama_attn[viz]'") from error
    code: str = get_plotlyjs()
    return code


def bytes_of(max_megabytes: float) -> int:
    """A budget in bytes.

    Raises:
        ValueError: It is no positive number.
    """
    if isinstance(max_megabytes, bool) or not isinstance(max_megabytes, (int, float)) or not max_megabytes > 0:
        raise ValueError(f"max_megabytes: expected a positive number, got {max_megabytes!r}")
    return int(max_megabytes * MEGABYTE)


def shown_token(token: str) -> str:
    """A token as text of a page; a long one ends with its length."""
    shown = readable(token, LONGEST_TOKEN)
    return shown if not shown.endswith("…") or len(token) <= LONGEST_TOKEN else f"{shown}[{len(token):,} characters]"


def name_of(model: str) -> str:
    """The name of a model; of a folder, its name is enough."""
    return Path(model).name if Path(model).is_absolute() else model


def _joined(names: Sequence[str], ending: str) -> str:
    text = "\n".join((FOLDER / f"{name}.{ending}").read_text("utf-8") for name in names)
    # Comments of scripts, each a line of its own, are for who changes them: the page has room for numbers.
    return re.sub(r"^ *//.*\n", "", text, flags=re.MULTILINE)
