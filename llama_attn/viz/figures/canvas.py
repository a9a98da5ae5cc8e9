"""Where a figure is drawn, and what is written on it: names, units and tokens are data, never formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.viz.style import NO_DATA, SIZE, empty_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

TITLE_SIZE = 10.0
# Of a title: width of a character, of what stands beside the axes, and the least that is kept for it [inches].
PER_CHARACTER, BESIDE, NARROWEST_TITLE = 0.09, 1.4, 2.0


def new_figure(size: tuple[float, float] = SIZE, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """One pair of axes: those given, in the figure that they belong to, or those of an `empty_figure`.

    Raises:
        TypeError: ``ax`` is something else than axes, e.g. an array of them.
    """
    if ax is None:
        figure = empty_figure(size)
        return figure, figure.add_subplot()
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected one matplotlib Axes, got {type(ax).__name__}; of several, give one: axes[0]")
    # Axes in a subfigure belong to that, and it to the figure.
    return ax.figure.figure, ax


def entitle(where: Axes | Figure, title: str, about: str, beside: float = BESIDE) -> None:
    """Write a title above axes, or above all axes of a figure, in lines that fit.

    Args:
        where: Axes or figure.
        title: What is shown, and of which part.
        about: Model and text, the second line.
        beside: Width of what stands beside axes, in a figure of our own [inches].
    """
    from matplotlib.figure import Figure

    write: Callable[..., Any]
    if isinstance(where, Figure):
        write, width = where.suptitle, where.get_size_inches()[0]
    else:
        write = where.set_title
        whole = where.figure.figure
        # Axes of a figure of our own are nearly as wide as it is.
        width = whole.get_size_inches()[0] - beside
        if len(whole.axes) > 2:
            width = max(width * where.get_position().width, NARROWEST_TITLE)
    # Not by matplotlib, which takes dollar signs for formulas where it wraps.
    lines = [wrap(line, int(width / PER_CHARACTER), break_on_hyphens=False) for line in (title, *about.split("\n"))]
    write("\n".join(itertools.chain(*lines)), fontsize=TITLE_SIZE, parse_math=False)


def label_axes(axes: Axes, x: str | None = None, y: str | None = None, **settings: Any) -> None:
    """Write what the axes are."""
    if x is not None:
        axes.set_xlabel(x, parse_math=False, **settings)
    if y is not None:
        axes.set_ylabel(y, parse_math=False, **settings)


def write_at(axes: Axes, x: float, y: float, text: str, **settings: Any) -> None:
    """Write in axes, at a place in their data."""
    axes.text(x, y, text, parse_math=False, **settings)


def colour_bar(image: AxesImage, axes: Any, label: str, **settings: Any) -> None:
    """A colour bar beside one or several pairs of axes of one figure, and what it shows."""
    first = np.ravel(np.array(axes, dtype=object))[0]
    first.figure.colorbar(image, ax=axes, **settings).set_label(label, parse_math=False)


def add_legend(
    figure: Figure, ax: Axes | None, handles: Sequence[Artist] | None = None, *, loc: str = "outside lower center",
    given: Mapping[str, Any] = {"loc": "best"}, **settings: Any,
) -> None:  # fmt: skip
    """A legend: outside the axes in a figure of our own, at the axes in another's.

    Args:
        figure: Where.
        ax: Axes that were given, if any.
        handles: What it explains; None for all that has a label.
        loc: Where in a figure of our own.
        given: Where at axes that were given.
        settings: What both share.
    """
    chosen = {} if handles is None else {"handles": list(handles)}
    where, place = (figure, {"loc": loc}) if ax is None else (ax, {"fontsize": "small", "ncols": 1, **given})
    legend = where.legend(**chosen, **(settings | place))
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)


def explain_no_data(figure: Figure, cells: np.ndarray, ax: Axes | None = None) -> None:
    """Say what grey means, if there is any."""
    from matplotlib.patches import Patch

    if not np.isfinite(cells).all():
        patch = Patch(facecolor=NO_DATA, edgecolor="grey", label="no data")
        below = {"loc": "upper right", "bbox_to_anchor": (1, -0.08)}
        add_legend(figure, ax, [patch], loc="outside lower right", given=below)
