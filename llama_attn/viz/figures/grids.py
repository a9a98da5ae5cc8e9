"""One cell per head: layer × head pictures of a statistic, and of what each head does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis import as_dataset, classify_heads, head_means
from llama_attn.analysis.row import row_alone
from llama_attn.viz.figures.canvas import (
    add_legend,
    colour_bar,
    entitle,
    explain_no_data,
    label_axes,
    new_figure,
    write_at,
)
from llama_attn.viz.style import (
    AMBER,
    BLUE,
    GREEN,
    NO_DATA,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    about,
    heading,
    heat_map,
    named,
    of_layers,
    of_part,
    of_segment,
    pick_segment,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

# No grey among them, which is the colour of no data.
NAVY, SAND, VIOLET = "#00294D", "#C9B18A", "#6F4BA0"
ROLE_COLOURS = {
    "first_token_sink": BLUE, "sink": NAVY, "previous_token": ORANGE, "duplicate_token": PINK, "induction": GREEN,
    "local": AMBER, "uniform": SKY, "streaming": VIOLET, "retrieval": YELLOW, "mixed": SAND,
}  # fmt: skip
# Width of the legend of roles [inches].
LEGEND = 1.6
DARK = ("first_token_sink", "sink", "streaming")


def plot_head_grid(
    source: Source,
    statistic: str = "entropy",
    *,
    segment: str | None = None,
    batch: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """Any statistic of heads, as a heat map of layer × head: the mean over the tokens of one row.

    Args:
        source: Statistics with ``statistic``.
        statistic: One with a number per head and token; norms of keys and values are drawn per KV head.
        segment: Name of the segment, for ``segment_mass``.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The statistic, segment or row was not measured, or the statistic has other axes.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = pick_segment(as_dataset(source), [statistic], segment)
    means = head_means(row_alone(dataset, batch), statistic).sortby("layer")
    figure, axes = new_figure(grid_size(*means.shape), ax)
    image = heat_map(axes, means.values)
    label_grid(axes, means["layer"].values, means[means.dims[1]].values, str(means.dims[1]), of_layers(dataset))
    colour_bar(image, axes, named(means, segment))
    title = f"{heading(statistic)}{of_segment(segment)}, mean over tokens{of_part(dataset)}"
    entitle(axes, title, about(dataset, batch))
    explain_no_data(figure, means.values, ax)
    return figure


def plot_head_roles(
    source: Source, *, query_slice: slice | None = None, batch: int = 0, ax: Axes | None = None
) -> Figure:
    """What each head does, as a map of layer × head in the colours of the roles of `classify_heads`.

    The number in a cell is the score, in hundredths.

    Args:
        source: What `classify_heads` needs.
        query_slice: Positions of the queries to count, from the row's first token.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: A statistic or the row was not measured, or the slice holds no query.
        TypeError: ``ax`` is something else than axes.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    dataset = as_dataset(source)
    frame = classify_heads(row_alone(dataset, batch), query_slice).set_index(["layer", "head"])
    layers, heads = np.sort(dataset["layer"].values), dataset["head"].values
    names = list(ROLE_COLOURS)
    cells = np.full((len(layers), len(heads)), np.nan)
    width, height = grid_size(*cells.shape)
    figure, axes = new_figure((width + LEGEND, height), ax)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            line = frame.loc[(layer, head)]
            if isinstance(line.role, str):
                cells[row, column] = names.index(line.role)
            # Beyond this many heads the numbers would overlap.
            ink = "white" if line.role in DARK else "black"
            if np.isfinite(line.score) and len(heads) <= 16:
                score = f"{100 * line.score:.0f}"
                write_at(axes, column, row, score, ha="center", va="center", fontsize=7, color=ink)
    bounds = np.arange(len(names) + 1) - 0.5
    heat_map(axes, cells, cmap=ListedColormap(list(ROLE_COLOURS.values())), norm=BoundaryNorm(bounds, len(names)))
    label_grid(axes, layers, heads, "head", of_layers(dataset))
    counts = frame.role.value_counts()
    # Sinks of the run, for example, are those of all queries: of some of them there is no score.
    known = [name for name in ROLE_COLOURS if name == "mixed" or frame[f"{name}_score"].notna().any()]
    patches = [
        Patch(color=ROLE_COLOURS[name], label=f"{name.replace('_', ' ')}: {counts.get(name, 0)}") for name in known
    ]
    if np.isnan(cells).any():
        patches.append(Patch(color=NO_DATA, label="no data"))
    beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    add_legend(figure, ax, patches, loc="outside right center", given=beside, title="role: heads")
    queries = "" if query_slice is None else f", queries {_positions(query_slice)}"
    entitle(axes, f"Role of each head (score × 100){queries}{of_part(dataset)}", about(dataset, batch))
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
    label_axes(axes, name.replace("kv_head", "KV head") + note, "layer")


def _positions(chosen: slice) -> str:
    """A slice as it is written in brackets: ``65:``."""
    parts = [chosen.start, chosen.stop] if chosen.step is None else [chosen.start, chosen.stop, chosen.step]
    return ":".join("" if part is None else str(part) for part in parts)
