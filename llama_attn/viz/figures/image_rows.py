"""An image of the prompt, covered by the attention that one token pays to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis import as_dataset
from llama_attn.analysis.dataset import check_index
from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.stats.images import ImageSegments
from llama_attn.stats.integers import is_integer
from llama_attn.stats.shares import percent
from llama_attn.viz.figures.canvas import colour_bar, entitle, label_axes, new_figure
from llama_attn.viz.figures.scales import Scale, check_scale, colour_scale
from llama_attn.viz.style import ORANGE, about, drawable, heat_map, of_head, pick, pick_head, tokens_of, unit_of

if TYPE_CHECKING:
    import xarray
    from jaxtyping import Float, Int
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source
    from llama_attn.stats.images import ImageSpan

# Weights are this colour, from transparent to what hides the picture.
COLOUR, HIDDEN = ORANGE, 0.9
# Of the light of red, green and blue, as television weighs them (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


def plot_image_rows(
    source: Source,
    image: Any,
    segments: ImageSegments,
    *,
    row: int | None = None,
    layer: int = 0,
    head: int | None = None,
    batch: int = 0,
    image_index: int = 0,
    scale: Scale | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The picture in pale grey, under the attention that one token pays to each of its tokens; the title has their sum.

    Args:
        source: Statistics with ``row_weights``.
        image: The picture as the model saw it, in any size: of PIL, an array (height, width) or (height, width, 1, 3 or 4)
            of integers up to 255 or floats up to 1, or a path. Of a tile or crop that the processor cut out, that part.
        segments: What `llama_attn.image_segments` says of the prompts.
        row: Position of the query in its text, padding not counted; None for the last that was measured.
        layer: Index of the layer.
        head: Index of the query head; None for the mean over heads.
        batch: Row of the batch.
        image_index: Which image of the row, from 0.
        scale: What colours follow, as in `plot_attention_map`; None is the square root.
        ax: Where to draw; None for a figure of its own.

    Returns:
        The figure; with ``ax`` the one that it belongs to.

    Raises:
        ValueError: ``row_weights`` were not measured, or not of this query, layer, head or row of the batch; the
            prompt has no such image, or the statistics not all of its tokens; a picture cannot be read.
        TypeError: ``segments`` or ``ax`` is something else.
    """
    check_scale(scale, "weights")
    dataset = as_dataset(source)
    if "row_weights" not in dataset:
        raise NotMeasuredError(
            "source: row_weights were not measured",
            ["rows"],
            "measure with AttentionStatsConfig(rows=(-1,)) or another choice of rows",
            dataset.data_vars,
        )
    # Segments count padding, which is cut off.
    places = {name: (axis, dataset[axis].values) for name, axis in (("place", "key"), ("row_place", "row"))}
    of_text = pick(dataset.assign_coords(places), batch=batch, layer=layer)
    span, count = _span(segments, batch, image_index)
    row = _row(of_text, row, segments.labels[batch].numpy())
    weights = pick_head(of_text.row_weights.sel(row=row), head)
    inside = np.isin(weights["place"].values, np.arange(span.first, span.stop))
    if inside.sum() != span.stop - span.first:
        raise ValueError(
            f"segments: expected images of the measured text, got one at {span.first} to {span.stop - 1}; measured keys are "
            f"{weights['place'].values[:1].tolist()} to {weights['place'].values[-1:].tolist()}"
        )
    picture = _grey(image)
    cells = weights.values[inside].reshape(span.grid)
    colours = colour_scale(cells, "weights", scale)
    figure, axes = new_figure(ax=ax)
    # One picture element is one unit, whatever the size of the cells.
    height, width = picture.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    # Pale, so that it does not change colours much.
    axes.imshow(picture, cmap="gray", vmin=-1, vmax=1, extent=extent)
    drawn = heat_map(axes, cells, cmap=_veil(), norm=colours.norm, extent=extent, aspect="equal")
    label = f"attention weight {unit_of(weights)}{colours.note}"
    colour_bar(drawn, axes, label, ticks=colours.ticks, extend=colours.extend)
    label_axes(axes, "{1} × {0} tokens".format(*span.grid))
    axes.set(xticks=[], yticks=[])
    tokens = tokens_of(of_text, "key")
    at = int(np.flatnonzero(of_text["key"].values == row)[0]) if tokens else 0
    named = f" “{drawable(tokens[at])}”" if tokens else ""
    whole = f"image {image_index} of {count}, which gets {percent(float(cells.sum()), 1)} of it"
    entitle(
        axes,
        f"Attention of the token{named} at {row} to {whole}, layer {layer}, {of_head(dataset, head)}",
        about(dataset, batch),
    )
    return figure


def _veil() -> ListedColormap:
    from matplotlib.colors import ListedColormap, to_rgba

    return ListedColormap([to_rgba(COLOUR, HIDDEN * part) for part in np.linspace(0, 1, 256)])


def _span(segments: ImageSegments, batch: int, index: int) -> tuple[ImageSpan, int]:
    """The image, and how many there are in the row."""
    if not isinstance(segments, ImageSegments):
        raise TypeError(f"segments: expected what image_segments returns, got {type(segments).__name__}")
    if batch >= len(segments.images):
        raise ValueError(f"segments: expected images of row {batch} of the batch, got {len(segments.images)} rows")
    spans = segments.images[batch]
    if not is_integer(index) or index not in range(len(spans)):
        raise ValueError(
            f"image_index: expected one of the {len(spans)} images of row {batch} of the batch, counted from 0, got {index!r}"
        )
    return spans[index], len(spans)


def _row(dataset: xarray.Dataset, row: int | None, labels: Int[np.ndarray, " key"]) -> int:
    """Position of the query."""
    weights = dataset.row_weights
    has_data = weights.notnull().any([dim for dim in weights.dims if dim != "row"]).values
    # Padding behind a text may see it; what stands behind the prompts was generated.
    at, labelled = weights["row_place"].values, np.flatnonzero(labels >= 0)
    real = np.isin(at, np.arange(labelled[0], labelled[-1] + 1)) | (at >= len(labels))
    known = weights["row"].values[has_data & real].tolist()
    if row is None and known:
        return int(known[-1])
    if row is not None:
        check_index("row", row, known)
    if row is None or row not in known:
        raise NotMeasuredError(
            f"row: {row} was not measured, or is padding; there are {known}",
            ["rows"],
            "AttentionStatsConfig(rows=…) chooses them",
        )
    return int(row)


def _grey(image: Any) -> Float[np.ndarray, "height width"]:
    """Brightness from 0 to 1."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as file:
            image = file.convert("RGB")
    elif isinstance(image, Image.Image):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    known = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4))
    if not (known and pixels.size and pixels.dtype.kind in "biuf"):
        raise ValueError(
            f"image: expected numbers (height, width) or (height, width, 1, 3 or 4), got {pixels.dtype} {pixels.shape}"
        )
    most = 255 if pixels.dtype.kind in "iu" else 1
    if not (pixels.min() >= 0 and pixels.max() <= most):
        raise ValueError(f"image: expected {pixels.dtype} from 0 to {most}, got {pixels.min()} to {pixels.max()}")
    pixels = pixels / most
    if pixels.ndim == 2:
        return pixels
    return pixels[..., :3] @ LUMINANCE if pixels.shape[-1] > 1 else pixels[..., 0]
