"""What a figure was asked for, and what is written and coloured in all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from own_text import real_tokens

from llama_attn import AttentionStats
from llama_attn.stats.images import ImageSegments
from llama_attn.viz.style import MOST_LABELS, drawable, model_name, written


@dataclass(frozen=True)
class Asked:
    """What a figure was asked for; None for a head or a layer is the mean.

    Of the options behind ``query_slice``, None is what the figure does if it is not asked. ``pairs``: who sees whom,
    (layer, batch, query, key); None for attention that is causal and sees everything. The last three are of a picture.
    """

    a: AttentionStats
    b: AttentionStats
    layer: int | None = 0
    head: int | None = 4
    batch: int = 1
    kind: str = "weights"
    statistic: str = "sink_mass"
    query_slice: slice | None = field(default_factory=lambda: slice(6, 15))
    scale: str | None = None
    segment: str | None = None
    statistics: tuple[str, ...] | None = None
    row: int | None = None
    sink: bool | None = None
    heads: dict[int, list[int]] | None = None
    mass: tuple[float, ...] | None = None
    pairs: np.ndarray | None = field(default=None, repr=False)
    image: Any = field(default=None, repr=False)
    segments: ImageSegments | None = field(default=None, repr=False)
    image_index: int = 0

    @property
    def positions(self) -> list[int]:
        return list(range(self.a.num_keys))

    @property
    def real(self) -> np.ndarray:
        """Which tokens of the row are no padding."""
        return real_tokens(self.a, self.batch)

    @property
    def sees(self) -> np.ndarray:
        """Who sees whom in the row, (layer, query, key)."""
        if self.pairs is not None:
            return self.pairs[:, self.batch]
        return np.tril(np.broadcast_to(self.real[:, None] & self.real, (len(self.a.layers), *2 * self.real.shape)))

    def at(self, name: str, stats: AttentionStats | None = None) -> np.ndarray:
        """The statistic at the layer and row; the axis of query heads, if there is one, is picked or averaged."""
        stats = self.a if stats is None else stats
        dims = stats.labels[name].dims
        layers = stats.hidden_layers if dims[0] == "hidden_layer" else stats.layers
        values = stats[name].double().numpy()[:, self.batch]
        if "segment" in dims:
            values = values[..., stats.segments.index(self.segment)]
        if "head" in dims:
            values = values.mean(1) if self.head is None else values[:, stats.heads.index(self.head)]
        return average(values, 0) if self.layer is None else values[layers.index(self.layer)]

    def map(self, stats: AttentionStats | None = None) -> np.ndarray:
        """The map, NaN for pairs of tokens that may not see each other, and where no head gives any weight."""
        stats = self.a if stats is None else stats
        at = stats.layers.index(self.layer)
        seen = self.sees[at]
        if self.kind == "weights" and self.pairs is not None:
            seen = seen & (np.nan_to_num(stats["weights_map"][at, self.batch].numpy()) > 0).any(0)
        return np.where(seen, self.at(f"{self.kind}_map", stats), np.nan)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-7)


def spelled(word: str, numbers) -> str:
    """``heads 0–2, 5``."""
    numbers = sorted(numbers)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"{word}{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def average(values: torch.Tensor | np.ndarray, axis=-1) -> np.ndarray:
    """The mean of what there is, NaN where there is nothing."""
    values = np.asarray(values, dtype=np.float64)
    count = np.isfinite(values).sum(axis)
    return np.where(count, np.nansum(values, axis), np.nan) / np.maximum(count, 1)


def heat(axes, origin: str = "upper") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of an image, and where the centres of its columns and rows lie."""
    (image,) = axes.images
    assert image.origin == origin
    cells = image.get_array().filled(np.nan)
    left, right, bottom, top = image.get_extent()
    assert axes.get_xlim() == (left, right), "all of it is shown"
    assert axes.get_ylim() == (bottom, top)
    low, high = image.norm.vmin, image.norm.vmax
    finite = cells[np.isfinite(cells)]
    assert np.isfinite([low, high]).all()
    assert low <= high
    below = isinstance(image.norm, LogNorm) and image.norm.clip
    assert not finite.size or finite.max() <= high, "no colour stands for two values"
    assert not finite.size or below or low <= finite.min(), "no colour stands for two values"
    shared = [each for other in axes.figure.axes for each in other.images if each.norm is image.norm]
    if len(shared) == 1:
        read_beyond(image, finite)
    x, y = ((np.arange(n) + 0.5) / n for n in cells.shape[::-1])
    first, last = (top, bottom) if origin == "upper" else (bottom, top)
    return cells, left + (right - left) * x, first + (last - first) * y


def read_beyond(image, cells: np.ndarray):
    """On a logarithmic scale the darkest colour is for all that is smaller, and the colour bar says so."""
    if isinstance(image.norm, LogNorm) and image.norm.clip:
        assert image.colorbar.extend == ("min" if (cells < image.norm.vmin).any() else "neither")


def labels(axis) -> dict[float, str]:
    """What is written where."""
    pairs = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return {float(place): label.get_text() for place, label in pairs}


