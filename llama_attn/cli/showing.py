"""What a run leaves behind: a folder of pictures, a page and the numbers; and tables on the terminal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from llama_attn.cli.terminal import console, fail, first_line
from llama_attn.stats.token_text import readable

if TYPE_CHECKING:
    from llama_attn.stats.container import AttentionStats

ACTIVATIONS = ("hidden_max", "hidden_max_channel", "hidden_median")


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """A folder that can be written to. If the command fails, what was made for it is taken away.

    Made before the work, so that nobody waits for a model and then learns that there is no room for its pictures.
    """
    new = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        _remove(new)
        fail(f"--out: cannot make the folder {out}: {first_line(error)}")
    try:
        yield out
    except OSError as error:
        _remove(new)
        fail(f"--out: cannot write to {out}: {first_line(error)}")
    except BaseException:
        _remove(new)
        raise


def _remove(folders: Sequence[Path]) -> None:
    for path in folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def show(
    stats: AttentionStats, out: Path, layers: Sequence[int], kind: str, rows: Sequence[str] = (), *, about: str = ""
) -> None:
    """Write everything about a run, and print a line for each layer.

    Args:
        stats: What was measured.
        out: The folder.
        layers: Layers to draw.
        kind: What attention maps show.
        rows: Names of the rows of the batch, each of which gets a folder of its own; none for a single row.
        about: What ran, for the terminal.
    """
    from llama_attn.viz import report, save_seed_figures

    stats.save(out / "stats.safetensors")
    places = {at: out / name for at, name in enumerate(rows)} or {0: out}
    pictures = 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("drawing", total=3 * len(layers) * len(places))
        for row, place in places.items():
            pictures += len(
                save_seed_figures(
                    stats, place, layers, batch=row, kind=cast(Literal["weights", "logits"], kind), partly=True,
                    on_saved=lambda path: progress.advance(task),
                )
            )  # fmt: skip
            report(stats, place / "report.html", batch=row)
    for row in places:
        if rows:
            console.print(f"\n{rows[row]}", highlight=False, markup=False)
        _print_layers(stats, row)
    if about:
        console.print(about, highlight=False, markup=False, soft_wrap=True)
    per_row = "report.html for each file" if rows else "report.html"
    console.print(f"{pictures} pictures, {per_row} and stats.safetensors are in {out}", highlight=False, markup=False)


def _print_layers(stats: AttentionStats, row: int) -> None:
    missing = [name for name in ACTIVATIONS if name not in stats]
    if missing:
        console.print(
            f"no table and no pictures of hidden states: this model does not show {', '.join(missing)}", highlight=False
        )
    else:
        console.print(_table_of_layers(stats, row))


def _table_of_layers(stats: AttentionStats, row: int) -> Table:
    from llama_attn.analysis import summarize_layers

    tokens = stats.tokens[row] if stats.tokens is not None else []
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("layer", "sink mass", "strongest, receives", "largest activation, × median"):
        table.add_column(heading, no_wrap=True)
    for layer, line in summarize_layers(stats, batch=row).iterrows():
        sink, peak = int(line.sink_position), int(line.activation_position)
        table.add_row(
            str(layer),
            f"{line.sink_mass:.0%}",
            f"{sink} {escape(readable(tokens[sink]))}, {line.received:.0%}",
            f"{line.activation:,.0f}, {line.activation_over_median:,.0f} ×, {peak} {escape(readable(tokens[peak]))}",
        )
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
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("document", f"attention of {whose}"):
        table.add_column(heading, no_wrap=True)
    for name, share in zip(stats.segments or (), shares, strict=True):
        table.add_row(escape(name), f"{share:.1%}")
    return table
