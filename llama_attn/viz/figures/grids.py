"""One cell per head: layer × head pictures of a statistic, and of what each head does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis import as_dataset, classify_heads, head_means
from llama_attn.viz.style import (
    AMBER,
    BLUE,
    GREEN,
    NO_DATA,
    ORANGE,
    PINK,
    SKY,
    WINE,
    YELLOW,
    explain_no_data,
    heading,
    heat_map,
    named,
    new_figure,
    of_layers,
    pick,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

ROLE_COLOURS = {
    "first_token_sink": BLUE, "sink": WINE, "previous_token": ORANGE, "duplicate_token": PINK, "induction": GREEN,
    "local": AMBER, "uniform": SKY, "mixed": YELLOW,
}  # fmt: skip


def plot_head_grid(source: Source, *, statistic: str = "entropy", batch: int = 0) -> Figure:
    """Any statistic of heads, as a heat map of layer × head: the mean over the tokens of one row.

    Args:
        source: Statistics with ``statistic``.
        statistic: One with a number per head and token; norms of keys and values are drawn per KV head.
        batch: Row of the batch.

    Raises:
        ValueError: The statistic or row was not measured, or the statistic has other axes.
    """
    dataset = as_dataset(source)
    pick(dataset, batch=batch)
    means = head_means(dataset.sel(batch=[batch]), statistic).sortby("layer")
    figure, axes = new_figure(grid_size(*means.shape))
    image = heat_map(axes, means.values)
    label_grid(axes, means["layer"].values, means[means.dims[1]].values, str(means.dims[1]), of_layers(dataset))
    figure.colorbar(image, ax=axes, label=named(means))
    axes.set_title(f"{heading(statistic)}, mean over tokens")
    explain_no_data(figure, means.values)
    return figure


def plot_head_roles(source: Source, *, query_slice: slice | None = None, batch: int = 0) -> Figure:
    """What each head does, as a map of layer × head in the colours of the roles of `classify_heads`.

    The number in a cell is the score, in hundredths.

    Args:
        source: What `classify_heads` needs.
        query_slice: Positions of the queries to count.
        batch: Row of the batch.

    Raises:
        ValueError: A statistic or the row was not measured, or the slice holds no query.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    dataset = as_dataset(source)
    pick(dataset, batch=batch)
    frame = classify_heads(dataset.sel(batch=[batch]), query_slice).set_index(["layer", "head"])
    layers, heads = np.sort(dataset["layer"].values), dataset["head"].values
    names = list(ROLE_COLOURS)
    cells = np.full((len(layers), len(heads)), np.nan)
    figure, axes = new_figure(grid_size(*cells.shape))
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            line = frame.loc[(layer, head)]
            if isinstance(line.role, str):
                cells[row, column] = names.index(line.role)
            # Beyond this many heads the numbers would overlap.
            ink = "white" if line.role in ("first_token_sink", "sink") else "black"
            if np.isfinite(line.score) and len(heads) <= 16:
                axes.text(column, row, f"{100 * line.score:.0f}", ha="center", va="center", fontsize=7, color=ink)
    bounds = np.arange(len(names) + 1) - 0.5
    heat_map(axes, cells, cmap=ListedColormap(list(ROLE_COLOURS.values())), norm=BoundaryNorm(bounds, len(names)))
    label_grid(axes, layers, heads, "head", of_layers(dataset))
    counts = frame.role.value_counts()
    patches = [
        Patch(color=colour, label=f"{name.replace('_', ' ')}: {counts.get(name, 0)}")
        for name, colour in ROLE_COLOURS.items()
    ]
    if np.isnan(cells).any():
        patches.append(Patch(color=NO_DATA, label="no data"))
    figure.legend(handles=patches, loc="outside right center", title="role: heads")
    axes.set_title("Role of each head (score × 100)")
    return figure


def grid_size(rows: int, columns: int) -> tuple[float, float]:
    """Size of a figure of layer × head whose cells are large enough to tell apart [inches]."""
    return float(np.clip(2.5 + 0.42 * columns, 5.5, 20)), float(np.clip(1.5 + 0.24 * rows, 3.5, 24))


def label_grid(axes: Axes, layers: np.ndarray, heads: np.ndarray, name: str, note: str = "") -> None:
    """Write the indices of layers and heads, of every one or of every few, and a note below."""
    for target, labels in ((axes.yaxis, layers), (axes.xaxis, heads)):
        axis: Any = target
        step = -(-len(labels) // 40)
        axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
    axes.set(xlabel=name.replace("kv_head", "KV head") + note, ylabel="layer")
