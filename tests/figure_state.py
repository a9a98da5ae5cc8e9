"""What a figure would show, read from its artists, without drawing a pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import Collection
from matplotlib.colors import LogNorm
from matplotlib.figure import FigureBase
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

from llama_attn.viz.style import MOST_LABELS


def state_of(artist: Artist) -> list[Any]:
    """All that an artist and those in it show, in the order of drawing; equal for figures that look the same."""
    found = [type(artist).__name__, artist.get_visible(), artist.get_zorder(), artist.get_alpha()]
    if isinstance(artist, Text):
        found += [artist.get_text(), artist.get_position(), artist.get_color(), artist.get_fontsize()]
        found += [artist.get_rotation(), artist.get_ha(), artist.get_va(), artist.get_parse_math()]
    elif isinstance(artist, Line2D):
        found += [listed(artist.get_xydata()), artist.get_color(), artist.get_linestyle(), artist.get_marker()]
        found += [artist.get_markersize(), artist.get_markerfacecolor(), artist.get_label()]
    elif isinstance(artist, Patch):
        found += [listed(artist.get_path().vertices), listed(artist.get_patch_transform().get_matrix())]
        found += [artist.get_facecolor(), artist.get_edgecolor(), artist.get_label()]
    elif isinstance(artist, AxesImage):
        found += [listed(artist.get_array()), artist.get_extent(), artist.get_clim(), artist.cmap.name, artist.origin]
    elif isinstance(artist, Collection):
        found += [listed(path.vertices) for path in artist.get_paths()]
        found += [listed(artist.get_facecolor()), listed(artist.get_array()), artist.get_clim(), artist.get_label()]
    elif isinstance(artist, Axis):
        found += [listed(artist.get_ticklocs()), artist.get_scale(), artist.get_view_interval().tolist()]
    return [*found, *map(state_of, children_of(artist))]


def children_of(artist: Artist) -> list[Artist]:
    """What is drawn in an artist."""
    if isinstance(artist, Legend):
        return [artist.get_title(), *artist.get_texts(), *artist.get_patches(), *artist.get_lines()]
    if isinstance(artist, Axis):
        return [artist.get_label(), *artist.get_ticklabels()]
    return artist.get_children() if isinstance(artist, (Axes, FigureBase)) else []


def everything_in(artist: Artist) -> Iterator[Artist]:
    """The artist and all in it that are not hidden."""
    if artist.get_visible() and not (isinstance(artist, Axis) and not artist.axes.axison):
        yield artist
        for child in children_of(artist):
            yield from everything_in(child)


def listed(values: Any) -> list[Any]:
    """Numbers that are equal to themselves: where there are none stands None."""
    numbers = np.ma.asarray([] if values is None else values, dtype=float).filled(np.nan)
    known = np.isfinite(numbers)
    return numbers.tolist() if known.all() else np.where(known, numbers, None).tolist()


def finite(values: Any) -> bool:
    return bool(np.isfinite(np.asarray(values, dtype=float)).all())


def check_artists(figure: FigureBase) -> None:
    """Everything has a place, every number a colour, every picture a name, and nothing that was written is a formula."""
    for artist in everything_in(figure):
        if isinstance(artist, Text):
            text = artist.get_text()
            assert finite(artist.get_position()), text
            assert all(character.isprintable() or character == "\n" for character in text), repr(text)
            assert "$" not in text or "mathdefault" in text or not artist.get_parse_math(), text
        elif isinstance(artist, Line2D):
            # A number that is missing leaves a gap, but there is a place for it.
            assert not np.isinf(artist.get_xydata()).any()
            assert any(finite(along) for along in artist.get_data())
        elif isinstance(artist, Patch):
            # A bar that is missing has no height, but there is a place for it.
            assert not isinstance(artist, Rectangle) or finite([artist.get_x(), artist.get_y(), artist.get_width()])
        elif isinstance(artist, AxesImage):
            assert finite(artist.get_extent())
            check_colours(artist)
        elif isinstance(artist, Axes):
            assert finite([artist.get_xlim(), artist.get_ylim()])
            assert len({*artist.get_xlim()}) == len({*artist.get_ylim()}) == 2
            if artist.get_label() == "<colorbar>":
                assert artist.get_xlabel() or artist.get_ylabel()
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    assert any(title.strip() for title in titles)
    first = figure.axes[0]
    assert first.get_xlabel() or figure.get_supxlabel() or not first.axison or len(figure.axes) > 1


def check_same(axes: Axes, figure: FigureBase, name: str) -> None:
    """Axes of the caller's show what the first of a figure of our own do; only letters and lines may be laid out anew."""
    own = figure.axes[0]
    found, expected = (shown_in(each) for each in (axes, own))
    if name == "plot_rows":
        # A text that is as large as its axes has lines of its own.
        found, expected = ([text.get_text() for text in each.texts] for each in (axes, own))
        found += [listed(each.get_array()) for each in axes.collections]
        expected += [listed(each.get_array()) for each in own.collections]
    assert found == expected
    words = [(each.get_xlabel(), each.get_ylabel(), "".join(each.get_title().split())) for each in (axes, own)]
    assert words[0] == words[1]
    given = [axes.get_legend()] if axes.get_legend() else []
    said = [[text.get_text() for each in legends for text in each.get_texts()] for legends in (given, figure.legends)]
    assert said[0] == said[1]
    for mine, theirs in zip((own.xaxis, own.yaxis), (axes.xaxis, axes.yaxis), strict=True):
        assert mine.get_scale() == theirs.get_scale()
        if isinstance(mine.get_major_locator(), FixedLocator) and len(mine.get_ticklocs()) <= MOST_LABELS:
            assert [text.get_text() for text in theirs.get_ticklabels()] == [
                text.get_text() for text in mine.get_ticklabels()
            ]
    bars = [[bar_words(image) for image in each.images if image.colorbar] for each in (axes, own)]
    assert bars[0] == bars[1]


def bar_words(image: Any) -> str:
    bar = image.colorbar.ax
    return bar.get_ylabel() or bar.get_xlabel()


def shown_in(axes: Axes) -> list[Any]:
    """All that is no text."""
    return [state_of(each) for each in (*axes.images, *axes.lines, *axes.patches, *axes.collections)]


def check_colours(image: Any) -> None:
    """Every number lies between the ends of the colours, but for those of which the colour bar says that they do not."""
    low, high = image.get_clim()
    assert finite([low, high])
    assert low <= high
    numbers = np.ma.masked_invalid(image.get_array()).compressed()
    assert (numbers <= high).all()
    assert (numbers >= low).all() or (isinstance(image.norm, LogNorm) and image.norm.clip)
