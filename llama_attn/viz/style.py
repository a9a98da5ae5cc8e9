"""What all pictures share: size, colours, token labels, and how "no data" looks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_attn.analysis.dataset import without_attention
from llama_attn.analysis.part import named_layers
from llama_attn.stats.token_text import readable

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SIZE = (8.0, 6.0)
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, AMBER = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#E69F00",
)  # fmt: skip
# One more, darker than all of them.
WINE = "#661144"
COLOURS = "viridis"
DIVERGING = "RdBu_r"
NO_DATA = "#e6e6e6"
# More labels than this cannot be read at `SIZE`.
MOST_LABELS = 64
# Stands for a character that the font does not have.
MISSING = "□"
# Beyond this ratio of largest to median, a linear axis would show one spike and a flat line.
LOG_FROM = 30.0


def empty_figure(size: tuple[float, float] = SIZE) -> Figure:
    """A figure that belongs to its caller: pyplot does not know it, so nothing opens a window and nothing needs closing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from llama_attn.viz.figures.figure import NotebookFigure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'llama_attn[viz]'") from error
    return NotebookFigure(figsize=size, layout="constrained")


def new_figure(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """An `empty_figure` with one pair of axes."""
    figure = empty_figure(size)
    return figure, figure.add_subplot()


def heat_map(axes: Axes, cells: np.ndarray, **settings: Any) -> AxesImage:
    """Draw a matrix, NaN as "no data"."""
    axes.set_facecolor(NO_DATA)
    settings = {"cmap": COLOURS, "interpolation": "nearest", "aspect": "auto"} | settings
    return axes.imshow(np.ma.masked_invalid(cells), **settings)


def explain_no_data(figure: Figure, cells: np.ndarray) -> None:
    """Say what grey means, if there is any."""
    from matplotlib.patches import Patch

    if not np.isfinite(cells).all():
        figure.legend(handles=[Patch(facecolor=NO_DATA, edgecolor="grey", label="no data")], loc="outside lower right")


def say_no_data(axes: Axes, values: np.ndarray) -> None:
    """Write so in axes of lines or bars, if there is nothing to draw in them."""
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="grey")


def spiky(values: np.ndarray) -> bool:
    """Whether a logarithmic axis shows these numbers better."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > LOG_FROM * np.median(finite))


def of_layers(dataset: xarray.Dataset) -> str:
    """A line below a figure of all layers that names those without attention; nothing if there are none."""
    absent = without_attention(dataset)
    return f"\n{named_layers(absent)} without attention weights" if absent else ""


def drawable(token: str) -> str:
    """A `readable` token without characters that no font of matplotlib's configuration has, such as emoji."""
    from matplotlib import rcParams

    families = [name for family in rcParams["font.family"] for name in rcParams.get(f"font.{family}", [family])]
    known = _characters(tuple(families))
    return "".join(character if ord(character) in known else MISSING for character in readable(token))


def label_tokens(
    axes: Axes,
    axis: Literal["x", "y"],
    positions: Sequence[int],
    tokens: Sequence[str] | None,
    most: int = MOST_LABELS,
) -> None:
    """Write tokens, or positions where there are none or too many, along an axis whose unit is one position.

    Args:
        axes: Where.
        axis: Which of its axes.
        positions: Position of each tick in the row [token].
        tokens: Token at each position.
        most: More labels than this cannot be read.
    """
    target: Any = axes.xaxis if axis == "x" else axes.yaxis
    if tokens is None or len(positions) > most:
        return
    size = 8 if len(positions) <= 32 else 6
    labels = target.set_ticks(positions, [drawable(token) for token in tokens], fontsize=size)
    for tick in labels:
        # A dollar sign is a token here, not the start of a formula.
        tick.label1.set_parse_math(False)
        if axis == "x":
            tick.label1.set_rotation(90)


def pick(dataset: xarray.Dataset, *, batch: int, layer: int | None = None, axis: str = "layer") -> xarray.Dataset:
    """One row of the batch, and one layer if one is given, by their labels.

    Raises:
        ValueError: They were not measured.
    """
    chosen = {"batch": batch} if layer is None else {axis: layer, "batch": batch}
    for name, wanted in chosen.items():
        if wanted not in dataset[name].values:
            raise ValueError(f"{name}: {wanted} was not measured; there are {dataset[name].values.tolist()}")
    return dataset.sel(chosen)


def pick_head(values: xarray.DataArray, head: int | None) -> xarray.DataArray:
    """One head by its label, or the mean over heads.

    Raises:
        ValueError: The head was not measured.
    """
    if head is None:
        return values.mean("head", skipna=False, keep_attrs=True)
    if head not in values["head"].values:
        raise ValueError(f"head: {head} was not measured; there are {values['head'].values.tolist()}")
    return values.sel(head=head)


def of_head(head: int | None) -> str:
    """What `pick_head` gives, for a title."""
    return "mean over heads" if head is None else f"head {head}"


def tokens_of(dataset: xarray.Dataset, axis: Literal["query", "key"]) -> list[str] | None:
    """The token strings along ``axis`` of one row, if the statistics know them."""
    name = f"{axis}_token"
    return [str(token) for token in dataset[name].values] if name in dataset.coords else None


def heading(statistic: str) -> str:
    """The name of a statistic as a title begins."""
    words = statistic.replace("_", " ")
    return words[:1].upper() + words[1:]


def named(values: xarray.DataArray) -> str:
    """What a statistic is and its unit, for a title or an axis."""
    return f"{str(values.name).replace('_', ' ')} [{values.attrs.get('units', '?')}]"


@cache
def _characters(families: tuple[str, ...]) -> frozenset[int]:
    """Code points of all characters that some font of the families has."""
    from matplotlib import font_manager

    known: set[int] = set()
    for family in families:
        # Looked for by name, since `findfont` warns of every family that is not installed.
        if any(font.name == family for font in font_manager.fontManager.ttflist):
            known |= font_manager.get_font(font_manager.findfont(family)).get_charmap().keys()
    return frozenset(known)
