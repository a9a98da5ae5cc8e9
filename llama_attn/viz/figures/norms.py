"""Norms along the text: the residual stream, and keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, require
from llama_attn.viz.figures.along import MOST_TOKENS, draw_line, name_outliers, of_bins, width_of
from llama_attn.viz.figures.canvas import add_legend, entitle, label_axes, new_figure
from llama_attn.viz.style import (
    BLUE,
    MOST_LABELS,
    ORANGE,
    SIZE,
    about,
    label_tokens,
    pick,
    say_no_data,
    spiky,
    tokens_of,
    unit_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

# Height of a figure that is wider than others [inches].
LOW = 4.5


def plot_hidden_norms(source: Source, *, layer: int = 0, batch: int = 0, ax: Axes | None = None) -> Figure:
    """L2 norm of the residual stream that enters a layer, token by token.

    Of more than 160 tokens only those that stand out are named; beyond 800, points are means of several tokens, in a
    band from the smallest to the largest, and the title says of how many.

    Args:
        source: Statistics with ``hidden_norm``.
        layer: Index of the layer; the number of layers stands for the last layer's output.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The statistic, layer or row was not measured.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = as_dataset(source)
    require(dataset, "hidden_norm")
    row = pick(dataset, layer=layer, batch=batch, axis="hidden_layer")
    figure, axes = _figure(len(row["key"]), ax)
    norms = row.hidden_norm.values
    positions = row["query"].values
    draw_line(axes, positions, norms, BLUE, linewidth=2)
    output = layer == row.attrs["num_layers"]
    where = "after the last layer" if output else f"entering layer {layer}"
    entitle(axes, f"Residual stream {where}{of_bins(len(norms))}", about(dataset, batch))
    label_axes(axes, y=f"L2 norm {unit_of(row.hidden_norm)}")
    _along_text(axes, positions, [norms], tokens_of(row, "query"), ax)
    return figure


def plot_kv_norms(source: Source, *, layer: int = 0, batch: int = 0, ax: Axes | None = None) -> Figure:
    """L2 norms of keys (after RoPE) and values, token by token.

    Solid: the mean over KV heads of the norms. Dashed: the norm of the mean over KV heads, which is smaller where
    heads point in different directions. Long texts are drawn as in `plot_hidden_norms`.

    Args:
        source: Statistics with ``key_norm``, ``value_norm``, ``key_mean_norm`` and ``value_mean_norm``.
        layer: Index of the layer.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: A statistic, the layer or the row was not measured.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = as_dataset(source)
    require(dataset, "key_norm", "value_norm", "key_mean_norm", "value_mean_norm")
    row = pick(dataset, layer=layer, batch=batch)
    figure, axes = _figure(len(row["key"]), ax)
    positions = row["key"].values
    norms = []
    for name, colour in (("key", BLUE), ("value", ORANGE)):
        norms += [row[f"{name}_norm"].mean("kv_head", skipna=False).values, row[f"{name}_mean_norm"].values]
        draw_line(axes, positions, norms[-2], colour, f"{name}: mean of norms", linewidth=2)
        draw_line(axes, positions, norms[-1], colour, f"{name}: norm of mean", linewidth=2, linestyle="--")
    entitle(axes, f"Keys and values, layer {layer}{of_bins(len(positions))}", about(dataset, batch))
    label_axes(axes, y=f"L2 norm {unit_of(row.key_norm)}")
    add_legend(figure, ax, ncols=2)
    _along_text(axes, positions, norms, tokens_of(row, "key"), ax)
    return figure


def _figure(length: int, ax: Axes | None) -> tuple[Figure, Axes]:
    return new_figure((width_of(length), LOW) if length > MOST_LABELS else SIZE, ax)


def _along_text(
    axes: Axes, positions: np.ndarray, drawn: list[np.ndarray], tokens: list[str] | None, ax: Axes | None
) -> None:
    axes.grid(alpha=0.4)
    label_axes(axes, "position [token]")
    everything = np.concatenate(drawn)
    say_no_data(axes, everything)
    if spiky(everything):
        axes.set_yscale("log")
    # Axes of another's may be of any width.
    most = MOST_TOKENS if ax is None else MOST_LABELS
    label_tokens(axes, "x", positions.tolist(), tokens, most=most)
    if len(positions) > most:
        for values in drawn[::2]:
            name_outliers(axes, positions, values, tokens)
