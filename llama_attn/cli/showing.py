"""What a run leaves behind: a folder of pictures, a page and the numbers; and tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from rich.progress import Progress
from rich.table import Table

from llama_attn.analysis.part import measured_part, named_layers, part_of_layers
from llama_attn.analysis.row import row_alone
from llama_attn.cli.folder import STATS, clear
from llama_attn.cli.layers import SEED_LAYERS
from llama_attn.cli.terminal import TABLES, console, how_to_draw, missing, new_table, number, say
from llama_attn.stats.shares import percent
from llama_attn.stats.token_text import LONGEST, readable

if TYPE_CHECKING:
    import xarray

    from llama_attn.stats.container import AttentionStats

# Of a token in the table, as few characters as tell tokens apart.
SHORTEST = 3
# More columns than any table has.
WIDEST = 1000
ACTIVATIONS = ("hidden_max", "hidden_max_channel", "hidden_median")


def show(
    stats: AttentionStats, out: Path, layers: Sequence[int], kind: str, rows: Sequence[str] = (), *, about: str = ""
) -> None:
    """Write everything about a run, in place of what an older one left, and print a line for each measured layer.

    Where packages that pictures need are not installed, the numbers are saved, and what is lacking is said.

    Args:
        stats: Its statistics.
        out: Folder.
        layers: Which layers to draw.
        kind: What attention maps show.
        rows: Names of the rows of the batch, each of which gets a folder of its own; none for a single row.
        about: What ran, for the terminal.
    """
    gone = clear(out)
    stats.save(out / STATS)
    lacking = how_to_draw()
    pictures = 0 if lacking else _draw(stats, out, layers, kind, rows)
    _print_layers(stats, rows)
    if about:
        say(about)
    if gone:
        say(f"pictures and pages of an older run were in {out}; all {gone} are gone or written anew")
    if lacking:
        say(f"{STATS} is in {out}; {lacking}, then llama-attn report {out / STATS}")
        return
    per_row = "report.html for each file" if rows else "report.html"
    say(f"{pictures} pictures, {per_row} and {STATS} are in {out}")
    if undrawn := len(stats.layers) - len(layers):
        verb = "was" if undrawn == 1 else "were"
        say(f"pictures are of {named_layers(layers)}; {undrawn} more {verb} measured, and --layers all draws all")


def _draw(stats: AttentionStats, out: Path, layers: Sequence[int], kind: str, rows: Sequence[str]) -> int:
    """The pictures and the page of every row; how many pictures."""
    from llama_attn.viz import report, save_seed_figures

    # The names of the original set are the original ones.
    drawn = SEED_LAYERS if list(layers) == list(SEED_LAYERS) else layers
    places = {at: out / name for at, name in enumerate(rows)} or {0: out}
    pictures = 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("drawing", total=(3 * len(layers) + 1) * len(places))
        for row, place in places.items():
            pictures += len(
                save_seed_figures(
                    stats, place, drawn, batch=row, kind=cast(Literal["weights", "logits"], kind), partly=True,
                    on_saved=lambda path: progress.advance(task),
                )
            )  # fmt: skip
            report(stats, place / "report.html", batch=row)
            progress.advance(task)
    return pictures


def _print_layers(stats: AttentionStats, rows: Sequence[str]) -> None:
    """The table of every row, under its name where there are several."""
    if lacking := missing(TABLES):
        say(f"no table without {', '.join(lacking)}")
    elif absent := [name for name in ACTIVATIONS if name not in stats]:
        say(f"no table and no pictures of hidden states: this model does not show {', '.join(absent)}")
    else:
        dataset = stats.to_xarray()
        for row, name in enumerate(rows or [""]):
            console.print(_table_of_layers(row_alone(dataset, row), name))


def _table_of_layers(row: xarray.Dataset, name: str) -> Table:
    """A line per layer; tokens are cut until it is no wider than the terminal."""
    from llama_attn.analysis import summarize_layers

    lines = summarize_layers(row, batch=int(row["batch"].values[0]))
    tokens = row["key_token"].isel(batch=0).values.tolist() if "key_token" in row.coords else None
    first = int(row["key"].values[0])
    # The steps of generating have no median in common.
    median = "× median" if "hidden_layer_median" in row else "× median of tokens'\nmedians"
    last = f"largest activation,\n{median}, token"
    headings = ("layer", "sink\nmass", "strongest key: share of all,\n× uniform, queries", last)
    title = ", ".join(filter(None, (name, measured_part(row))))
    for longest in range(LONGEST, SHORTEST - 1, -1):

        def at(position: int, longest: int = longest) -> str:
            return str(position) if tokens is None else f"{position} {readable(tokens[position - first], longest)}"

        table = new_table(*headings, fold=last, title=title)
        for layer, line in lines.iterrows():
            table.add_row(
                str(layer),
                percent(line.sink_mass),
                f"{at(int(line.sink_position))}: {percent(line.share)}, {number(line.boost)} ×, {int(line.queries):,}",
                f"{number(line.activation)}, {number(line.activation_over_median)} ×, "
                f"{at(int(line.activation_position))}",
            )
        # As wide as it would like to be; by itself a table is never wider than the terminal.
        if console.measure(table, options=console.options.update(max_width=WIDEST)).maximum <= console.width:
            break
    return table


def table_of_documents(stats: AttentionStats, prompt_length: int) -> Table:
    """How much attention each document gets: from what was generated, or the last token; in encoders from everywhere.

    Args:
        stats: Statistics of one row with segments.
        prompt_length: Tokens before those that were generated.
    """
    mass = stats["segment_mass"][:, 0]
    length = mass.shape[2]
    first = 0 if stats.direction == "bidirectional" else min(prompt_length, length - 1)
    shares = mass[:, :, first:].nanmean(dim=(0, 1, 2)).tolist()
    whose = (
        "all tokens" if first == 0 else "the last token" if length - first == 1 else f"the last {length - first} tokens"
    )
    part = part_of_layers(stats.layers, stats.num_layers, stats.without_attention)
    table = new_table("document", f"attention of {whose}", fold="document", title=part)
    for name, share in zip(stats.segments or (), shares, strict=True):
        table.add_row(name, percent(share, 1))
    return table
