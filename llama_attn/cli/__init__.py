"""The ``llama-attn`` command, one file per group of subcommands."""

from __future__ import annotations

import inspect
import runpy
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer

from llama_attn import __version__
from llama_attn.cli import ablate, budget, corpus, engine, heads, run, saved
from llama_attn.cli.terminal import console, fail, first_line, plain_warning

# Help as plain text: in the columns of the other kind long names of options are cut where 80 columns are all there is.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for _command in (
    run.demo, run.run, heads.heads, ablate.ablate, budget.budget, corpus.corpus, corpus.merge, saved.plot, saved.report,
    saved.compare, engine.backends, engine.build,
):  # fmt: skip
    app.command(short_help=" ".join(str(inspect.getdoc(_command)).partition("\n\n")[0].split()))(_command)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    own: Annotated[
        list[Path] | None,
        typer.Option(
            "--import", help="Python file to run before the command, that registers statistics or backends of your own."
        ),
    ] = None,
) -> None:
    """Exact statistics of every attention head of a Llama."""
    warnings.formatwarning = plain_warning
    if version:
        console.print(__version__)
        raise typer.Exit
    for path in own or []:
        if not path.is_file():
            fail(f"--import: there is no file {path}")
        try:
            runpy.run_path(str(path))
        except Exception as error:
            # The user's own code may fail in any way: its line is named, and not all that led there.
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            line = f", line {lines[-1]}" if lines else ""
            fail(f"--import: {path}{line}: {type(error).__name__}: {first_line(error)}")
