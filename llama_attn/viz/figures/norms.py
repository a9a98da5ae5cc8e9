"""Norms along the text: the residual stream, and keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, require
from llama_attn.viz.style import BLUE, ORANGE, label_tokens, new_figure, pick, say_no_data, spiky, tokens_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source


def plot_hidden_norms(source: Source, *, layer: int = 0, batch: int = 0) -> Figure:
    """L2 norm of the residual stream that enters a layer, token by token.

    Args:
        source: Statistics with ``hidden_norm``.
        layer: Index of the layer; the number of layers stands for the last layer's output.
        batch: Row of the batch.

    Raises:
        ValueError: The statistic, layer or row was not measured.
    """
    dataset = as_dataset(source)
    require(dataset, "hidden_norm")
    row = pick(dataset, layer=layer, batch=batch, axis="hidden_layer")
    figure, axes = new_figure()
    norms = row.hidden_norm.values
    axes.plot(row["query"].values, norms, color=BLUE, linewidth=2)
    output = layer == row.attrs["num_layers"]
    axes.set_title(f"Residual stream {'after the last layer' if output else f'entering layer {layer}'}")
    axes.set_ylabel(f"L2 norm [{row.hidden_norm.attrs['units']}]")
    _along_text(axes, norms, row["query"].values.tolist(), tokens_of(row, "query"))
    return figure


def plot_kv_norms(source: Source, *, layer: int = 0, batch: int = 0) -> Figure:
    """L2 norms of keys (after RoPE) and values, token by token.

    Solid: the mean over KV heads of the norms. Dashed: the norm of the mean over KV heads, which is smaller where
    heads point in different directions.

    Args:
        source: Statistics with ``key_norm``, ``value_norm``, ``key_mean_norm`` and ``value_mean_norm``.
        layer: Index of the layer.
        batch: Row of the batch.

    Raises:
        ValueError: A statistic, the layer or the row was not measured.
    """
    dataset = as_dataset(source)
    require(dataset, "key_norm", "value_norm", "key_mean_norm", "value_mean_norm")
    row = pick(dataset, layer=layer, batch=batch)
    figure, axes = new_figure()
    for name, colour in (("key", BLUE), ("value", ORANGE)):
        of_heads = row[f"{name}_norm"].mean("kv_head", skipna=False)
        axes.plot(row["key"].values, of_heads, color=colour, linewidth=2, label=f"{name}: mean of norms")
        of_mean = row[f"{name}_mean_norm"]
        axes.plot(row["key"].values, of_mean, color=colour, linewidth=2, linestyle="--", label=f"{name}: norm of mean")
    axes.set_title(f"Keys and values, layer {layer}")
    axes.set_ylabel(f"L2 norm [{row.key_norm.attrs['units']}]")
    figure.legend(loc="outside lower center", ncols=2)
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    _along_text(axes, drawn, row["key"].values.tolist(), tokens_of(row, "key"))
    return figure


def _along_text(axes: Axes, drawn: np.ndarray, positions: list[int], tokens: list[str] | None) -> None:
    axes.grid(alpha=0.4)
    axes.set_xlabel("position [token]")
    say_no_data(axes, drawn)
    if spiky(drawn):
        axes.set_yscale("log")
    label_tokens(axes, "x", positions, tokens)
