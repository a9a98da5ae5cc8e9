"""How many keys hold how much of the attention, through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, coverage
from llama_attn.analysis.coverage import MASS
from llama_attn.analysis.part import named_range
from llama_attn.viz.figures.canvas import add_legend, entitle, label_axes, new_figure
from llama_attn.viz.style import (
    AMBER,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    about,
    of_layers,
    of_part,
    say_no_data,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)


def plot_coverage(source: Source, *, mass: Sequence[float] = MASS, ax: Axes | None = None) -> Figure:
    """How many keys per query hold each share of the attention, through the layers, on a logarithmic axis.

    Dark bands lie between the lower and the upper bound of `llama_attn.analysis.coverage`, means over heads; light ones
    reach from the head that needs fewest to the one that needs most. Dashes are uniform attention over the same keys.

    Args:
        source: Statistics with ``weight_count`` and ``weight_mass``.
        mass: Shares of attention, at most six; 0.5, 0.9, 0.95 and 0.99 by default.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: A statistic was not measured, or a share is not in (0, 1] or one of more than six.
        TypeError: ``ax`` is something else than axes.
    """
    from matplotlib.lines import Line2D

    dataset = as_dataset(source)
    bounds = coverage(dataset, mass).sortby("layer")
    if bounds.sizes["mass"] > len(COLOURS):
        raise ValueError(f"mass: expected at most {len(COLOURS)} shares, which colours tell apart, got {mass!r}")
    layers = bounds["layer"].values
    # Bands and dashes of a single layer have some width too.
    along = layers if len(layers) > 1 else layers + np.array([-0.3, 0.3])
    figure, axes = new_figure(ax=ax)
    for colour, share in zip(COLOURS, bounds["mass"].values, strict=False):
        least, most = (bounds[name].sel(mass=share).transpose("layer", "head") for name in ("least", "most"))
        axes.fill_between(
            along, least.min("head").values, most.max("head").values, color=colour, alpha=0.13, linewidth=0
        )
        low, high = least.mean("head").values, most.mean("head").values
        axes.fill_between(along, low, high, color=colour, alpha=0.6, linewidth=0)
        axes.plot(
            layers, np.sqrt(low * high), color=colour, linewidth=1, marker="o", markersize=3, label=f"{share:.4g}"
        )
        uniform = bounds.uniform.sel(mass=share)
        axes.plot(along, np.broadcast_to(uniform.values, along.shape), color=colour, linewidth=1, linestyle="--")
    if bounds.uniform.notnull().any():
        axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:,.4g}")
    say_no_data(axes, bounds.most.values)
    entitle(axes, f"Keys that hold a share of the attention{of_part(dataset)}", about(dataset))
    heads = named_range("head", dataset["head"].values.tolist())
    label_axes(axes, f"layer{of_layers(dataset)}", f"keys per query\nmean over {heads}, fewest to most in light colour")
    if len(layers) > 1:
        axes.locator_params(axis="x", integer=True)
    else:
        axes.set_xticks(layers)
    axes.grid(alpha=0.4)
    handles = [
        *axes.get_legend_handles_labels()[0],
        Line2D([], [], color="grey", linestyle="--", label="uniform attention"),
    ]
    add_legend(figure, ax, handles, ncols=len(handles), title="share of the attention")
    return figure
