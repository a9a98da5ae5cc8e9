"""What differs between two runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from llama_attn.analysis import as_dataset, compare, require
from llama_attn.viz.figures.attention import KINDS, WORDS, check_kind, draw_map, drawn_cells, pooled
from llama_attn.viz.figures.canvas import colour_bar, entitle, explain_no_data, new_figure
from llama_attn.viz.figures.grids import grid_size, label_grid
from llama_attn.viz.style import (
    DIVERGING,
    about,
    heading,
    heat_map,
    of_head,
    of_layers,
    of_part,
    pick,
    pick_head,
    unit_of,
    written,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source


def plot_comparison(
    a: Source,
    b: Source,
    *,
    layer: int = 0,
    head: int | None = None,
    batch: int = 0,
    kind: Literal["weights", "logits"] = "weights",
    ax: Axes | None = None,
) -> Figure:
    """Where two attention maps of texts of the same length differ: b − a, red where b is larger, blue where a is.

    Args:
        a: Statistics of one run, with ``weights_map``, or ``logits_map`` for ``kind="logits"``.
        b: Statistics of the other.
        layer: Index of the layer.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.
        kind: Attention weights, or scaled scores before the softmax.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The map, layer, head or row was not measured in both, or the texts differ in length; then
            `plot_head_comparison` still answers.
        TypeError: ``ax`` is something else than axes.
    """
    check_kind(kind)
    runs = as_dataset(a), as_dataset(b)
    rows = []
    for dataset in runs:
        require(dataset, KINDS[kind])
        rows.append(pick(dataset, layer=layer, batch=batch))
    first, second = rows
    for axis in ("key", "key_bin"):
        if first.sizes[axis] != second.sizes[axis]:
            raise ValueError(
                f"b: expected a map of {first.sizes[axis]} {axis}s as in a, got {second.sizes[axis]}; "
                "plot_head_comparison compares texts of different length"
            )
    cells = [drawn_cells(row, kind, head) for row in rows]
    difference = cells[1] - cells[0]
    if kind == "weights":
        # No weight in one run is 0 where the other has some; what was not a number in one is no data.
        either = np.isfinite(cells[0]) | np.isfinite(cells[1])
        measured = [pick_head(row[KINDS[kind]], head).values for row in rows]
        difference = np.where(either, measured[1] - measured[0], np.nan)
    figure, axes = new_figure(ax=ax)
    limit = _limit(difference)
    image = draw_map(axes, first, difference, cmap=DIVERGING, vmin=-limit, vmax=limit)
    colour_bar(image, axes, f"difference in {WORDS[kind]}, b − a {unit_of(first[KINDS[kind]])}")
    title = f"Attention {kind}, b − a, layer {layer}, {of_head(runs[0], head)}{pooled(first)}"
    entitle(axes, title, _about_both(*runs, batch))
    return figure


def plot_head_comparison(a: Source, b: Source, *, statistic: str = "entropy", ax: Axes | None = None) -> Figure:
    """In which heads a statistic differs between two runs, as a heat map of layer × head: mean of b − mean of a.

    Means are over the tokens that both texts have, as `compare` aligns them; all rows count.

    Args:
        a: Statistics of one run.
        b: Statistics of the other.
        statistic: One with a number per head; norms of keys and values are drawn per KV head.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The statistic was not measured in both, or has no heads.
        TypeError: ``ax`` is something else than axes.
    """
    first, second = as_dataset(a), as_dataset(b)
    for dataset in (first, second):
        require(dataset, statistic)
    needed = [statistic, "visible_keys", "visible_queries"]
    frame = compare(first[needed], second[needed])
    if frame["head"].isna().any():
        raise ValueError(f"statistic: expected one with heads, got {statistic!r}")
    grid = frame.pivot_table(index="layer", columns="head", values="difference", dropna=False, sort=True)
    cells = grid.to_numpy(dtype=float)
    figure, axes = new_figure(grid_size(*cells.shape), ax)
    limit = _limit(cells)
    image = heat_map(axes, cells, cmap=DIVERGING, vmin=-limit, vmax=limit)
    label_grid(
        axes,
        grid.index.to_numpy(),
        grid.columns.to_numpy(),
        "KV head" if "kv_head" in first[statistic].dims else "head",
        of_layers(first),
    )
    name = written(statistic.replace("_", " "))
    colour_bar(image, axes, f"difference in {name}, b − a {unit_of(first[statistic])}")
    both = first.sel(layer=grid.index.to_numpy())
    aligned, in_a, in_b = (frame.attrs[name] for name in ("aligned", "tokens_a", "tokens_b"))
    tokens = "tokens" if aligned == in_a == in_b else f"the {aligned:,} tokens in common"
    entitle(axes, f"{heading(statistic)}, b − a, mean over {tokens}{of_part(both)}", _about_both(first, second))
    explain_no_data(figure, cells, ax)
    return figure


def _about_both(a: xarray.Dataset, b: xarray.Dataset, batch: int | None = None) -> str:
    """Model and text of both, once if they are the same."""
    first, second = about(a, batch), about(b, batch)
    return first if first == second else f"a: {first}\nb: {second}"


def _limit(difference: np.ndarray) -> float:
    """Where both ends of a scale around zero lie."""
    return float(np.abs(difference[np.isfinite(difference)]).max(initial=0.0)) or 1.0
