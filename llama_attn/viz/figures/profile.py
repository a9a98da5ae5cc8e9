"""Lines and bars: a statistic through the layers, and attention by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, layer_evolution, require
from llama_attn.analysis.layers import check_suited, one_per_layer
from llama_attn.analysis.part import named_range
from llama_attn.analysis.row import row_alone
from llama_attn.analysis.uniform import uniform_attention
from llama_attn.viz.figures.canvas import add_legend, entitle, label_axes, new_figure
from llama_attn.viz.style import (
    BLUE,
    ORANGE,
    about,
    heading,
    named,
    of_head,
    of_layers,
    of_part,
    of_segment,
    pick,
    pick_head,
    pick_segment,
    say_no_data,
    spiky,
    unit_of,
    written,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source


def plot_layer_profile(
    source: Source,
    statistic: str = "entropy",
    *,
    segment: str | None = None,
    batch: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """A statistic through the layers: the mean over heads, one standard deviation, and the smallest and largest head.

    For the residual stream, which has no heads, over tokens; a number of the layer itself is drawn alone.

    Args:
        source: Statistics with ``statistic``.
        statistic: One with a number per layer, and perhaps per head and token.
        segment: Name of the segment, for ``segment_mass``.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The statistic, segment or row was not measured, or the statistic has other axes.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = pick_segment(as_dataset(source), [statistic], segment)
    row = row_alone(dataset, batch)
    check_suited(row, statistic, one_per_layer, "layer")
    evolution = layer_evolution(row[[statistic]])[statistic]
    axis = str(evolution.dims[0])
    evolution = evolution.sortby(axis)
    layers = evolution[axis].values
    mean, std, low, high = (evolution.sel(summary=name).values for name in ("mean", "std", "min", "max"))
    figure, axes = new_figure(ax=ax)
    spread = _spread(dataset[statistic])
    if spread is None:
        axes.plot(
            layers, mean, color=BLUE, linewidth=2, marker="o", markersize=4, label=written(statistic.replace("_", " "))
        )
    else:
        label = f"smallest to largest of {spread}"
        axes.fill_between(layers, low, high, color=BLUE, alpha=0.15, linewidth=0, label=label)
        # Not beyond the smallest and largest: of skewed numbers the deviation would reach where none is.
        near, far = np.maximum(mean - std, low), np.minimum(mean + std, high)
        axes.fill_between(layers, near, far, color=BLUE, alpha=0.3, linewidth=0, label="± standard deviation")
        axes.plot(layers, mean, color=BLUE, linewidth=2, marker="o", markersize=4, label=f"mean over {spread}")
    if spiky(np.concatenate([low, mean, high])):
        axes.set_yscale("log")
    say_no_data(axes, mean)
    title = f"{heading(statistic)}{of_segment(segment)} through the layers{of_part(dataset)}"
    entitle(axes, title, about(dataset, batch))
    output = ", the last is the output" if axis == "hidden_layer" else ""
    label_axes(axes, f"layer{output}{of_layers(dataset)}", named(evolution, segment))
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.4)
    add_legend(figure, ax, ncols=3)
    return figure


def _spread(values: xarray.DataArray) -> str | None:
    """What the numbers of one layer belong to; None if there is one."""
    if {"head", "kv_head"} & set(values.dims):
        axis = "head" if "head" in values.dims else "kv_head"
        return named_range(axis.replace("kv_head", "KV head"), values[axis].values.tolist())
    return "tokens" if {"query", "key"} & set(values.dims) else None


def plot_distance_histogram(
    source: Source, *, layer: int = 0, head: int | None = None, batch: int = 0, ax: Axes | None = None
) -> Figure:
    """How attention is spread over distances, in bins that double: the sum over bins is 1.

    Bars show one head or the mean over heads; with the mean, thin lines show every head. Dashes show what attention
    would be if every query looked equally at all keys that it may see in this layer, window and padding included;
    there are none where `uniform_attention` is unknown, behind a mask of the user's own.

    Args:
        source: Statistics with ``distance_histogram``.
        layer: Index of the layer.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The statistic, layer, head or row was not measured.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = as_dataset(source)
    require(dataset, "distance_histogram")
    row = pick(dataset, layer=layer, batch=batch)
    histogram = row.distance_histogram
    shown = pick_head(histogram, head)
    starts = row["distance_bin"].values
    places = range(len(starts))
    figure, axes = new_figure(ax=ax)
    axes.bar(places, shown.values, color=BLUE, alpha=0.8, label=of_head(dataset, head))
    if head is None:
        for number, each in enumerate(histogram.transpose("head", ...).values):
            axes.plot(places, each, color=ORANGE, alpha=0.5, linewidth=1, label=None if number else "each head")
    uniform = uniform_attention(row_alone(dataset, batch).sel(layer=[layer])).distance_histogram.values.reshape(-1)
    if np.isfinite(uniform).all():
        edges = np.arange(len(starts) + 1) - 0.5
        axes.hlines(
            uniform, edges[:-1], edges[1:], color="black", linestyle="--", linewidth=1.5, label="uniform attention"
        )
    add_legend(figure, ax, ncols=3)
    say_no_data(axes, shown.values)
    # The last bin ends with the text.
    lasts = np.minimum(2 * starts, row["key"].values[-1])
    axes.set_xticks(places, [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(starts, lasts, strict=True)])
    if len(starts) > (10 if ax is None else 5):
        axes.tick_params(axis="x", rotation=45)
    axes.set_ylim(0, None)
    label_axes(axes, "distance from query to key [tokens]", f"attention {unit_of(shown)}")
    entitle(axes, f"Attention by distance, layer {layer}, {of_head(dataset, head)}", about(dataset, batch))
    axes.grid(axis="y", alpha=0.4)
    return figure
