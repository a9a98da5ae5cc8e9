"""What all pictures share: size, colours, token labels, and how "no data" looks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_attn.analysis.dataset import check_measured, real_tokens, require, without_attention
from llama_attn.analysis.part import measured_layers, named_layers, named_range
from llama_attn.analysis.row import row_alone, unasked_keys
from llama_attn.stats.token_text import drawn, readable

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
COLOURS = "viridis"
DIVERGING = "RdBu_r"
NO_DATA = "#e6e6e6"
# More labels than this cannot be read at `SIZE`.
MOST_LABELS = 64
# Stands for a character that the font does not have.
MISSING = "□"
# Characters of a name or unit, of the text, and of a model, whose end tells it from its kin, in a title.
LONGEST_NAME, LONGEST_TEXT, LONGEST_MODEL = 32, 40, 60
# Of a logarithmic colour scale: the smallest number over the largest that still has a colour of its own.
LOWEST = 1e-5
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


def heat_map(axes: Axes, cells: np.ndarray, **settings: Any) -> AxesImage:
    """Draw a matrix, NaN as "no data"."""
    axes.set_facecolor(NO_DATA)
    settings = {"cmap": COLOURS, "interpolation": "nearest", "aspect": "auto"} | settings
    return axes.imshow(np.ma.masked_invalid(cells), **settings)


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


def of_part(dataset: xarray.Dataset) -> str:
    """``, layers 0–9 of 30``, for a title, where not every layer that has attention was measured."""
    return f", {layers}" if (layers := measured_layers(dataset)) else ""


def about(dataset: xarray.Dataset, batch: int | None = None) -> str:
    """Model and text, for the second line of a title: ``SmolLM2-135M, 700 tokens: Call me Ishmael. Some…``.

    Args:
        dataset: Any statistics.
        batch: Row of the batch; None if all rows count.
    """
    if batch is None and dataset.sizes["batch"] == 1:
        batch = dataset["batch"].values[0]
    if batch is None:
        what = f"{dataset.sizes['batch']} rows"
    else:
        # Not of all statistics: to cut padding off copies some of them.
        alone = row_alone(dataset[["visible_keys", "visible_queries"]], batch)
        unasked, row = unasked_keys(alone), alone.isel(batch=0)
        real = real_tokens(row, "key").values
        least = "at least " if unasked.any() else ""
        count = f"{least}{real.sum():,} token{'' if real.sum() == 1 else 's'}"
        tokens = [token for token, kept in zip(tokens_of(row, "key") or [], real | unasked, strict=False) if kept]
        # As on the axes, but for the spaces.
        text = "".join(readable(token, LONGEST_TEXT) for token in tokens[:LONGEST_TEXT]).replace("␣", " ").strip()
        of_row = f"row {batch}, " if dataset.sizes["batch"] > 1 else ""
        what = f"{of_row}{count}{': ' if text else ''}{written(text, LONGEST_TEXT)}"
    return ", ".join(filter(None, (model_name(str(dataset.attrs.get("model", ""))), what)))


def model_name(model: str) -> str:
    """What a model is called in a title: an id of the hub is two words, of a path it is the last part."""
    model = model.rstrip("/\\")
    if model.count("/") != 1 or model[0] in "./":
        model = re.split(r"[/\\]", model)[-1]
    return written(model, LONGEST_MODEL)


def drawable(token: str) -> str:
    """A `readable` token without characters that no font of matplotlib's configuration has, such as emoji."""
    return _in_fonts(readable(token))


def written(text: str, longest: int = LONGEST_NAME) -> str:
    """A name, unit or text from a file as it is drawn: on one line, control characters as dots, a long one cut."""
    return _in_fonts(drawn(text, longest))


