"""The commands that read saved statistics: ``llama-attn plot``, ``report`` and ``compare``. They need no model."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_attn.cli.folder import STATS
from llama_attn.cli.options import refuse
from llama_attn.cli.terminal import check_pictures, console, fail, first_line, new_table, number, say
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.files import complete_file
from llama_attn.stats.table import statistics_table
from llama_attn.stats.token_text import readable

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.table import Table

# What runs leave in their folders.
SAVED = ("summary.safetensors", STATS)
# What a picture of two runs shows if nobody says.
WHAT_DIFFERS = "head-comparison"
FORMATS = (".png", ".svg", ".pdf")
DPI = 120
# What `_pictures` finds of one run, for the help, which is said before anything that draws is loaded.
OF_ONE_RUN = (
    "attention-map", "coverage", "distance-histogram", "head-grid", "head-roles", "hidden-norms", "kv-norms", "layer-heads",
    "layer-profile", "massive-activations", "model-view", "rows", "sources", "token-strip",
)  # fmt: skip
# In lines that the help keeps as they are: by itself it would break names behind hyphens.
WHICH = textwrap.fill(", ".join(OF_ONE_RUN), 48, break_on_hyphens=False)
Saved = Annotated[
    Path, typer.Argument(help="What AttentionStats.save wrote, or the folder of a run.", show_default=False)
]
OfEither = Annotated[
    Path,
    typer.Argument(
        help="What AttentionStats.save wrote, the summary of a corpus, or the folder of a run that has one.",
        show_default=False,
    ),
]
Layer = Annotated[int | None, typer.Option(help="Index of the layer.")]
Head = Annotated[int | None, typer.Option(help="Index of the head; without it, the mean over heads.")]
Batch = Annotated[int | None, typer.Option(help="Row of the batch.")]
Kind = Annotated[str | None, typer.Option(help="What maps show: weights or logits.")]
Dpi = Annotated[int | None, typer.Option(min=20, max=1200, help="Dots per inch.", show_default=str(DPI))]


def plot(
    file: Saved,
    what: Annotated[
        str, typer.Option(help=f"Which picture:\n\n\b\n{WHICH}.\n\nEach is shown in docs/gallery.md.")
    ] = "attention-map",
    layer: Layer = None,
    head: Head = None,
    batch: Batch = None,
    kind: Kind = None,
    statistic: Annotated[str | None, typer.Option(help="Statistic of grids and profiles, e.g. sink_mass.")] = None,
    query_slice: Annotated[
        str | None, typer.Option(help="Queries that roles of heads count, e.g. 65: or 65:129.", metavar="START:STOP")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Picture to write, .png, .svg or .pdf; by default beside FILE.")
    ] = None,
    dpi: Dpi = None,
) -> None:
    """Draw saved statistics."""
    check_pictures()
    options: dict[str, Any] = {"layer": layer, "head": head, "batch": batch, "kind": kind, "statistic": statistic}
    options["query_slice"] = None if query_slice is None else _slice(query_slice)
    picture, given = _picture(what, _pictures("source"), options)
    file = _in_folder(file)
    target = file.with_name(f"{file.stem}_{what}.png") if out is None else out
    _check_format("--out", target)
    stats = _load(file)
    if statistic is not None and statistic not in {*stats.names, *statistics_table()}:
        fail(f"--statistic: unknown {statistic!r}; there are {', '.join(stats.names)}")
    _draw(picture, (stats,), given, target, dpi)


def report(
    file: OfEither,
    out: Annotated[Path | None, typer.Option(help="File to write; by default beside FILE.")] = None,
    max_megabytes: Annotated[
        float | None, typer.Option(min=0.1, help="Largest size; what does not fit is pooled.", show_default="12")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Row of the batch; not of a corpus.", show_default="0")] = None,
    exact: Annotated[
        str | None,
        typer.Option(
            help="Tokens whose own links must stay: positions and slices with commas, e.g. -1,6227 or -32:.",
            metavar="POSITIONS",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Of a corpus: write JSON for other viewers in place of the page.")
    ] = False,
) -> None:
    """Write one interactive HTML page about saved statistics, which works offline."""
    check_pictures()
    from llama_attn import viz
    from llama_attn.corpus.store import is_summary

    file = _in_folder(file)
    target = file.with_suffix(".json" if json else ".html") if out is None else out
    if target.suffix != (suffix := ".json" if json else ".html"):
        fail(f"--out: expected a name that ends in {suffix}, got {target.name!r}")
    given = {"max_megabytes": max_megabytes, "batch": batch, "exact": None if exact is None else _positions(exact)}
    given = {name: value for name, value in given.items() if value is not None}
    of_corpus = is_summary(file)
    taken = () if json else ("max_megabytes",) if of_corpus else (*given,)
    if json and not of_corpus:
        fail(f"--json: it is of summaries of a corpus, and {file} is none")
    untaken = {name: value for name, value in given.items() if name not in taken}
    refuse(untaken, f"{'JSON' if json else 'the report of a corpus'} has no such option")
    source: Any = file if of_corpus else _load(file)
    write: Callable[..., Path] = viz.corpus_json if json else viz.corpus_report if of_corpus else viz.report
    try:
        write(source, target, **given)
    except (ValueError, OSError) as error:
        fail(first_line(error))
    say(str(target))


def compare(
    a: OfEither,
    b: OfEither,
    top: Annotated[int, typer.Option(min=1, help="How many lines to show.")] = 20,
    statistic: Annotated[str | None, typer.Option(help="Show one statistic only.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file for all lines.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the differences, .png, .svg or .pdf; not of corpora.")
    ] = None,
    what: Annotated[
        str | None,
        typer.Option(
            help=f"What --plot shows: maps (comparison) or, by default, heads by --statistic ({WHAT_DIFFERS}).",
            show_default=False,
        ),
    ] = None,
    layer: Layer = None,
    head: Head = None,
    batch: Batch = None,
    kind: Kind = None,
    dpi: Dpi = None,
) -> None:
    """Show what differs between two runs, or two corpora, largest first; b − a, tokens aligned."""
    check_pictures()
    from llama_attn import analysis
    from llama_attn.corpus.store import is_summary

    a, b = _in_folder(a), _in_folder(b)
    options = {"layer": layer, "head": head, "batch": batch, "kind": kind}
    of_corpora = is_summary(a), is_summary(b)
    if of_corpora == (True, True):
        drawing = {"plot": plot, "what": what, **options, "dpi": dpi}
        refuse(drawing, "it is of two runs, and these are summaries of corpora; see their reports")
        frame = _compared(a, b)
        _check_statistic(frame, statistic)
        _say_compared(frame, _table_of_corpora, top, statistic, out)
        return
    if any(of_corpora):
        fail(f"{a if of_corpora[0] else b} is the summary of a corpus, and {b if of_corpora[0] else a} is none")
    picture, given = _picture(what or WHAT_DIFFERS, _pictures("a"), options)
    if plot is not None:
        _check_format("--plot", plot)
    else:
        refuse({**given, "what": what, "dpi": dpi}, "it is for the picture; name a file with --plot")
    runs = _load(a), _load(b)
    # What comparing and drawing warn of is printed below.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            frame = analysis.compare(*runs)
        except ValueError as error:
            fail(first_line(error))
        _check_statistic(frame, statistic)
        if plot is not None:
            if statistic is not None and "statistic" in inspect.signature(picture).parameters:
                given["statistic"] = statistic
            _draw(picture, runs, given, plot, dpi)
    _say_compared(frame, _table, top, statistic, out)


def _compared(a: Path, b: Path) -> pandas.DataFrame:
    """What differs between two corpora."""
    from llama_attn.corpus import compare

    try:
        return compare(a, b)
    except ValueError as error:
        fail(first_line(error))


def _check_statistic(frame: pandas.DataFrame, statistic: str | None) -> None:
    names = sorted(frame.statistic.unique())
    if statistic is not None and statistic not in names:
        fail(f"--statistic: expected one of {', '.join(names)}, got {statistic!r}")


def _say_compared(
    frame: pandas.DataFrame,
    as_table: Callable[[pandas.DataFrame], Table],
    top: int,
    statistic: str | None,
    out: Path | None,
) -> None:
    """Print the first lines of one statistic or all, and write all."""
    if out is not None:
        try:
            with complete_file(out) as unfinished:
                frame.to_csv(unfinished, index=False, errors="backslashreplace")
        except OSError as error:
            fail(f"--out: {first_line(error)}")
    shown = frame if statistic is None else frame[frame.statistic == statistic]
    console.print(as_table(shown.head(top)))
    for name, value in frame.attrs.items():
        words = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
        if words:
            say(f"{name}: {words}")
    say(f"{min(top, len(shown))} of {len(shown)} lines" + (f", all are in {out}" if out else ""))


def _pictures(parameter: str) -> dict[str, Callable[..., Figure]]:
    """Every picture of statistics alone whose function has the parameter: ``source`` of one run, ``a`` of two.

    Returns:
        The functions by their names.
    """
    from llama_attn import viz

    functions = {name: getattr(viz, name) for name in viz.__all__ if name.startswith("plot_")}
    return {
        name.removeprefix("plot_").replace("_", "-"): function
        for name, function in functions.items()
        if parameter in (given := _required(function)) and given <= {"source", "a", "b"}
    }


def _required(function: Callable[..., Figure]) -> set[str]:
    """Parameters without a default."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is parameter.empty}


