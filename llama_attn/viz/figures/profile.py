"""Lines and bars: a statistic through the layers, and attention by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, layer_evolution, require
from llama_attn.viz.style import (
    BLUE,
    ORANGE,
    heading,
    named,
    new_figure,
    of_head,
    of_layers,
    pick,
    pick_head,
    say_no_data,
    spiky,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source


def plot_layer_profile(source: Source, *, statistic: str = "entropy", batch: int = 0) -> Figure:
    """A statistic through the layers: the mean over heads, one standard deviation, and the smallest and largest head.

    For the residual stream, which has no heads, over tokens; a number of the layer itself is drawn alone.

    Args:
        source: Statistics with ``statistic``.
        statistic: One with a number per layer, and perhaps per head and token.
        batch: Row of the batch.

    Raises:
        ValueError: The statistic or row was not measured, or the statistic has other axes.
    """
    dataset = as_dataset(source)
    require(dataset, statistic)
    pick(dataset, batch=batch)
    summaries = layer_evolution(dataset.sel(batch=[batch]))
    evolution = summaries.get(statistic)
    if evolution is None or evolution.ndim != 2:
        suited = [str(name) for name, values in summaries.items() if values.ndim == 2]
        raise ValueError(f"statistic: expected one number per layer and token, one of {suited}, got {statistic!r}")
    axis = str(evolution.dims[0])
    evolution = evolution.sortby(axis)
    layers = evolution[axis].values
    mean, std, low, high = (evolution.sel(summary=name).values for name in ("mean", "std", "min", "max"))
    figure, axes = new_figure()
    spread = _spread(dataset[statistic])
    if spread is None:
        axes.plot(layers, mean, color=BLUE, linewidth=2, marker="o", markersize=4, label=statistic.replace("_", " "))
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
    axes.set_title(f"{heading(statistic)} through the layers")
    output = ", the last is the output" if axis == "hidden_layer" else ""
    axes.set(xlabel=f"layer{output}{of_layers(dataset)}", ylabel=named(evolution))
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.4)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _spread(values: xarray.DataArray) -> str | None:
    """What the numbers of one layer belong to; None if there is one."""
    if {"head", "kv_head"} & set(values.dims):
        return "heads"
    return "tokens" if {"query", "key"} & set(values.dims) else None


def plot_distance_histogram(source: Source, *, layer: int = 0, head: int | None = None, batch: int = 0) -> Figure:
    """How attention is spread over distances, in bins that double: the sum over bins is 1.

    Bars show one head or the mean over heads; with the mean, thin lines show every head.

    Args:
        source: Statistics with ``distance_histogram``.
        layer: Index of the layer.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.

    Raises:
        ValueError: The statistic, layer, head or row was not measured.
    """
    dataset = as_dataset(source)
    require(dataset, "distance_histogram")
    row = pick(dataset, layer=layer, batch=batch)
    histogram = row.distance_histogram
    shown = pick_head(histogram, head)
    starts = row["distance_bin"].values
    places = range(len(starts))
    figure, axes = new_figure()
    axes.bar(places, shown.values, color=BLUE, alpha=0.8, label=of_head(head))
    if head is None:
        for number, each in enumerate(histogram.transpose("head", ...).values):
            axes.plot(places, each, color=ORANGE, alpha=0.5, linewidth=1, label=None if number else "each head")
        figure.legend(loc="outside lower center", ncols=2)
    say_no_data(axes, shown.values)
    # The last bin ends with the text.
    lasts = np.minimum(2 * starts, row["key"].values[-1])
    axes.set_xticks(places, [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(starts, lasts, strict=True)])
    if len(starts) > 10:
        axes.tick_params(axis="x", rotation=45)
    axes.set(xlabel="distance from query to key [tokens]", ylabel=f"attention [{shown.attrs['units']}]", ylim=(0, None))
    axes.set_title(f"Attention by distance, layer {layer}, {of_head(head)}")
    axes.grid(axis="y", alpha=0.4)
    return figure
