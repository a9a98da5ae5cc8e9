"""Statistics along the text, one panel each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, require
from llama_attn.viz.style import (
    BLUE,
    ORANGE,
    empty_figure,
    label_tokens,
    of_head,
    pick,
    pick_head,
    say_no_data,
    spiky,
    tokens_of,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

PANELS = ("received", "sink_mass", "hidden_norm", "key_norm", "value_norm")
# As many tokens can be labelled on the widest figure.
MOST_TOKENS = 160


def plot_token_strip(
    source: Source,
    *,
    layer: int = 0,
    head: int | None = None,
    batch: int = 0,
    statistics: Sequence[str] | None = None,
) -> Figure:
    """Statistics along the text, under each other: which tokens receive attention, and how large their states are.

    Args:
        source: Statistics with some of those to show.
        layer: Index of the layer; of the residual stream, what enters it.
        head: Index of the query head; None for the mean over heads. Norms of keys and values are always the mean
            over KV heads.
        batch: Row of the batch.
        statistics: What to show; None for those of ``received``, ``sink_mass``, ``hidden_norm``, ``key_norm`` and
            ``value_norm`` that were measured.

    Raises:
        ValueError: A statistic, layer, head or row was not measured, or a statistic is not one of tokens.
    """
    dataset = as_dataset(source)
    if statistics is None:
        statistics = [name for name in PANELS if name in dataset] or PANELS[:1]
    require(dataset, *statistics)
    row = pick(dataset, layer=layer, batch=batch)
    if "hidden_layer" in row.dims:
        row = row.sel(hidden_layer=layer)
    values = [_along_text(row[name], head) for name in statistics]
    keys = row["key"].values.tolist()
    length = len(keys)
    figure = empty_figure((float(np.clip(0.11 * length, 8, 18)), 1.2 + 1.5 * len(values)))
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name, along in zip(panels, statistics, values, strict=True):
        positions = along[along.dims[0]].values
        colour = BLUE if along.attrs.get("units") == "probability" else ORANGE
        # Steps from 0 for shares; a line for magnitudes, which differ by factors.
        if colour == BLUE:
            width = positions[1] - positions[0] if len(positions) > 1 else 1
            axes.stairs(along.values, np.append(positions, positions[-1] + width) - width / 2, fill=True, color=colour)
        else:
            axes.plot(positions, along.values, color=colour, linewidth=1, marker="o", markersize=2.5)
            if spiky(along.values):
                axes.set_yscale("log")
        axes.set_ylabel(f"{name.replace('_', ' ')}\n[{along.attrs.get('units', '?')}]", fontsize=9)
        axes.grid(alpha=0.4)
        say_no_data(axes, along.values)
    panels[-1].set_xlim(keys[0] - 0.7, keys[-1] + 0.7)
    panels[-1].set_xlabel("position [token]")
    label_tokens(panels[-1], "x", keys, tokens_of(row, "key"), most=MOST_TOKENS)
    figure.suptitle(f"Along the text, layer {layer}, {of_head(head)}")
    return figure


def _along_text(values: xarray.DataArray, head: int | None) -> xarray.DataArray:
    """One number per token."""
    if "head" in values.dims:
        values = pick_head(values, head)
    if "kv_head" in values.dims:
        values = values.mean("kv_head", skipna=False, keep_attrs=True)
    if values.dims not in (("query",), ("key",)):
        raise ValueError(f"statistics: expected statistics of tokens, got {values.name!r} with axes {values.dims}")
    return values