def _in_fonts(text: str) -> str:
    from matplotlib import rcParams

    families = [name for family in rcParams["font.family"] for name in rcParams.get(f"font.{family}", [family])]
    known = _characters(tuple(families))
    return "".join(character if ord(character) in known else MISSING for character in text)


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
        # There is no token between two others.
        axes.locator_params(axis=axis, integer=True)
        return
    size = 8 if len(positions) <= 32 else 6
    labels = target.set_ticks(positions, [drawable(token) for token in tokens], fontsize=size)
    for tick in labels:
        # A dollar sign is a token here, not the start of a formula.
        tick.label1.set_parse_math(False)
        if axis == "x":
            tick.label1.set_rotation(90)


def pick_row(dataset: xarray.Dataset, batch: int) -> xarray.Dataset:
    """One row of the batch without its padding, by its label; see `row_alone`.

    Raises:
        ValueError: It was not measured.
    """
    return row_alone(dataset, batch).isel(batch=0)


def pick(dataset: xarray.Dataset, *, batch: int, layer: int, axis: str = "layer") -> xarray.Dataset:
    """One row of the batch without its padding, and one layer, by their labels.

    Raises:
        ValueError: They were not measured.
    """
    check_measured(dataset, axis, layer, name="layer")
    # First the row: what is padding shows in all layers together, and positions are the same in every picture of a run.
    return pick_row(dataset, batch).sel({axis: layer})


def pick_head(values: xarray.DataArray, head: int | None) -> xarray.DataArray:
    """One head by its label, or the mean over heads.

    Raises:
        ValueError: The head was not measured.
    """
    if head is None:
        return values.mean("head", skipna=False, keep_attrs=True)
    check_measured(values, "head", head)
    return values.sel(head=head)


def of_head(dataset: xarray.Dataset, head: int | None) -> str:
    """What `pick_head` gives, for a title: ``head 3``, or ``mean over heads 0–8``, those that were measured."""
    return f"head {head}" if head is not None else f"mean over {named_range('head', dataset['head'].values.tolist())}"


def pick_segment(dataset: xarray.Dataset, statistics: Sequence[str], segment: str | None) -> xarray.Dataset:
    """One segment, by its name, of those statistics that have a number for each.

    Raises:
        ValueError: A statistic was not measured, there is no such segment, or statistics of segments are asked for without naming one, or the other
            way round.
    """
    require(dataset, *statistics)
    divided = [name for name in statistics if "segment" in dataset[name].dims]
    known = [str(name) for name in dataset["segment"].values] if "segment" in dataset.dims else []
    if segment is None and divided:
        raise ValueError(f"segment: {divided[0]!r} has a number for each segment; name one of {known}")
    if segment is not None and not divided:
        raise ValueError(f"segment: expected none, as {', '.join(map(repr, statistics))} is not one of segments")
    if segment is not None and str(segment) not in known:
        raise ValueError(f"segment: expected one of {known}, got {segment!r}")
    chosen = {name: dataset[name].isel(segment=known.index(str(segment)), drop=True) for name in divided}
    return dataset.assign(chosen)


def of_segment(segment: str | None) -> str:
    """Which segment, for a title or an axis."""
    return "" if segment is None else f" of {written(str(segment))}"


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false, such as the word "no", which is true to Python.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def tokens_of(dataset: xarray.Dataset, axis: Literal["query", "key"]) -> list[str] | None:
    """The token strings along ``axis`` of one row, if the statistics know them."""
    name = f"{axis}_token"
    return [str(token) for token in dataset[name].values] if name in dataset.coords else None


def heading(statistic: str) -> str:
    """The name of a statistic as a title begins."""
    words = written(statistic.replace("_", " "))
    return words[:1].upper() + words[1:]


def unit_of(values: xarray.DataArray) -> str:
    """The unit of a statistic, in brackets."""
    return f"[{written(str(values.attrs.get('units', '?')))}]"


def named(values: xarray.DataArray, segment: str | None = None) -> str:
    """What a statistic is and its unit, for a title or an axis."""
    return f"{written(str(values.name).replace('_', ' '))}{of_segment(segment)} {unit_of(values)}"


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
