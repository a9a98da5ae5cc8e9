"""The attention map of one head, or of the mean over heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_attn.analysis import as_dataset, require
from llama_attn.analysis.dataset import direction_of
from llama_attn.viz.figures.canvas import colour_bar, entitle, label_axes, new_figure
from llama_attn.viz.figures.scales import Scale, check_scale, colour_scale
from llama_attn.viz.style import about, heat_map, label_tokens, of_head, pick, pick_head, tokens_of, unit_of

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from llama_attn.analysis.dataset import Source

KINDS = {"weights": "weights_map", "logits": "logits_map"}
WORDS = {"weights": "attention weight", "logits": "scaled score"}


def plot_attention_map(
    source: Source,
    *,
    layer: int = 0,
    head: int | None = None,
    batch: int = 0,
    kind: Literal["weights", "logits"] = "weights",
    scale: Scale | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Which queries (rows) attend to which keys (columns).

    Pairs that may not see each other, and padding, are drawn in grey as "no data": cells of scores without a pair,
    cells of weights to which no measured head of the layer gives any weight at all.

    Args:
        source: Statistics with ``weights_map``, or ``logits_map`` for ``kind="logits"``.
        layer: Index of the layer.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.
        kind: Attention weights, or scaled scores before the softmax.
        scale: What colours follow: ``"linear"``, ``"sqrt"``, or ``"log"``, over five decades at most. None is the
            square root for weights, so that weak attention is seen beside a sink, and linear for scores.
        ax: Where to draw; None for a figure of its own.

    Returns:
        The figure; with ``ax`` the one that it belongs to.

    Raises:
        ValueError: The map, layer, head or row was not measured, or scores shall have another scale than the linear.
        TypeError: ``ax`` is something else than axes.
    """
    check_kind(kind)
    check_scale(scale, kind)
    dataset = as_dataset(source)
    require(dataset, KINDS[kind])
    row = pick(dataset, layer=layer, batch=batch)
    cells = drawn_cells(row, kind, head)
    colours = colour_scale(cells, kind, scale)
    figure, axes = new_figure(ax=ax)
    image = draw_map(axes, row, cells, norm=colours.norm)
    label = f"{WORDS[kind]} {unit_of(row[KINDS[kind]])}{colours.note}"
    colour_bar(image, axes, label, ticks=colours.ticks, extend=colours.extend)
    entitle(axes, f"Attention {kind}, layer {layer}, {of_head(dataset, head)}{pooled(row)}", about(dataset, batch))
    return figure


def draw_map(axes: Axes, row: xarray.Dataset, cells: np.ndarray, **settings: Any) -> AxesImage:
    """Draw the cells (query_bin, key_bin) of a map at their positions in the row, with tokens where they fit."""
    width = bin_width(row)
    # Cells are drawn around their positions, so that ticks are token positions also for pooled maps.
    left, top = (int(row[axis].values[0]) - 0.5 for axis in ("key_bin", "query_bin"))
    right, bottom = left + cells.shape[1] * width, top + cells.shape[0] * width
    image = heat_map(axes, cells, extent=(left, right, bottom, top), **settings)
    # Every token is a query, measured or not; but in cross-attention the keys are of another text.
    # The first bin may begin in front of the text, and the last one end behind it.
    down: Literal["query", "key"] = "query" if direction_of(row) == "cross" else "key"
    across, along = (int(row[axis].values[-1]) + 0.5 for axis in ("key", down))
    axes.set(xlim=(max(left, -0.5), min(right, across)), ylim=(min(bottom, along), max(top, -0.5)))
    label_axes(axes, "key [token]", "query [token]")
    if width == 1:
        label_tokens(axes, "x", row["key"].values.tolist(), tokens_of(row, "key"))
        label_tokens(axes, "y", row[down].values.tolist(), tokens_of(row, down))
    return image


def bin_width(row: xarray.Dataset) -> int:
    """Tokens per bin of the maps of a row that was picked."""
    return int(row.key_bin.attrs["width"])


def pooled(row: xarray.Dataset) -> str:
    """How wide the bins of the maps are, for a title; nothing if each is one token."""
    width = bin_width(row)
    return f", bins of {width} tokens" if width > 1 else ""


def check_kind(kind: str) -> None:
    """Check what a map shall show.

    Raises:
        ValueError: Neither weights nor logits.
    """
    if kind not in list(KINDS):
        raise ValueError(f"kind: expected one of {list(KINDS)}, got {kind!r}")


def drawn_cells(row: xarray.Dataset, kind: Literal["weights", "logits"], head: int | None) -> np.ndarray:
    """The cells of the map (query_bin, key_bin), NaN where there is no data.

    Args:
        row: Statistics of one layer and one row of the batch.
        kind: Attention weights or scores.
        head: Index of the head; None for the mean over heads.
    """
    maps = row[KINDS[kind]]
    cells = pick_head(maps, head).values.copy()
    if kind == "weights":
        cells[~np.nan_to_num(maps.values).any(0)] = np.nan
    return cells