def bar_of(figure) -> str:
    (label,) = {axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes if axes.get_label() == "<colorbar>"}
    return label


def squeezed(text: str) -> str:
    """Without spaces and line breaks: titles are wrapped where they end."""
    return "".join(text.split())


def read_title(text: str, expected: str, asked: Asked):
    """What is shown, then the model and the text: its row, length and first token."""
    text, expected = squeezed(text), squeezed(expected)
    assert text.startswith(expected)
    rest = text.removeprefix(expected).removeprefix("a:")
    real = np.flatnonzero(asked.real)
    rows = f"row{asked.batch}," if asked.a.batch > 1 else ""
    model = f"{squeezed(model_name(asked.a.model))}," if asked.a.model else ""
    begins = f"{model}{rows}{len(real)}token{'' if len(real) == 1 else 's'}"
    assert rest.startswith(begins)
    if len(real) and asked.a.tokens is not None:
        first = drawable(str(asked.a.tokens[asked.batch][real[0]])).replace("␣", "").removesuffix("…")
        assert rest.removeprefix(begins).removeprefix(":").startswith(squeezed(first)[:12])


def part_of(asked: Asked) -> str:
    """Which layers, where some that have attention were not measured."""
    a = asked.a
    some = {*range(a.num_layers)} - {*a.layers, *a.without_attention}
    return f", {spelled('layer', a.layers)} of {a.num_layers}" if some else ""


def below(asked: Asked) -> str:
    """A line below a figure of all layers."""
    absent = asked.a.without_attention
    return f"\n{spelled('layer', absent)} without attention weights" if absent else ""


def shown_name(statistic: str) -> str:
    return written(statistic.replace("_", " "))


def of_segment(asked: Asked) -> str:
    return "" if asked.segment is None else f" of {written(asked.segment)}"


def with_unit(asked: Asked, statistic: str | None = None) -> str:
    name = asked.statistic if statistic is None else statistic
    return f"{shown_name(name)}{of_segment(asked)} [{asked.a.labels[name].unit}]"


def headline(asked: Asked) -> str:
    name = shown_name(asked.statistic)
    return name[0].upper() + name[1:] + of_segment(asked)


def grid_of(axes) -> dict[tuple[str, str], float]:
    """Cells by what is written beside and below them: layer, head."""
    cells, x, y = heat(axes)
    rows, columns = labels(axes.yaxis), labels(axes.xaxis)
    layers = [int(rows[place]) for place in y]
    assert layers == sorted(layers)
    return {(rows[j], columns[i]): cells[n, m] for n, j in enumerate(y) for m, i in enumerate(x)}


def read_tokens(axis, asked: Asked, most: int = MOST_LABELS):
    """Tokens where they are known and there are not too many, no formulas; else numbers."""
    strings, written = asked.a.tokens, labels(axis)
    if strings is None or asked.a.num_keys > most:
        assert all(text == "" or text.removeprefix("−").replace(".", "").isdigit() for text in written.values())
        return
    assert written == {place: drawable(str(token)) for place, token in enumerate(strings[asked.batch])}
    assert not any(label.get_parse_math() for label in axis.get_ticklabels())


def words(asked: Asked) -> str:
    layer = f"mean over layers{part_of(asked)}" if asked.layer is None else f"layer {asked.layer}"
    return f"{layer}, " + (
        f"mean over {spelled('head', asked.a.heads)}" if asked.head is None else f"head {asked.head}"
    )


def bar_label(asked: Asked) -> str:
    if asked.kind == "logits":
        return "scaled score [logit]"
    note = {None: "\nsquare-root scale", "sqrt": "\nsquare-root scale", "log": "\nlog scale", "linear": ""}
    return f"attention weight [probability]{note[asked.scale]}"


def read_colours(image, cells: np.ndarray, asked: Asked):
    """Colours from 0, or the smallest score, to the largest number there is."""
    cells = cells[np.isfinite(cells)]
    norm = image.norm
    if asked.kind == "logits":
        if len({*cells}) > 1:
            close([norm.vmin, norm.vmax], [cells.min(), cells.max()])
        return
    high = cells.max(initial=0) or 1
    kinds = {None: PowerNorm, "sqrt": PowerNorm, "linear": Normalize, "log": LogNorm}
    assert type(norm) is kinds[asked.scale]
    assert norm.vmax == pytest.approx(high, rel=1e-6)
    if asked.scale == "log":
        assert 1e-5 * high * (1 - 1e-6) <= norm.vmin < high
    else:
        assert norm.vmin == 0
        assert getattr(norm, "gamma", 0.5) == 0.5


def read_band(band, xs, under, above):
    """Lower and upper end at each place, none where there is no data."""
    corners = np.concatenate([np.empty((0, 2)), *(path.vertices for path in band.get_paths())])
    for x, *ends in zip(xs, under, above, strict=True):
        there = corners[corners[:, 0] == x][:, 1]
        close([there.min(), there.max()] if there.size else [np.nan] * 2, ends)
