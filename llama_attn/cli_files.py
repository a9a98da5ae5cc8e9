"""The commands that read saved statistics: ``llama-attn plot``, ``report`` and ``compare``. They need no model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from llama_attn.files import complete_file
from llama_attn.stats.container import AttentionStats
from llama_attn.terminal import check_pictures, console, fail, first_line

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
Saved = Annotated[
    Path, typer.Argument(help="What AttentionStats.save wrote, e.g. stats.safetensors.", show_default=False)
]


def plot(
    file: Saved,
    what: Annotated[str, typer.Option(help="Which picture; an unknown name lists them.")] = "attention-map",
    layer: Annotated[int | None, typer.Option(help="Index of the layer.")] = None,
    head: Annotated[int | None, typer.Option(help="Index of the head; without it, the mean over heads.")] = None,
    batch: Annotated[int | None, typer.Option(help="Row of the batch.")] = None,
    kind: Annotated[str | None, typer.Option(help="What maps show: weights or logits.")] = None,
    statistic: Annotated[str | None, typer.Option(help="Statistic of grids and profiles, e.g. sink_mass.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Picture to write, .png, .svg or .pdf; by default beside FILE.")
    ] = None,
    dpi: Annotated[int, typer.Option(min=20, max=1200, help="Dots per inch.")] = 120,
) -> None:
    """Draw saved statistics."""
    check_pictures()
    pictures = _pictures()
    if what not in pictures:
        fail(f"--what: expected one of {', '.join(pictures)}, got {what!r}")
    options = {"layer": layer, "head": head, "batch": batch, "kind": kind, "statistic": statistic}
    given = {name: value for name, value in options.items() if value is not None}
    taken = [name for name in inspect.signature(pictures[what]).parameters if name in options]
    for name in given:
        if name not in taken:
            fail(f"--{name}: {what} takes {', '.join(f'--{each}' for each in taken)}")
    target = file.with_name(f"{file.stem}_{what}.png") if out is None else out
    if target.suffix not in FORMATS:
        fail(f"--out: expected a name that ends in {', '.join(FORMATS)}, got {target.name!r}")
    stats = _load(file)
    try:
        figure = pictures[what](stats, **given)
        with complete_file(target) as unfinished:
            figure.savefig(unfinished, format=target.suffix[1:], dpi=dpi)
    except (ValueError, OSError) as error:
        fail(first_line(error))
    console.print(f"{target}", highlight=False, markup=False, soft_wrap=True)


def report(
    file: Saved,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; by default beside FILE.")] = None,
    max_megabytes: Annotated[float, typer.Option(min=0.1, help="Largest size; what does not fit is pooled.")] = 12,
    batch: Annotated[int, typer.Option(help="Row of the batch.")] = 0,
) -> None:
    """Write one interactive HTML page about saved statistics, which works offline."""
    check_pictures()
    from llama_attn import viz

    target = file.with_suffix(".html") if out is None else out
    if target.suffix != ".html":
        fail(f"--out: expected a name that ends in .html, got {target.name!r}")
    stats = _load(file)
    try:
        viz.report(stats, target, max_megabytes=max_megabytes, batch=batch)
    except (ValueError, OSError) as error:
        fail(first_line(error))
    console.print(f"{target}", highlight=False, markup=False, soft_wrap=True)


def compare(
    a: Saved,
    b: Saved,
    top: Annotated[int, typer.Option(min=1, help="How many lines to show.")] = 20,
    statistic: Annotated[str | None, typer.Option(help="Show one statistic only.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file for all lines.")] = None,
) -> None:
    """Show what differs between two runs, largest first; b − a, tokens aligned."""
    check_pictures()
    from llama_attn import analysis

    try:
        frame = analysis.compare(_load(a), _load(b))
    except ValueError as error:
        fail(first_line(error))
    if out is not None:
        try:
            with complete_file(out) as unfinished:
                frame.to_csv(unfinished, index=False)
        except OSError as error:
            fail(f"--out: {first_line(error)}")
    if statistic is not None:
        names = sorted(frame.statistic.unique())
        frame = frame[frame.statistic == statistic]
        if frame.empty:
            fail(f"--statistic: expected one of {', '.join(names)}, got {statistic!r}")
    console.print(_table(frame.head(top)))
    shown = min(top, len(frame))
    console.print(
        f"{shown} of {len(frame)} lines" + (f", all are in {out}" if out else ""), highlight=False, markup=False
    )


def _pictures() -> dict[str, Callable[..., Figure]]:
    """Every picture of one run, by the name of its function."""
    from llama_attn import viz

    functions = {name: getattr(viz, name) for name in viz.__all__ if name.startswith("plot_")}
    return {
        name.removeprefix("plot_").replace("_", "-"): function
        for name, function in functions.items()
        if "source" in inspect.signature(function).parameters
    }


def _load(file: Path) -> AttentionStats:
    try:
        return AttentionStats.load(file)
    except (OSError, ValueError) as error:
        fail(f"cannot read {file}: {first_line(error)}")


def _table(frame: pandas.DataFrame) -> Table:
    import pandas

    from llama_attn.viz.style import readable

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("statistic", "layer", "head", "mean a", "mean b", "b − a", "effect", "largest at"):
        table.add_column(heading, no_wrap=True)
    lines: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    for line in lines:
        head, position = ("" if pandas.isna(line[name]) else str(line[name]) for name in ("head", "position"))
        numbers = [f"{line[name]:.3g}" for name in ("mean_a", "mean_b", "difference", "effect")]
        token = f" {escape(readable(line['token']))}" if isinstance(line["token"], str) else ""
        table.add_row(line["statistic"], str(line["layer"]), head, *numbers, position + token)
    return table
