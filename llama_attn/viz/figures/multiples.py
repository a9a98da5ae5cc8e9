"""Many maps at once: all heads of one layer, and all heads of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from llama_attn.analysis import as_dataset, require
from llama_attn.analysis.dataset import real_tokens
from llama_attn.viz.figures.attention import KINDS, WORDS, bin_width, check_kind, draw_map, drawn_cells, pooled
from llama_attn.viz.figures.canvas import TITLE_SIZE, colour_bar, entitle, new_figure
from llama_attn.viz.figures.grids import label_grid
from llama_attn.viz.figures.scales import Scale, check_scale, colour_scale, square_root
from llama_attn.viz.style import about, empty_figure, heat_map, of_layers, of_part, pick, pick_row, unit_of

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

# Cells along one side of a map in the model view, and size of such a map [inches].
MINIATURE_CELLS, MINIATURE = 16, 0.5


def plot_layer_heads(
    source: Source,
    *,
    layer: int = 0,
    batch: int = 0,
    kind: Literal["weights", "logits"] = "weights",
    scale: Scale | None = None,
) -> Figure:
    """The attention maps of all heads of one layer, in the same colours.

    Args:
        source: Statistics with ``weights_map``, or ``logits_map`` for ``kind="logits"``.
        layer: Index of the layer.
        batch: Row of the batch.
        kind: Attention weights, or scaled scores before the softmax.
        scale: What colours follow, as in `plot_attention_map`.

    Raises:
        ValueError: The map, layer or row was not measured, or scores shall have another scale than the linear.
    """
    check_kind(kind)
    check_scale(scale, kind)
    dataset = as_dataset(source)
    require(dataset, KINDS[kind])
    row = pick(dataset, layer=layer, batch=batch)
    heads = row["head"].values
    maps = [drawn_cells(row, kind, head) for head in heads]
    colours = colour_scale(np.stack(maps), kind, scale)
    columns = int(np.ceil(np.sqrt(len(heads))))
    lines = -(-len(heads) // columns)
    figure = empty_figure((min(1.5 + 2.3 * columns, 24), min(0.8 + 2.1 * lines, 24)))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, head, cells in zip(grid.flat, heads, maps, strict=False):
        image = draw_map(axes, row.drop_vars(["key_token"], errors="ignore"), cells, norm=colours.norm)
        axes.set_title(f"head {head}", fontsize=9)
        axes.set(xlabel="", ylabel="")
    for axes in grid.flat[len(heads) :]:
        axes.set_axis_off()
    label = f"{WORDS[kind]} {unit_of(row[KINDS[kind]])}{colours.note}"
    colour_bar(image, grid, label, aspect=40, ticks=colours.ticks, extend=colours.extend)
    entitle(figure, f"Attention {kind} of layer {layer}{pooled(row)}", about(dataset, batch))
    figure.supxlabel("key [token]", fontsize=TITLE_SIZE)
    figure.supylabel("query [token]", fontsize=TITLE_SIZE)
    return figure


def plot_model_view(source: Source, *, batch: int = 0, ax: Axes | None = None) -> Figure:
    """The attention maps of all heads of all layers as miniatures: layers from top to bottom, heads side by side.

    In each miniature, queries go down and keys to the right, as in `plot_attention_map`. Maps are pooled exactly to
    at most 16 × 16 cells, each the attention weight of its queries on its keys; colours follow the square root.

    Args:
        source: Statistics with ``weights_map``.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The map or row was not measured.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = as_dataset(source)
    require(dataset, "weights_map")
    row = pick_row(dataset, batch).sortby("layer")
    maps = pooled_maps(row, MINIATURE_CELLS)
    layers, heads, cells = maps.shape[:3]
    # One picture of all maps: a thousand pairs of axes would take minutes.
    mosaic = maps.transpose(0, 2, 1, 3).reshape(layers * cells, heads * cells)
    size = np.clip(MINIATURE * np.array([heads, layers]) + [1.8, 1.0], [5, 3.5], 24)
    figure, axes = new_figure((float(size[0]), float(size[1])), ax)
    extent = (-0.5, heads - 0.5, layers - 0.5, -0.5)
    colours = square_root(1.0)
    image = heat_map(axes, mosaic, extent=extent, norm=colours.norm)
    axes.hlines(np.arange(layers - 1) + 0.5, *extent[:2], color="white", linewidth=3)
    axes.vlines(np.arange(heads - 1) + 0.5, *extent[2:], color="white", linewidth=3)
    label_grid(axes, row["layer"].values, row["head"].values, "head", of_layers(row))
    label = f"attention weight {unit_of(row.weights_map)}{colours.note}"
    # As long as its ticks need.
    colour_bar(image, axes, label, shrink=float(np.clip(4.5 / size[1], 0.3, 1)), ticks=colours.ticks)
    width = bin_width(row) * _factor(row)
    what = f"{cells} × {cells} cells of {width} token{'s' if width > 1 else ''}"
    entitle(axes, f"Attention of every head ({what}){of_part(dataset)}", about(dataset, batch))
    return figure


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
    queries = np.bincount((real - row["query_bin"].values[0]) // bin_width(row), minlength=bins).astype(np.float64)
    padding = -bins % factor
    # Of bins without a query nothing counts; what is not a number elsewhere stays none.
    sums = np.pad(
        np.where(queries[:, None] > 0, maps, 0) * queries[:, None], [(0, 0), (0, 0), (0, padding), (0, padding)]
    )
    merged = sums.reshape(*maps.shape[:2], (bins + padding) // factor, factor, -1, factor).sum((-3, -1))
    count = np.pad(queries, (0, padding)).reshape(-1, factor).sum(-1)
    with np.errstate(invalid="ignore"):
        merged /= count[:, None]
    merged[np.broadcast_to(~np.nan_to_num(merged).any(1, keepdims=True), merged.shape)] = np.nan
    return merged
