"""What differs between two runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from llama_attn.analysis import as_dataset, compare, require
from llama_attn.viz.figures.attention import KINDS, WORDS, check_kind, draw_map, drawn_cells, pooled
from llama_attn.viz.figures.grids import grid_size, label_grid
from llama_attn.viz.style import DIVERGING, explain_no_data, heading, heat_map, new_figure, of_head, of_layers, pick

if TYPE_CHECKING:
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
) -> Figure:
    """Where two attention maps of texts of the same length differ: b − a, red where b is larger, blue where a is.

    Args:
        a: Statistics of one run, with ``weights_map``, or ``logits_map`` for ``kind="logits"``.
        b: Statistics of the other.
        layer: Index of the layer.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.
        kind: Attention weights, or scaled scores before the softmax.

    Raises:
        ValueError: The map, layer, head or row was not measured in both, or the texts differ in length; then
            `plot_head_comparison` still answers.
    """
    check_kind(kind)
    rows = []
    for source in (a, b):
        dataset = as_dataset(source)
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
    if kind == "weights":
        # No weight in one run is 0 where the other has some, and no data only where both have none.
        either = np.isfinite(cells[0]) | np.isfinite(cells[1])
        cells = [np.where(either, np.nan_to_num(part), np.nan) for part in cells]
    difference = cells[1] - cells[0]
    figure, axes = new_figure()
    limit = _limit(difference)
    image = draw_map(axes, first, difference, cmap=DIVERGING, vmin=-limit, vmax=limit)
    unit = first[KINDS[kind]].attrs["units"]
    figure.colorbar(image, ax=axes, label=f"difference in {WORDS[kind]}, b − a [{unit}]")
    axes.set_title(f"Attention {kind}, b − a, layer {layer}, {of_head(head)}{pooled(first)}")
    return figure


def plot_head_comparison(a: Source, b: Source, *, statistic: str = "entropy") -> Figure:
    """In which heads a statistic differs between two runs, as a heat map of layer × head: mean of b − mean of a.

    Means are over the tokens that both texts have, as `compare` aligns them; all rows count.

    Args:
        a: Statistics of one run.
        b: Statistics of the other.
        statistic: One with a number per head; norms of keys and values are drawn per KV head.

    Raises:
        ValueError: The statistic was not measured in both, or has no heads.
    """
    first, second = as_dataset(a), as_dataset(b)
    for dataset in (first, second):
        require(dataset, statistic)
    unit = first[statistic].attrs.get("units", "?")
    needed = [statistic, "visible_keys", "visible_queries"]
    frame = compare(first[needed], second[needed])
    if frame["head"].isna().any():
        raise ValueError(f"statistic: expected one with heads, got {statistic!r}")
    grid = frame.pivot_table(index="layer", columns="head", values="difference", dropna=False, sort=True)
    cells = grid.to_numpy(dtype=float)
    figure, axes = new_figure(grid_size(*cells.shape))
    limit = _limit(cells)
    image = heat_map(axes, cells, cmap=DIVERGING, vmin=-limit, vmax=limit)
    label_grid(
        axes,
        grid.index.to_numpy(),
        grid.columns.to_numpy(),
        "KV head" if "kv_head" in first[statistic].dims else "head",
        of_layers(first),
    )
    figure.colorbar(image, ax=axes, label=f"difference in {statistic.replace('_', ' ')}, b − a [{unit}]")
    axes.set_title(f"{heading(statistic)}, b − a, mean over tokens")
    explain_no_data(figure, cells)
    return figure


def _limit(difference: np.ndarray) -> float:
    """Where both ends of a scale around zero lie."""
    return float(np.abs(difference[np.isfinite(difference)]).max(initial=0.0)) or 1.0
