"""Massive activations: the largest numbers in the residual stream, by layer and token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, massive_activations
from llama_attn.analysis.activations import MAGNITUDE, RATIO
from llama_attn.analysis.row import row_alone
from llama_attn.viz.figures.along import MOST_TOKENS, in_bins, tokens_per_bin
from llama_attn.viz.figures.canvas import add_legend, colour_bar, entitle, explain_no_data, label_axes
from llama_attn.viz.style import (
    AMBER,
    BLUE,
    GREEN,
    NO_DATA,
    ORANGE,
    PINK,
    SKY,
    about,
    empty_figure,
    heat_map,
    label_tokens,
    of_layers,
    of_part,
    tokens_of,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

CHANNEL_COLOURS = (ORANGE, PINK, "white", AMBER, SKY, GREEN)


def plot_massive_activations(source: Source, *, batch: int = 0) -> Figure:
    """The largest magnitude of every token in the residual stream, layer by layer.

    Left: layer × token, logarithmic colours. Marks are massive activations, one colour per channel, all of a token on
    top of each other; only its largest where ``hidden_top`` was not measured.
    Of more than 800 tokens, each cell is the largest of several, and the title says of how many.
    Right: the largest and the median magnitude of every layer, and what a massive activation exceeds.

    Args:
        source: What `massive_activations` needs.
        batch: Row of the batch.

    Raises:
        ValueError: A statistic or the row was not measured.
    """
    dataset = as_dataset(source)
    found = massive_activations(row_alone(dataset, batch)).isel(batch=0).sortby("hidden_layer")
    found = found.assign_attrs(dataset.attrs)
    layers = found["hidden_layer"].values
    length = found.sizes["query"]
    # As wide as the labels of all tokens need, if they are written.
    width = max(9, 4.5 + 0.115 * length) if length <= MOST_TOKENS else 17
    figure = empty_figure((width, float(np.clip(2 + 0.17 * len(layers), 4, 20))))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    _draw_tokens(figure, left, found)
    label_tokens(left, "x", found["query"].values.tolist(), tokens_of(found, "query"), most=MOST_TOKENS)
    rows = range(len(layers))
    largest, median = found.magnitude.max("query").values, found["median"].values
    right.plot(largest, rows, color=BLUE, linewidth=2, label="largest")
    right.plot(median, rows, color=GREEN, linewidth=2, label="median")
    bound = np.maximum(MAGNITUDE, RATIO * median)
    right.plot(bound, rows, color=ORANGE, linewidth=1.5, linestyle="--", label="massive beyond")
    if np.isfinite(largest).any() and np.nanmin([largest, median]) > 0:
        right.set_xscale("log")
    label_axes(right, "magnitude [activation]")
    right.tick_params(labelleft=True)
    right.grid(alpha=0.4)
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    add_legend(figure, None, handles, ncols=min(len(handles), 6))
    title = "Largest magnitude in the residual stream that enters each layer (the last row is the output)"
    size = tokens_per_bin(length)
    pooled = f", each cell of {size} tokens" if size > 1 else ""
    entitle(figure, f"{title}{of_part(dataset)}{pooled}", about(dataset, batch))
    return figure


def _draw_tokens(figure: Figure, axes: Axes, found: xarray.Dataset) -> None:
    from matplotlib.colors import LogNorm

    cells = found.magnitude.transpose("hidden_layer", "query").values
    positions = found["query"].values
    # Of a long text the largest of several tokens: pixels would show some of them and leave out others.
    size = tokens_per_bin(len(positions))
    bins = [in_bins(positions, row, size) for row in cells]
    cells = np.stack([each.high for each in bins])
    positive = cells[cells > 0]
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)) if positive.size else None
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    first = positions[0] - step / 2
    extent = (first, first + step * size * cells.shape[1], len(cells) - 0.5, -0.5)
    image = heat_map(axes, cells, norm=norm, extent=extent)
    # Below, since a label to the right would seem to be of the panel there.
    colour_bar(image, axes, "largest magnitude [activation]", location="bottom", aspect=60, pad=0.02)
    layers = found["hidden_layer"].values
    every = -(-len(layers) // 40)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    label_axes(axes, f"position [token]{of_layers(found)}", "layer")
    channels = found.channels.transpose("hidden_layer", "query", "rank").values
    numbers, counts = np.unique(channels[channels >= 0], return_counts=True)
    often = numbers[np.argsort(-counts, kind="stable")]
    # Smaller and smaller, since a token has several in one place.
    for place, (number, colour) in enumerate(zip(often, CHANNEL_COLOURS, strict=False)):
        rows, columns = np.nonzero((channels == number).any(-1))
        axes.plot(
            positions[columns], rows, linestyle="none", marker="s", markersize=6 * 0.75**place, markerfacecolor=colour,
            markeredgecolor="black", markeredgewidth=0.7, label=f"massive, channel {number}",
        )  # fmt: skip
    rows, columns = np.nonzero(np.isin(channels, often[len(CHANNEL_COLOURS) :]).any(-1))
    if len(rows):
        axes.plot(
            positions[columns], rows, linestyle="none", marker="x", color=NO_DATA, label="massive, other channels"
        )
    if not np.isfinite(cells).all():
        explain_no_data(figure, cells)
