"""How much attention the sink gets as the text grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_attn.analysis import as_dataset, require
from llama_attn.viz.figures.canvas import entitle, label_axes, new_figure
from llama_attn.viz.style import BLUE, about, of_head, pick, pick_head, say_no_data, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source


def plot_sink_growth(
    source: Source, *, layer: int = 0, head: int | None = None, batch: int = 0, ax: Axes | None = None
) -> Figure:
    """The attention of each query on the first tokens.

    Args:
        source: Statistics with ``sink_mass``.
        layer: Index of the layer.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: The statistic, layer, head or row was not measured.
        TypeError: ``ax`` is something else than axes.
    """
    dataset = as_dataset(source)
    require(dataset, "sink_mass")
    shown = pick_head(pick(dataset, layer=layer, batch=batch).sink_mass, head)
    figure, axes = new_figure(ax=ax)
    axes.plot(shown["query"].values, shown.values, color=BLUE)
    say_no_data(axes, shown.values)
    axes.set_ylim(0, None)
    label_axes(axes, "position of the query [token]", f"attention on the first tokens {unit_of(shown)}")
    entitle(axes, f"Sink by position, layer {layer}, {of_head(dataset, head)}", about(dataset, batch))
    axes.grid(alpha=0.4)
    return figure
