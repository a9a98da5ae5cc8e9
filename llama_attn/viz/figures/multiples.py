"""Many maps at once: all heads of one layer, and all heads of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from llama_attn.analysis import as_dataset, require
from llama_attn.analysis.dataset import real_tokens
from llama_attn.viz.figures.attention import KINDS, WORDS, bin_width, check_kind, draw_map, drawn_cells, pooled
from llama_attn.viz.figures.grids import label_grid
from llama_attn.viz.style import empty_figure, heat_map, new_figure, of_layers, pick

if TYPE_CHECKING:
    import xarray
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

# Cells along one side of a map in the model view, and size of such a map [inches].
MINIATURE_CELLS, MINIATURE = 16, 0.5


def plot_layer_heads(
    source: Source, *, layer: int = 0, batch: int = 0, kind: Literal["weights", "logits"] = "weights"
) -> Figure:
    """The attention maps of all heads of one layer, in the same colours.

    Colours of weights follow the square root, so that weak attention is seen beside a sink.

    Args:
        source: Statistics with ``weights_map``, or ``logits_map`` for ``kind="logits"``.
        layer: Index of the layer.
        batch: Row of the batch.
        kind: Attention weights, or scaled scores before the softmax.

    Raises:
        ValueError: The map, layer or row was not measured.
    """
    from matplotlib.colors import Normalize

    check_kind(kind)
    dataset = as_dataset(source)
    require(dataset, KINDS[kind])
    row = pick(dataset, layer=layer, batch=batch)
    heads = row["head"].values
    maps = [drawn_cells(row, kind, head) for head in heads]
    finite = np.concatenate([cells[np.isfinite(cells)] for cells in maps])
    high = finite.max(initial=0.0) or 1.0
    weights = kind == "weights"
    norm = square_root_norm(high) if weights else Normalize(finite.min(initial=high), high)
    columns = int(np.ceil(np.sqrt(len(heads))))
    lines = -(-len(heads) // columns)
    figure = empty_figure((min(1.5 + 2.3 * columns, 24), min(0.8 + 2.1 * lines, 24)))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, head, cells in zip(grid.flat, heads, maps, strict=False):
        image = draw_map(axes, row.drop_vars(["key_token"], errors="ignore"), cells, norm=norm)
        axes.set_title(f"head {head}", fontsize=9)
        axes.set(xlabel="", ylabel="")
    for axes in grid.flat[len(heads) :]:
        axes.set_axis_off()
    unit = row[KINDS[kind]].attrs["units"]
    ticks = square_root_ticks(high) if weights else None
    figure.colorbar(image, ax=grid, label=f"{WORDS[kind]} [{unit}]", aspect=40, ticks=ticks)
    figure.suptitle(f"Attention {kind} of layer {layer}{pooled(row)}")
    figure.supxlabel("key [token]", fontsize=10)
    figure.supylabel("query [token]", fontsize=10)
    return figure


def plot_model_view(source: Source, *, batch: int = 0) -> Figure:
    """The attention maps of all heads of all layers as miniatures: layers from top to bottom, heads side by side.

    In each miniature, queries go down and keys to the right, as in `plot_attention_map`. Maps are pooled exactly to
    at most 16 × 16 cells, each the attention weight of its queries on its keys; colours follow the square root.

    Args:
        source: Statistics with ``weights_map``.
        batch: Row of the batch.

    Raises:
        ValueError: The map or row was not measured.
    """
    dataset = as_dataset(source)
    require(dataset, "weights_map")
    row = pick(dataset, batch=batch).sortby("layer")
    maps = pooled_maps(row, MINIATURE_CELLS)
    layers, heads, cells = maps.shape[:3]
    # One picture of all maps: a thousand pairs of axes would take minutes.
    mosaic = maps.transpose(0, 2, 1, 3).reshape(layers * cells, heads * cells)
    size = np.clip(MINIATURE * np.array([heads, layers]) + [1.8, 1.0], [5, 3], 24)
    figure, axes = new_figure((float(size[0]), float(size[1])))
    extent = (-0.5, heads - 0.5, layers - 0.5, -0.5)
    image = heat_map(axes, mosaic, extent=extent, norm=square_root_norm(1.0))
    axes.hlines(np.arange(layers - 1) + 0.5, *extent[:2], color="white", linewidth=3)
    axes.vlines(np.arange(heads - 1) + 0.5, *extent[2:], color="white", linewidth=3)
    label_grid(axes, row["layer"].values, row["head"].values, "head", of_layers(row))
    unit = row.weights_map.attrs["units"]
    figure.colorbar(image, ax=axes, label=f"attention weight [{unit}]", shrink=0.5, ticks=square_root_ticks(1.0))
    width = bin_width(row) * _factor(row)
    axes.set_title(f"Attention of every head ({cells} × {cells} cells of {width} token{'s' if width > 1 else ''})")
    return figure


def square_root_norm(high: float) -> PowerNorm:
    """Colours that follow the square root, from 0 to ``high``."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, high)


def square_root_ticks(high: float) -> list[float]:
    """What to write beside such colours: 0 and 1, 2, 5 of the two decades below ``high``, so that all are apart."""
    series = [digit * 10.0**power for power in range(-8, 4) for digit in (1, 2, 5)]
    return [0.0, *(tick for tick in series if high / 100 <= tick <= high)]


def _factor(row: xarray.Dataset) -> int:
    return -(-row.sizes["key_bin"] // MINIATURE_CELLS)


def pooled_maps(row: xarray.Dataset, most: int) -> Float[np.ndarray, "layer head query_bin key_bin"]:
    """Merge neighbouring bins of the weights maps of one row, to at most ``most`` along a side.

    A merged cell is the mean over its real queries of the weight on its keys, as in the statistic; NaN where there
    is no query, or no head of the layer gives any weight.
    """
    maps = row.weights_map.values.astype(np.float64)
    bins = maps.shape[-1]
    factor = -(-bins // most)
    real = row["query"].values[real_tokens(row, "query").values]
    queries = np.bincount(real // bin_width(row), minlength=bins).astype(np.float64)
    padding = -bins % factor
    sums = np.pad(np.nan_to_num(maps) * queries[:, None], [(0, 0), (0, 0), (0, padding), (0, padding)])
    merged = sums.reshape(*maps.shape[:2], (bins + padding) // factor, factor, -1, factor).sum((-3, -1))
    count = np.pad(queries, (0, padding)).reshape(-1, factor).sum(-1)
    with np.errstate(invalid="ignore"):
        merged /= count[:, None]
    merged[np.broadcast_to(~np.nan_to_num(merged).any(1, keepdims=True), merged.shape)] = np.nan
    return merged