def _picture(
    what: str, pictures: dict[str, Callable[..., Figure]], options: dict[str, Any]
) -> tuple[Callable[..., Figure], dict[str, Any]]:
    """The function of a picture, and the options that were given, all of which it takes."""
    if what not in pictures:
        fail(f"--what: expected one of {', '.join(pictures)}, got {what!r}")
    taken = [name for name in inspect.signature(pictures[what]).parameters if name in options]
    given = {name: value for name, value in options.items() if value is not None}
    flags = [f"--{name.replace('_', '-')}" for name in taken]
    untaken = {name: value for name, value in given.items() if name not in taken}
    refuse(untaken, f"{what} takes {', '.join(flags) or 'no such option'}")
    return pictures[what], given


def _slice(text: str) -> slice:
    start, colon, stop = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (start, stop)):
        fail(f"--query-slice: expected positions like 65: or 65:129, got {text!r}")
    return slice(int(start) if start else None, int(stop) if stop else None)


def _positions(text: str) -> list[int | slice]:
    """Positions and slices, either of which may count from the end."""
    found: list[int | slice] = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split(":")]
        try:
            numbers = [None if end == "" and len(ends) == 2 else int(end) for end in ends]
        except ValueError:
            numbers = []
        if numbers and numbers[0] is not None and len(numbers) == 1:
            found.append(numbers[0])
        elif len(numbers) == 2:
            found.append(slice(*numbers))
        else:
            fail(f"--exact: expected positions and slices like -1,6227 or -32:, got {text!r}")
    return found


