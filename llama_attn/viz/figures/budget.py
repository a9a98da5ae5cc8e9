"""What a smaller cache keeps of the attention, and what it costs the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from llama_attn.viz.figures.canvas import add_legend, colour_bar, entitle, label_axes
from llama_attn.viz.figures.tables import check_table
from llama_attn.viz.style import AMBER, BLUE, GREEN, ORANGE, PINK, empty_figure, heat_map, model_name, written

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

COLUMNS = ("policy", "budget", "layer", "kept", "loss")
# The part of the distance between neighbouring budgets over which the policies are spread.
SPREAD = 0.4


def plot_budget(frame: pandas.DataFrame) -> Figure:
    """Attention mass that each policy keeps with each budget, the loss with what was kept, and the mass in each layer.

    Args:
        frame: Columns ``policy``, ``budget`` [keys], ``layer``, ``kept`` [probability] and ``loss`` [nat] (the same in
            all layers), as ``llama-attn budget`` writes them; ``attrs`` may hold ``full_loss`` [nat], ``model`` and
            ``text``.

    Raises:
        ValueError: A column is missing, a policy has one layer twice with the same budget, or there is no line.
        TypeError: ``frame`` is no table.
    """
    check_table(frame, COLUMNS, once=("policy", "budget", "layer"))
    policies = list(dict.fromkeys(frame.policy))
    columns = max(2, len(policies))
    figure = empty_figure((3.6 * columns, 6.6))
    grid = figure.add_gridspec(2, 2 * columns)
    kept_axes, loss_axes = figure.add_subplot(grid[0, :columns]), figure.add_subplot(grid[0, columns:])
    beside = _beside(sorted(set(frame.budget)), len(policies))
    for policy, colour, aside in zip(policies, _colours(len(policies)), beside, strict=True):
        by_budget = frame[frame.policy == policy].groupby("budget")
        kept, loss = by_budget["kept"].agg(["min", "mean", "max"]), by_budget["loss"].first()
        # Ranges that overlap could not be told apart.
        at = kept.index.to_numpy() * aside
        kept_axes.vlines(at, kept["min"], kept["max"], color=colour, linewidth=2, alpha=0.45)
        kept_axes.plot(at, kept["mean"], color=colour, linewidth=1, marker="o", markersize=5, label=written(policy))
        loss_axes.plot(loss.index, loss.values, color=colour, marker="o", markersize=4, label=written(policy))
    if (full := frame.attrs.get("full_loss")) is not None:
        loss_axes.axhline(full, color="black", linestyle="--", linewidth=1, label="all keys")
    budgets = sorted(set(frame.budget))
    # Where nothing is: more keys hold more of the attention, and cost less.
    for axes, corner in ((kept_axes, "lower right"), (loss_axes, "upper right")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axes.minorticks_off()
        axes.grid(alpha=0.4)
        add_legend(figure, axes, given={"loc": corner})
        label_axes(axes, "keys kept per KV head")
    kept_axes.set_ylim(0, 1.02)
    label_axes(kept_axes, y="attention on kept keys [probability]\nmean of the layers, from least to most")
    label_axes(loss_axes, y="loss when only they are seen [nat]")
    drawn = []
    for at, policy in enumerate(policies):
        width = 2 * columns // len(policies)
        axes = figure.add_subplot(grid[1, at * width : (at + 1) * width])
        cells = frame[frame.policy == policy].pivot(index="layer", columns="budget", values="kept")
        image = heat_map(axes, cells.values, vmin=0, vmax=1, origin="lower")
        axes.set_xticks(range(cells.shape[1]), [f"{budget:,}" for budget in cells.columns])
        places = range(0, cells.shape[0], -(-cells.shape[0] // 10))
        axes.set_yticks(places, [str(cells.index[place]) for place in places])
        label_axes(axes, "keys kept per KV head", "layer" if not at else None)
        axes.set_title(written(policy), fontsize=10, parse_math=False)
        drawn.append(axes)
    colour_bar(image, drawn, "attention on kept keys [probability]")
    names = model_name(str(frame.attrs.get("model", ""))), written(str(frame.attrs.get("text", "")), 60)
    about = ", ".join(filter(None, names))
    entitle(figure, "What a smaller cache keeps", about)
    return figure


def _beside(budgets: Sequence[int], count: int) -> Float[np.ndarray, " policy"]:
    """Factors on the logarithmic axis of budgets, by which policies stand beside each other and nearest to their own budget."""
    nearest = np.diff(np.log2(budgets)).min(initial=1.0)
    return 2 ** (SPREAD * nearest * (np.arange(count) - (count - 1) / 2) / count)


def _colours(count: int) -> list[str]:
    colours = (BLUE, ORANGE, GREEN, PINK, AMBER)
    return [colours[at % len(colours)] for at in range(count)]
