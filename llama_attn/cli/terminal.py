"""What the commands share: where they write, and how they end when something is wrong."""

from __future__ import annotations

import importlib.util
from typing import NoReturn

import typer
from rich.console import Console

console = Console()


def fail(message: str) -> NoReturn:
    """End the command with a message on the error stream, on one line, and exit status 2."""
    Console(stderr=True).print(f"llama-attn: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a terminal."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Some only announce what the next line says.
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def check_pictures() -> None:
    """End the command if a package that pictures and tables need is not installed."""
    missing = [name for name in ("matplotlib", "plotly", "xarray", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"pictures need {', '.join(missing)}: pip install 'llama_attn[viz]'")