def _check_format(option: str, target: Path) -> None:
    if target.suffix not in FORMATS:
        fail(f"{option}: expected a name that ends in {', '.join(FORMATS)}, got {target.name!r}")


def _draw(
    picture: Callable[..., Figure],
    runs: tuple[AttentionStats, ...],
    given: dict[str, Any],
    target: Path,
    dpi: int | None,
) -> None:
    """Draw a picture and write it."""
    try:
        figure = picture(*runs, **given)
        with complete_file(target) as unfinished:
            figure.savefig(unfinished, format=target.suffix[1:], dpi=DPI if dpi is None else dpi)
    except (ValueError, OSError) as error:
        fail(first_line(error))
    say(str(target))


def _in_folder(file: Path) -> Path:
    """The file itself, or the one that a run has left in this folder."""
    if not file.is_dir():
        return file
    found = [file / name for name in SAVED if (file / name).is_file()]
    if len(found) > 1:
        fail(f"{file} is a folder with {' and '.join(SAVED)}; give one of them")
    if not found:
        fail(f"{file} is a folder; there is no {' or '.join(SAVED)} in it")
    return found[0]


def _load(file: Path) -> AttentionStats:
    from llama_attn.corpus.store import is_summary

    if is_summary(file):
        fail(f"{file} is the summary of a corpus, which has a report: llama-attn report {file}")
    try:
        return AttentionStats.load(file)
    except (OSError, ValueError) as error:
        fail(f"cannot read {file}: {first_line(error)}")


def _table(frame: pandas.DataFrame) -> Table:
    import pandas

    headings = ("statistic", "layer", "head", "mean a", "mean b", "b − a", "effect", "largest at")
    table = new_table(*headings, fold=headings[-1])
    lines: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    for line in lines:
        head, position = ("" if pandas.isna(line[name]) else str(line[name]) for name in ("head", "position"))
        numbers = [number(line[name]) for name in ("mean_a", "mean_b", "difference", "effect")]
        token = f" {readable(line['token'])}" if isinstance(line["token"], str) else ""
        table.add_row(line["statistic"], str(line["layer"]), head, *numbers, position + token)
    return table


def _table_of_corpora(frame: pandas.DataFrame) -> Table:
    apart = "b − a ± 95 %"
    headings = ["statistic", "layer", "head", "mean a", "mean b", apart, "effect"]
    # A column with nothing in it would break another.
    if has_pairs := bool((frame.texts > 0).any()):
        headings.append("paired")
    # Names stay whole; where a line is too long, what stands behind ± has one of its own.
    table = new_table(*headings, fold=apart)
    lines: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    for line in lines:
        means = [number(line[name]) for name in ("mean_a", "mean_b")]
        cells = [line["statistic"], str(line["layer"]), str(line["head"]), *means]
        difference = line["difference"]
        cells += [f"{number(difference)} ±{number(line['high'] - difference)}", number(line["effect"])]
        cells += [number(line["paired_effect"])] if has_pairs else []
        table.add_row(*cells)
    return table
