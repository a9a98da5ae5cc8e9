"""The text, shaded by the attention of one of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from llama_attn.analysis import as_dataset
from llama_attn.analysis.dataset import check_index, real_tokens
from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.analysis.uniform import measured_with
from llama_attn.stats.shares import percent
from llama_attn.viz.figures.canvas import colour_bar, entitle, explain_no_data, new_figure
from llama_attn.viz.figures.scales import square_root
from llama_attn.viz.style import (
    NO_DATA,
    about,
    check_flag,
    drawable,
    of_head,
    of_part,
    pick,
    pick_head,
    pick_row,
    tokens_of,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

# More tokens than these are too many to read; of the others, gaps say how many they are and what they get.
MOST_TOKENS = 600
# Neighbours of an attended token that are written too, and the shortest gap.
AROUND, SHORTEST_GAP = 8, 6
# Of letters: size [points], width of one over that, and distance of lines over that.
LETTERS, LETTER, LINE = 8.0, 0.615, 1.6
WIDTH, BESIDE = 10.0, 1.7
# Lines of the shortest figure, so that the colour bar beside it can be read.
FEWEST_LINES = 15
COLOURS = "Oranges"
# From this share of the darkest colour on letters are white.
DARK = 0.6


@dataclass(frozen=True)
class _Piece:
    """A token or a gap, as it is written.

    Args:
        text: What is written.
        weight: Attention weight; NaN for a gap.
        own: Whether it is the query itself.
        ends_line: Whether the text has a line break here.
    """

    text: str
    weight: float
    own: bool = False
    ends_line: bool = False


def plot_rows(
    source: Source,
    *,
    row: int | None = None,
    layer: int | None = None,
    head: int | None = None,
    batch: int = 0,
    sink: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """The text shaded by the attention of one of its tokens: darker is more, on a square-root scale.

    Of more than 600 tokens those that get most are written, with their neighbours, and the tokens beside the query; each
    gap says how many tokens are left out and what they get together. The query has a frame. The colour bar names
    what each token would get of uniform attention.

    Args:
        source: Statistics with ``row_weights``.
        row: Position of the query in its text, padding not counted; None for the last that was measured.
        layer: Index of the layer; None for the mean over layers.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.
        sink: Whether the first ``sink_tokens`` tokens are shaded; without them, colours are for what the others get.
        ax: Where to draw, as large as it is; None for a figure of its own.

    Raises:
        ValueError: ``row_weights`` were not measured, or not of this query, layer, head or row of the batch.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = as_dataset(source)
    if "row_weights" not in dataset:
        raise NotMeasuredError(
            "source: row_weights were not measured",
            ["rows"],
            'measure with AttentionStatsConfig(rows=(-1,)) or rows="generated"',
            dataset.data_vars,
        )
    check_flag("sink", sink)
    whole = pick_row(dataset, batch)
    of_text = whole if layer is None else pick(dataset, batch=batch, layer=layer)
    row = _row(whole, row)
    values = pick_head(of_text.row_weights.sel(row=row), head)
    weights = (values.mean("layer") if layer is None else values).values
    has_data = np.isfinite(weights)
    real = has_data | real_tokens(of_text, "key").values
    keys = of_text["key"].values
    shaded = has_data & (sink | (np.cumsum(real) > measured_with(dataset, "sink_tokens")))
    high = float(weights[shaded].max(initial=0)) or 1.0
    tokens = tokens_of(of_text, "key")
    pieces = _pieces(keys, weights, real, shaded, tokens, row)
    columns, room, size, lines = _measure(pieces, ax)
    colours = square_root(high)
    figure, axes = new_figure((WIDTH, 1.1 + room * size * LINE / 72), ax)
    drawn = _write(axes, lines, size, colours.norm)
    axes.set(xlim=(0, columns), ylim=(room, 0), xticks=[], yticks=[])
    axes.axis("off")
    colour_bar(
        drawn, axes, f"attention weight [probability]{colours.note}{_uniform(of_text, row)}", ticks=colours.ticks
    )
    if not has_data.any():
        explain_no_data(figure, weights, ax)
    named = "" if tokens is None else f" “{drawable(tokens[int(np.searchsorted(keys, row))])}”"
    where = "mean over layers" + of_part(dataset) if layer is None else f"layer {layer}"
    without = "" if sink else ", without the sink"
    entitle(
        axes,
        f"Attention of the token{named} at {row}, {where}, {of_head(dataset, head)}{without}",
        about(dataset, batch),
    )
    return figure


def _row(dataset: xarray.Dataset, row: int | None) -> int:
    """Position of the query."""
    weights = dataset.row_weights
    has_data = weights.notnull().any([dim for dim in weights.dims if dim != "row"]).values
    # Of a text without any data the picture says so.
    known = weights["row"].values[has_data | ~has_data.any()].tolist()
    if not known:
        raise NotMeasuredError(
            "row: all that were measured are padding", ["rows"], "measure others with AttentionStatsConfig(rows=…)"
        )
    if row is None:
        return int(known[-1])
    check_index("row", row, known)
    if row not in known:
        raise ValueError(f"row: {row} was not measured, or is padding; there are {known}")
    return row


