"""What the commands share: where they write, and how they end when something is wrong."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_attn.cli.advice import advised
from llama_attn.cli.installation import fitted, pip_line

PICTURES = ("matplotlib", "plotly", "xarray", "pandas")
FORMAT_WARNING = warnings.formatwarning
TABLES = ("xarray", "pandas")
# What -99,999, -1.2e-5 and -1e-300 take [characters]; with more, tables of many numbers are wider than 80.
WIDEST_NUMBER = 7
# Three digits of larger numbers are rounded before the point.
ALL_DIGITS_FROM = 999.5


class PlainConsole(Console):
    """A console to which every string is data: it knows no markup and no emoji, and a terminal has nothing to obey.

    What is printed holds names, units, tokens and messages of files and models that anybody may have written.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every string on its way to the terminal, those in tables too."""
        return super().render_str(printable(text), **settings)


console = PlainConsole()


def say(message: str) -> None:
    """A line that is not broken, so that paths and commands in it can be copied."""
    console.print(message, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """End the command with a message on the error stream, on one line, and exit status 2."""
    PlainConsole(stderr=True).print(f"llama-attn: {fitted(message)}", style="red", soft_wrap=True)
    raise typer.Exit(2)


def plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package without the place in its source, for `warnings.formatwarning`; others as ever."""
    if Path(__file__).parent.parent in Path(filename).parents:
        return f"llama-attn: warning: {printable(str(message))}\n"
    return FORMAT_WARNING(message, category, filename, lineno, line)


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a terminal."""
    first, *others = [line.strip() for line in advised(error).splitlines() if line.strip()] or [type(error).__name__]
    # Some only announce what the next line says, or break a sentence.
    while others and first.endswith((":", ",", " or", " and")):
        first = f"{first} {others.pop(0)}"
    return first


def printable(text: str) -> str:
    """A text without the characters that a terminal would obey; line breaks and tabs stay."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def number(value: float, decimals: int | None = None, sign: Literal["-", "+"] = "-") -> str:
    """A number in no more characters than columns of tables have for it, whatever it is; – for none.

    Args:
        value: The number.
        decimals: Behind the point, if it is below 1000; without, three digits.
        sign: + to write it before positive numbers, too.
    """
    if value != value:
        return "–"
    written = [f"{value:{sign}.{digits}g}" for digits in (3, 2, 1)]
    # Of 1e+06 and 1e-05 what says as much.
    written = [one.replace("e+", "e").replace("e0", "e").replace("e-0", "e-") for one in written]
    if abs(value) >= ALL_DIGITS_FROM:
        written = [f"{value:{sign},.0f}", *written]
    elif decimals is not None:
        written = [f"{value:{sign}.{decimals}f}", *written]
    return next(one for one in written if len(one) <= WIDEST_NUMBER)


def new_table(*headings: str, fold: str, title: str = "") -> Table:
    """A table that fits into 80 columns: the columns keep their width but one, whose cells are broken where needed.

    Args:
        headings: Of the columns.
        fold: That one's heading.
        title: Above the table; none if empty.
    """
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        title=title or None,
        title_justify="left",
    )
    for heading in headings:
        table.add_column(heading, no_wrap=heading != fold, overflow="fold")
    return table


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of some packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def how_to_draw() -> str | None:
    """What pictures need and how to get it; None if everything is there."""
    lacking = missing(PICTURES)
    return f"pictures need {', '.join(lacking)}: {pip_line('viz')}" if lacking else None


def check_pictures() -> None:
    """End the command if a package that pictures and tables need is not installed."""
    if (reason := how_to_draw()) is not None:
        fail(reason)
