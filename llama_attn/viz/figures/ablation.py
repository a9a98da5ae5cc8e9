"""What each head is worth: the change of the loss without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.viz.figures.canvas import colour_bar, entitle, explain_no_data, new_figure
from llama_attn.viz.figures.grids import grid_size, label_grid
from llama_attn.viz.figures.tables import check_table
from llama_attn.viz.style import DIVERGING, heat_map, model_name, written

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("layer", "head", "loss", "change")
# Characters of names of files, in a title.
LONGEST = 60
# What stood in place of a head's output, in words.
MODES = {"zero": "silenced", "mean": "replaced by its mean"}


def plot_ablation(frame: pandas.DataFrame, *, ax: Axes | None = None) -> Figure:
    """How the loss changes without each head, as a heat map of layer × head: red where it rises, blue where it falls.

    The scale is symmetric around no change. Heads that were not tried are grey.

    Args:
        frame: Columns ``layer``, ``head``, ``loss`` [nat] and ``change`` [nat], as ``llama-attn ablate`` writes them; ``attrs``
            may hold ``loss``, that of the whole model [nat], ``mode``, ``model`` and ``text``.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: A column is missing, a head comes twice, or there is no line.
        TypeError: ``frame`` is no table, or ``ax`` something else than axes.
    """
    check_table(frame, COLUMNS, once=("layer", "head"))
    grid = frame.pivot(index="layer", columns="head", values="change").sort_index().sort_index(axis="columns")
    cells = grid.to_numpy(dtype=float)
    figure, axes = new_figure(grid_size(*cells.shape), ax)
    limit = float(np.abs(cells[np.isfinite(cells)]).max(initial=0.0)) or 1.0
    image = heat_map(axes, cells, cmap=DIVERGING, vmin=-limit, vmax=limit)
    label_grid(axes, grid.index.to_numpy(), grid.columns.to_numpy(), "head")
    colour_bar(image, axes, "change of the loss [nat]")
    names = model_name(str(frame.attrs.get("model", ""))), written(str(frame.attrs.get("text", "")), LONGEST)
    about = ", ".join(filter(None, names))
    if (loss := frame.attrs.get("loss")) is not None:
        about += f"\nloss {loss:.3f} nat with all heads"
    done = MODES.get(str(frame.attrs.get("mode", "zero")), "replaced")
    entitle(axes, f"Loss with one head {done}", about)
    explain_no_data(figure, cells, ax)
    return figure