def _pieces(
    keys: Int[np.ndarray, " key"],
    weights: Float[np.ndarray, " key"],
    real: Bool[np.ndarray, " key"],
    shaded: Bool[np.ndarray, " key"],
    tokens: list[str] | None,
    row: int,
) -> list[_Piece]:
    """What is written, up to the query: tokens and gaps."""
    places = np.flatnonzero(real & ((keys <= row) | (np.nan_to_num(weights) > 0)))
    if not len(places):
        return []
    written = _chosen(np.where(shaded, weights, 0)[places], int(np.searchsorted(keys[places], row)))
    pieces: list[_Piece] = []
    for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(written)) + 1):
        if not written[run[0]]:
            mass = float(np.nansum(weights[places[run]]))
            pieces.append(_Piece(f" […{len(run):,} tokens: {percent(mass, 1)}…] ", np.nan))
            continue
        for place in places[run]:
            token = f"{keys[place]} " if tokens is None else drawable(tokens[place]).replace("␣", " ") or " "
            weight = float(weights[place]) if shaded[place] else np.nan
            pieces.append(_Piece(token, weight, keys[place] == row, "⏎" in token))
    return pieces


def _chosen(weights: Float[np.ndarray, " token"], query: int) -> Bool[np.ndarray, " token"]:
    """Which tokens are written: all, or those around the largest weights and around the query."""
    if len(weights) <= MOST_TOKENS:
        return np.ones(len(weights), dtype=bool)
    written = np.zeros(len(weights), dtype=bool)
    for place in (query, 0, *np.argsort(-weights, kind="stable").tolist()):
        if written.sum() > MOST_TOKENS - 2 * AROUND:
            break
        written[max(0, place - AROUND) : place + AROUND + 1] = True
    edges = np.flatnonzero(np.diff(written)) + 1
    for run in np.split(np.arange(len(weights)), edges):
        if not written[run[0]] and len(run) < SHORTEST_GAP:
            written[run] = True
    return written


def _measure(pieces: list[_Piece], ax: Axes | None) -> tuple[int, float, float, list[list[_Piece]]]:
    """Letters for which a line has room, lines for which there is room, size of letters [points], and the lines."""
    if ax is None:
        columns = int((WIDTH - BESIDE) * 72 / (LETTERS * LETTER))
        lines = _lines(pieces, columns)
        return columns, max(len(lines), FEWEST_LINES), LETTERS, lines
    whole, _ = new_figure(ax=ax)
    wide, high = (72 * float(length) / whole.dpi for length in ax.bbox.size)
    # The colour bar will take some of it.
    wide = max(wide - 72 * BESIDE, wide / 2)
    size = LETTERS
    while True:
        columns = max(12, int(wide / (size * LETTER)))
        lines = _lines(pieces, columns)
        room = high / (size * LINE)
        if len(lines) <= room or size <= 1.5:
            return columns, max(len(lines), room), size, lines
        size *= 0.93


def _lines(pieces: list[_Piece], columns: int) -> list[list[_Piece]]:
    """Pieces in lines of so many letters at most; breaks of the text stay."""
    lines: list[list[_Piece]] = [[]]
    used = 0
    for piece in pieces:
        if used and used + len(piece.text) > columns:
            lines.append([])
            used = 0
        lines[-1].append(piece)
        used += len(piece.text)
        if piece.ends_line:
            lines.append([])
            used = 0
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


def _write(axes: Axes, lines: list[list[_Piece]], size: float, norm: Any) -> Any:
    """Write the lines, and return what their colours belong to."""
    from matplotlib import colormaps, rcParams
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    colours = colormaps[COLOURS]
    fonts = ["monospace", *rcParams["font.family"]]
    cells, weights, frames = [], [], []
    for line, pieces in enumerate(lines):
        at = 0
        for piece in pieces:
            cell = Rectangle((at, line + 0.08), len(piece.text), 0.84)
            gap = not np.isfinite(piece.weight)
            cells.append(cell)
            weights.append(piece.weight)
            if piece.own:
                frames.append(Rectangle((at, line + 0.08), len(piece.text), 0.84))
            ink = "#555555" if gap else "white" if norm(piece.weight) > DARK else "black"
            axes.text(
                at, line + 0.5, piece.text, fontsize=size, family=fonts, color=ink, va="center_baseline",
                style="italic" if gap else "normal", parse_math=False, clip_on=True,
            )  # fmt: skip
            at += len(piece.text)
    shades = PatchCollection(cells, cmap=colours.with_extremes(bad=NO_DATA), norm=norm, linewidths=0)
    shades.set_array(np.ma.masked_invalid(weights))
    axes.add_collection(shades)
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor="black", linewidths=1.2))
    return shades


def _uniform(dataset: xarray.Dataset, row: int) -> str:
    """What each key would get, for the colour bar; nothing if it is not known how many there are."""
    if row not in dataset["query"].values:
        return ""
    visible = dataset.visible_keys.sel(query=row)
    even = float((1 / visible.where(visible > 0)).mean())
    return f"; uniform: {even:.2g}" if np.isfinite(even) else ""
