"""One function per figure that reads it back from its artists, by the labels on its axes, and compares it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pytest
import torch
from matplotlib.collections import PatchCollection, PolyCollection
from matplotlib.colors import LogNorm, Normalize, PowerNorm, to_hex
from own_text import own_ends, own_text, real_tokens

from llama_attn import AttentionStats, viz
from llama_attn.analysis import classify_heads, coverage as coverage_of
from llama_attn.viz.figures.activations import CHANNEL_COLOURS
from llama_attn.viz.figures.along import MOST_TOKENS
from llama_attn.viz.style import MOST_LABELS, drawable, model_name, written

# Those of a table of losses, or of a picture, have tests of their own.
OF_MORE = {"plot_ablation", "plot_budget", "plot_image_rows"}
NAMES = [name for name in viz.__all__ if name.startswith("plot_") and name not in OF_MORE]


@dataclass(frozen=True)
class Asked:
    """What a figure was asked for; None for a head or a layer is the mean.

    Of the options behind ``query_slice``, None is what the figure does if it is not asked. ``pairs``: who sees whom,
    (layer, batch, query, key); None for attention that is causal and sees everything.
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


def heat(axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of an image, and where the centres of its columns and rows lie."""
    (image,) = axes.images
    assert image.origin == "upper"
    cells = image.get_array().filled(np.nan)
    left, right, bottom, top = image.get_extent()
    assert axes.get_xlim() == (left, right), "all of it is shown"
    assert axes.get_ylim() == (bottom, top)
    low, high = image.norm.vmin, image.norm.vmax
    finite = cells[np.isfinite(cells)]
    assert np.isfinite([low, high]).all()
    assert low <= high
    # On a logarithmic scale the darkest colour is for all that is smaller, and the colour bar says so.
    below = isinstance(image.norm, LogNorm) and image.norm.clip
    assert not finite.size or finite.max() <= high, "no colour stands for two values"
    assert not finite.size or below or low <= finite.min(), "no colour stands for two values"
    if below:
        assert image.colorbar.extend == ("min" if (finite < min(low, high)).any() else "neither")
    x, y = ((np.arange(n) + 0.5) / n for n in cells.shape[::-1])
    return cells, left + (right - left) * x, top + (bottom - top) * y


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


def read_map(axes, expected, asked):
    cells, x, y = heat(axes)
    close(cells, expected)
    np.testing.assert_allclose(x, asked.positions)
    np.testing.assert_allclose(y, asked.positions)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key [token]", "query [token]")
    read_tokens(axes.xaxis, asked)
    read_tokens(axes.yaxis, asked)


def attention_map(figure, asked):
    read_map(figure.axes[0], asked.map(), asked)
    read_colours(figure.axes[0].images[0], asked.map(), asked)
    assert bar_of(figure) == bar_label(asked)
    read_title(figure.axes[0].get_title(), f"Attention {asked.kind}, {words(asked)}", asked)


def comparison(figure, asked):
    first, second = asked.map(asked.a), asked.map(asked.b)
    difference = second - first
    if asked.kind == "weights":
        # A weight of 0 in one run is a number where the other has some.
        raw = [asked.at("weights_map", run) for run in (asked.a, asked.b)]
        difference = np.where(np.isnan(first) & np.isnan(second), np.nan, raw[1] - raw[0])
    read_map(figure.axes[0], difference, asked)
    unit = {"weights": "attention weight, b − a [probability]", "logits": "scaled score, b − a [logit]"}[asked.kind]
    assert bar_of(figure) == f"difference in {unit}"
    read_title(figure.axes[0].get_title(), f"Attention {asked.kind}, b − a, {words(asked)}", asked)
    (image,) = figure.axes[0].images
    assert -image.norm.vmin == image.norm.vmax, "zero is in the middle"
    red, *_, blue = image.cmap([1.0, 0.0])[:, [0, 2]].tolist()
    assert red[0] > red[1], "more in b is red"
    assert blue[0] < blue[1], "more in a is blue"


def layer_heads(figure, asked):
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == [f"head {head}" for head in asked.a.heads]
    everything = np.array([replace(asked, head=head).map() for head in asked.a.heads])
    for head, expected in zip(asked.a.heads, everything, strict=True):
        cells, x, y = heat(panels[f"head {head}"])
        close(cells, expected)
        np.testing.assert_allclose([x, y], [asked.positions] * 2)
        read_colours(panels[f"head {head}"].images[0], everything, asked)
        assert panels[f"head {head}"].images[0].norm is panels[f"head {asked.a.heads[0]}"].images[0].norm
    assert bar_of(figure) == bar_label(asked)
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("key [token]", "query [token]")
    read_title(figure.get_suptitle(), f"Attention {asked.kind} of layer {asked.layer}", asked)


def model_view(figure, asked):
    axes = figure.axes[0]
    cells, x, y = heat(axes)
    rows, columns = labels(axes.yaxis), labels(axes.xaxis)
    assert list(columns.values()) == [str(head) for head in asked.a.heads]
    assert list(rows.values()) == [str(layer) for layer in sorted(asked.a.layers)]
    factor = -(-asked.a.num_keys // 16)
    side = -(-asked.a.num_keys // factor)
    for row, layer in rows.items():
        at = asked.a.layers.index(int(layer))
        maps = {head: replace(asked, layer=int(layer), head=int(head)).at("weights_map") for head in columns.values()}
        miniatures = {head: pooled(weights, asked.real, factor) for head, weights in maps.items()}
        nothing = ~(np.nan_to_num(list(miniatures.values())) > 0).any(0)
        assert asked.sees[at].any() or nothing.all()
        for column, head in columns.items():
            inside = np.ix_(np.abs(y - row) < 0.5, np.abs(x - column) < 0.5)
            close(cells[inside], np.where(nothing, np.nan, miniatures[head]))
    read_colours(axes.images[0], np.ones(1), replace(asked, kind="weights", scale=None))
    assert bar_of(figure) == "attention weight [probability]\nsquare-root scale"
    size = f"{side} × {side} cells of {factor} token{'' if factor == 1 else 's'}"
    read_title(axes.get_title(), f"Attention of every head ({size}){part_of(asked)}", asked)


def pooled(weights: np.ndarray, real: np.ndarray, factor: int) -> np.ndarray:
    """Of neighbouring queries the mean, of neighbouring keys the sum."""
    starts = range(0, len(weights), factor)
    rows = [weights[start : start + factor][real[start : start + factor]] for start in starts]
    return np.array(
        [[row[:, start : start + factor].sum(1).mean() if len(row) else np.nan for start in starts] for row in rows]
    )


def head_axis(asked: Asked) -> str:
    return "kv_head" if "kv_head" in asked.a.labels[asked.statistic].dims else "head"


def of_heads(asked: Asked) -> np.ndarray:
    """The statistic in the row, (layer, head, token)."""
    values = asked.a[asked.statistic][:, asked.batch]
    return values if asked.segment is None else values[..., asked.a.segments.index(asked.segment)]


def by_labels(values: np.ndarray, asked: Asked) -> dict[tuple[str, str], float]:
    """Numbers (layer, head) by the indices as they are written on axes."""
    heads = asked.a.heads if head_axis(asked) == "head" else range(values.shape[1])
    return {
        (str(layer), str(head)): values[i, j] for i, layer in enumerate(asked.a.layers) for j, head in enumerate(heads)
    }


def read_grid(axes, expected: dict[tuple[str, str], float], asked: Asked):
    found = grid_of(axes)
    assert found.keys() == expected.keys()
    close([found[key] for key in expected], list(expected.values()))
    name = "KV head" if head_axis(asked) == "kv_head" else "head"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (name + below(asked), "layer")


def read_no_data(figure, complete: bool):
    """Grey is explained where there is some."""
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert texts == ([] if complete else ["no data"])


def head_grid(figure, asked):
    read_grid(figure.axes[0], by_labels(average(of_heads(asked)), asked), asked)
    assert bar_of(figure) == with_unit(asked)
    read_title(figure.axes[0].get_title(), f"{headline(asked)}, mean over tokens{part_of(asked)}", asked)
    read_no_data(figure, np.isfinite(average(of_heads(asked))).all())


def head_comparison(figure, asked):
    """Of texts whose tokens are all in common."""
    numbers = [run[asked.statistic].transpose(1, 2).flatten(2).double().numpy() for run in (asked.a, asked.b)]
    both = np.isfinite(numbers[0]) & np.isfinite(numbers[1])
    first, second = (average(np.where(both, each, np.nan)) for each in numbers)
    read_grid(figure.axes[0], by_labels(second - first, asked), asked)
    assert bar_of(figure) == f"difference in {with_unit(asked).replace(' [', ', b − a [')}"
    title = squeezed(figure.axes[0].get_title())
    assert title.startswith(squeezed(f"{headline(asked)}, b − a, mean over tokens{part_of(asked)}"))
    read_no_data(figure, np.isfinite(second - first).all())


def head_roles(figure, asked):
    axes = figure.axes[0]
    frame = classify_heads(asked.a.select(batch=asked.batch), asked.query_slice).set_index(["layer", "head"])
    (image,) = axes.images
    found = grid_of(axes)
    colours = {cell: to_hex(image.cmap(image.norm(value))) for cell, value in found.items() if np.isfinite(value)}
    legend = figure.legends[0]
    roles = {
        to_hex(patch.get_facecolor()): text.get_text().partition(":")
        for patch, text in zip(legend.get_patches(), legend.get_texts(), strict=True)
    }
    assert len(roles) == len(legend.get_patches()), "no colour stands for two roles"
    assert len(found) == len(frame)
    assert any("no data" in role for role in roles.values()) == bool(frame.role.isna().any())
    shown = {
        (labels(axes.yaxis)[y], labels(axes.xaxis)[x]): text.get_text()
        for text in axes.texts
        for x, y in [text.get_position()]
    }
    scored = {}
    for (layer, head), line in frame.iterrows():
        if not isinstance(line.role, str):
            assert (str(layer), str(head)) not in colours
            continue
        name, _, count = roles[colours[str(layer), str(head)]]
        assert name == line.role.replace("_", " ")
        assert int(count) == (frame.role == line.role).sum()
        if np.isfinite(line.score):
            scored[str(layer), str(head)] = f"{100 * line.score:.0f}"
    assert shown == scored
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"head{below(asked)}", "layer")
    chosen = asked.query_slice
    ends = [] if chosen is None else [chosen.start, chosen.stop, *([chosen.step] if chosen.step is not None else [])]
    queries = f", queries {':'.join('' if end is None else str(end) for end in ends)}" if ends else ""
    read_title(axes.get_title(), f"Role of each head (score × 100){queries}{part_of(asked)}", asked)


def layer_profile(figure, asked):
    axes, dims = figure.axes[0], asked.a.labels[asked.statistic].dims
    of_states = dims[0] == "hidden_layer"
    layers = asked.a.hidden_layers if of_states else asked.a.layers
    heads = {"head", "kv_head"} & {*dims}
    values = of_heads(asked).double().numpy()
    # Of each head, or of each token where there are no heads.
    each = average(values) if heads and values.ndim > 2 else values.reshape(len(layers), -1)
    each = each[np.argsort(layers)]
    layers = sorted(layers)
    mean = average(each)
    (line,) = axes.lines
    close(line.get_xydata(), np.stack([layers, mean], 1))
    bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    if heads or {"query", "key"} & {*dims}:
        rows = [row[np.isfinite(row)] for row in each]
        low, high, std = (
            np.array([of(row) if row.size else np.nan for row in rows]) for of in (np.min, np.max, np.std)
        )
        limits = ((low, high), (np.maximum(mean - std, low), np.minimum(mean + std, high)))
        for band, (under, above) in zip(bands, limits, strict=True):
            read_band(band, layers, under, above)
        count = asked.a.heads if "head" in heads else range(each.shape[1])
        spread = spelled("head" if "head" in heads else "KV head", count) if heads else "tokens"
        assert texts == [f"smallest to largest of {spread}", "± standard deviation", f"mean over {spread}"]
    else:
        assert not bands
        assert texts == [shown_name(asked.statistic)]
    assert axes.get_ylabel() == with_unit(asked)
    assert axes.get_xlabel() == f"layer{', the last is the output' if of_states else ''}{below(asked)}"
    read_title(axes.get_title(), f"{headline(asked)} through the layers{part_of(asked)}", asked)
    assert ("no data" in [text.get_text() for text in axes.texts]) == (not np.isfinite(mean).any())


def distance_histogram(figure, asked):
    axes = figure.axes[0]
    names = labels(axes.xaxis)
    bars = {names[round(bar.get_x() + bar.get_width() / 2, 6)]: bar.get_height() for bar in axes.patches}
    last = asked.a.num_keys - 1
    starts = [2**b - 1 for b in range(asked.a.num_keys.bit_length())]
    ends = [min(2 * start, last) for start in starts]
    assert list(bars) == [f"{a}–{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    close(list(bars.values()), asked.at("distance_histogram"))
    assert all(bar.get_y() == 0 for bar in axes.patches)
    assert len(axes.lines) == (0 if asked.head is not None else len(asked.a.heads))
    for line, head in zip(axes.lines, asked.a.heads, strict=False):
        close(line.get_xydata(), np.stack([list(names), replace(asked, head=head).at("distance_histogram")], 1))
    assert axes.get_ylabel() == "attention [probability]"
    assert axes.get_xlabel() == "distance from query to key [tokens]"
    read_title(axes.get_title(), f"Attention by distance, {words(asked)}", asked)
    read_baseline(axes, asked)


def read_baseline(axes, asked):
    """Uniform attention: of every query the share of its keys in each bin, then the mean over queries."""
    sees = asked.sees[asked.a.layers.index(asked.layer)]
    bins = asked.a.num_keys.bit_length()
    shares = [
        np.bincount([(abs(i - j) + 1).bit_length() - 1 for j in np.flatnonzero(row).tolist()], minlength=bins)
        / row.sum()
        for i, row in enumerate(sees)
        if row.any()
    ]
    dashes = [each for each in axes.collections if each.get_label() == "uniform attention"]
    # Windows among holes may not be known.
    assert len(dashes) == bool(shares) or asked.pairs is not None
    for each in dashes:
        close([segment[0, 1] for segment in each.get_segments()], np.mean(shares, 0))


STRIP = ("received", "sink_mass", "hidden_norm", "key_norm", "value_norm")


def token_strip(figure, asked):
    statistics = asked.statistics or STRIP
    assert len(figure.axes) == len(statistics)
    for name, axes in zip(statistics, figure.axes, strict=True):
        label = asked.a.labels[name]
        segment = f"\n{of_segment(asked).strip()}" if "segment" in label.dims else ""
        assert axes.get_ylabel() == f"{shown_name(name)}{segment}\n[{label.unit}]"
        values = asked.at(name)
        values = values.mean(0) if values.ndim == 2 else values
        if label.unit == "probability":
            (steps,) = axes.patches
            heights, edges, baseline = steps.get_data()
            close(heights, values)
            np.testing.assert_allclose((edges[1:] + edges[:-1]) / 2, asked.positions)
            assert baseline == 0
        else:
            (line,) = axes.lines
            close(line.get_ydata(), values)
            assert line.get_xdata().tolist() == asked.positions
        assert ("no data" in [text.get_text() for text in axes.texts]) == (not np.isfinite(values).any())
    read_tokens(figure.axes[-1].xaxis, asked, MOST_TOKENS)
    assert figure.axes[-1].get_xlabel() == "position [token]"
    read_title(figure.get_suptitle(), f"Along the text, {words(asked)}", asked)


def massive_activations(figure, asked):
    left, right = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    cells, x, y = heat(left)
    top, channels, median = (
        asked.a[name][:, asked.batch].double().numpy()
        for name in ("hidden_top", "hidden_top_channel", "hidden_layer_median")
    )
    order = np.argsort(asked.a.hidden_layers)
    top, channels, median = top[order], channels[order], median[order]
    largest = top[..., 0]
    close(cells, largest)
    np.testing.assert_allclose(x, asked.positions)
    layers = [labels(left.yaxis)[place] for place in y]
    assert layers == [str(layer) for layer in sorted(asked.a.hidden_layers)]
    bound = np.maximum(100, 1000 * median)
    expected = [
        (row, token, int(channels[row, token, rank]))
        for row, token, rank in np.argwhere(top > bound[:, None, None]).tolist()
    ]
    # Each colour is a channel, and those beyond the colours have one mark.
    of_channel = {line.get_label().removeprefix("massive, "): line for line in left.lines}
    other = of_channel.pop("other channels", None)
    found = {
        (row, token, int(name.removeprefix("channel ")))
        for name, line in of_channel.items()
        for token, row in line.get_xydata().tolist()
    }
    coloured = {channel for *_, channel in found}
    assert found == {each for each in expected if each[2] in coloured}
    others = {(token, row) for row, token, channel in expected if channel not in coloured}
    assert (set() if other is None else {*map(tuple, other.get_xydata().tolist())}) == others
    assert not others or len(of_channel) == len(CHANNEL_COLOURS)
    assert len({line.get_markerfacecolor() for line in of_channel.values()}) == len(of_channel)
    curves = {line.get_label(): line.get_xydata() for line in right.lines}
    for name, values in (
        ("largest", np.where(np.isfinite(largest).any(1), np.nan_to_num(largest, nan=-np.inf).max(1), np.nan)),
        ("median", median),
        ("massive beyond", bound),
    ):
        close(curves[name], np.stack([values, y], 1))
    text = (
        f"Largest magnitude in the residual stream that enters each layer (the last row is the output){part_of(asked)}"
    )
    read_title(figure.get_suptitle(), text, asked)
    assert right.get_ylim() == left.get_ylim()
    assert bar_of(figure) == "largest magnitude [activation]"
    assert right.get_xlabel() == "magnitude [activation]"
    assert (left.get_xlabel(), left.get_ylabel()) == (f"position [token]{below(asked)}", "layer")
    read_tokens(left.xaxis, asked, MOST_TOKENS)


def read_lines(axes, expected, asked):
    for line, values in zip(axes.lines, expected, strict=True):
        close(line.get_ydata(), values)
        assert line.get_xdata().tolist() == asked.positions
    assert axes.get_ylabel() == "L2 norm [activation]"
    assert axes.get_xlabel() == "position [token]"
    read_tokens(axes.xaxis, asked, MOST_TOKENS)
    where = "after the last layer" if asked.layer == asked.a.num_layers else f"entering layer {asked.layer}"
    of_states = len(axes.lines) == 1
    read_title(
        axes.get_title(), f"Residual stream {where}" if of_states else f"Keys and values, layer {asked.layer}", asked
    )
    assert ("no data" in [text.get_text() for text in axes.texts]) == (not np.isfinite(list(expected)).any())


def hidden_norms(figure, asked):
    read_lines(figure.axes[0], [asked.at("hidden_norm")], asked)


def kv_norms(figure, asked):
    expected = {
        f"{name}: {of}": values
        for name in ("key", "value")
        for of, values in (
            ("mean of norms", asked.at(f"{name}_norm").mean(0)),
            ("norm of mean", asked.at(f"{name}_mean_norm")),
        )
    }
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == list(expected)
    read_lines(figure.axes[0], expected.values(), asked)
    for name in ("key", "value"):
        colours = {lines[label].get_color() for label in lines if label.startswith(name)}
        assert len(colours) == 1


def rows(figure, asked):
    axes, real, positions = figure.axes[0], asked.real, np.array(asked.positions)
    weights = asked.at("row_weights")
    row = asked.a.rows[-1] if asked.row is None else asked.row
    weights = weights[asked.a.rows.index(row)]
    places = np.flatnonzero(real & ((positions <= row) | (np.nan_to_num(weights) > 0)))
    counts = real & (np.cumsum(real) > (asked.a.config.sink_tokens if asked.sink is False else 0))
    shown = np.where(counts, weights, np.nan)[places]
    shades, frame = (each for each in axes.collections if isinstance(each, PatchCollection))
    close(shades.get_array().filled(np.nan), shown)
    read_colours(shades, shown, replace(asked, kind="weights", scale=None))
    # Spaces are seen by the shade, and a token without letters has one too.
    strings = None if asked.a.tokens is None else [drawable(str(token)) for token in asked.a.tokens[asked.batch]]
    letters = [f"{at} " if strings is None else strings[at].replace("␣", " ") or " " for at in places]
    assert [text.get_text() for text in axes.texts] == letters
    assert not any(text.get_parse_math() for text in axes.texts)
    widths = [path.get_extents().width for path in shades.get_paths()]
    assert widths == [len(text) for text in letters]
    lefts = [path.get_extents().x0 for path in shades.get_paths()]
    assert lefts == [text.get_position()[0] for text in axes.texts], "letters stand on their shade"
    assert [path.get_extents().x0 for path in frame.get_paths()] == [
        lefts[n] for n, at in enumerate(places) if at == row
    ]
    named = "" if strings is None else f" “{strings[row]}”"
    sink = ", without the sink" if asked.sink is False else ""
    read_title(axes.get_title(), f"Attention of the token{named} at {row}, {words(asked)}{sink}", asked)
    layers = slice(None) if asked.layer is None else [asked.a.layers.index(asked.layer)]
    counts = asked.sees[layers, row].sum(-1)
    even = f"; uniform: {np.mean(1 / counts[counts > 0]):.2g}" if counts.any() else ""
    assert bar_of(figure) == f"attention weight [probability]\nsquare-root scale{even}"
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert legends == ([] if np.isfinite(weights).any() else ["no data"])


def sources(figure, asked):
    axes, a = figure.axes[0], asked.a
    names = a.segments
    of_keys = np.array([names[at] if at >= 0 else None for at in a["key_segment"][asked.batch].tolist()])
    first = int((of_keys == "generated").argmax())
    queries = np.arange(first - 1, len(of_keys))
    sinks = asked.real & (np.cumsum(asked.real) <= a.config.sink_tokens)
    heads = dict.fromkeys(a.layers, a.heads) if asked.heads is None else asked.heads
    chosen = np.array([[layer in heads and head in heads[layer] for head in a.heads] for layer in a.layers])
    mass, sink, learned = (
        a[name][:, asked.batch, :, queries].double().numpy()
        for name in ("segment_mass", "sink_mass", "learned_sink_mass")
    )
    of_sink = sink[..., None] * [name in of_keys[sinks] for name in names]
    if {*queries} <= {*a.rows}:
        rows = a["row_weights"][:, asked.batch, :, [a.rows.index(query) for query in queries]].double().numpy()
        of_sink = np.stack([rows[..., sinks & (of_keys == name)].sum(-1) for name in names], -1)
        sink = rows[..., sinks].sum(-1)

    def of_chosen(values):
        return average(values[chosen], 0)

    rest = 1 - of_chosen(sink + learned)
    # Of a query that sees the sink alone, as the only token before the answer does, nothing is left.
    shares = of_chosen(np.maximum(mass - of_sink, 0)) / np.where(rest > 1e-6, rest, np.nan)[:, None]
    count = chosen.sum(1) / chosen.sum()
    seen = np.stack([(asked.sees[:, queries] & (of_keys == name)).sum(-1) for name in names], -1)
    left = np.stack([(asked.sees[:, queries] & ~sinks & (of_keys == name)).sum(-1) for name in names], -1)
    among, others = (asked.sees[:, queries] & keys for keys in (True, ~sinks))
    if asked.sink:
        shares, left, others = of_chosen(mass), seen, among
    with np.errstate(invalid="ignore"):
        uniform = np.tensordot(count, left, 1) / np.tensordot(count, others.sum(-1), 1)[:, None]
    kept = np.tensordot(count, among.sum(-1), 1) > 0
    shares, uniform, queries = shares[kept], uniform[kept], queries[kept]
    empty = np.isnan(shares).all(1)
    heights = [[patch.get_height() for patch in container] for container in axes.containers]
    assert len(heights) == 2 * len(names) + empty.any()
    bars, beside = heights[: 2 * len(names) : 2], heights[1 : 2 * len(names) : 2]
    close(np.transpose(bars), np.nan_to_num(shares))
    grey = [patch.get_x() + patch.get_width() / 2 for each in axes.containers[2 * len(names) :] for patch in each]
    close(grey, np.flatnonzero(empty))
    means, of_uniform = average(shares, 0), average(uniform, 0)
    close(beside, np.nan_to_num(np.stack([means, of_uniform], -1)))
    ticks = labels(axes.xaxis)
    # The last token was never fed back, and so only its place is known.
    strings = (
        {}
        if a.tokens is None
        else {at: drawable(str(token)) for at, token in enumerate(a.tokens[asked.batch]) if asked.real[at]}
    )
    known = any(at + 1 in strings for at in queries)
    tokens = [strings.get(at + 1, f"[{at + 1}]") for at in queries] if known else [str(at + 1) for at in queries]
    step = 1 if known else -(-len(tokens) // 20)
    assert list(ticks.values()) == [*tokens[::step], "mean", "uniform"]
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    for name, share, even, text in zip(names, means, of_uniform, legend[::-1], strict=False):
        shown = "no data" if np.isnan(share) else percent(share)
        assert text == f"{written(name)}: {shown} (uniform {percent(even)})"
    assert len(legend) == len(names) + empty.any()
    assert ("no data" in legend) == empty.any()
    which = [f"{layer}.{head}" for layer, some in heads.items() for head in some]
    more = f" and {len(which) - 8} more" if len(which) > 8 else ""
    whose = f"mean over {spelled('head', a.heads)}{part_of(asked)}"
    if asked.heads is not None:
        whose = f"head{'s' if len(which) > 1 else ''} {', '.join(which[:8])}{more}"
    assert axes.get_ylabel() == f"attention [probability]\n{'sink included' if asked.sink else 'without the sink'}"
    assert axes.get_xlabel() == "generated token"
    read_title(axes.get_title(), f"What the answer draws on, {whose}", asked)


def coverage(figure, asked):
    """The bounds themselves are checked against weights elsewhere."""
    shares = asked.mass or (0.5, 0.9, 0.95, 0.99)
    axes, bounds = figure.axes[0], coverage_of(asked.a, shares).sortby("layer")
    layers = bounds["layer"].values
    along = layers if len(layers) > 1 else layers + np.array([-0.3, 0.3])
    solid, dashed = axes.lines[::2], axes.lines[1::2]
    bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
    for at in range(len(shares)):
        least, most = (bounds[name][..., at].mean("head").values for name in ("least", "most"))
        close(solid[at].get_xydata(), np.stack([layers, np.sqrt(least * most)], -1))
        uniform = bounds.uniform.isel(mass=at).values + 0 * layers
        close(dashed[at].get_xydata(), np.stack([along, uniform[np.arange(len(along)) % len(layers)]], -1))
        assert np.ptp(dashed[at].get_xdata()) > 0, "it is seen, also of one layer"
        repeated = np.arange(len(along)) % len(layers)
        few, many = bounds.least[..., at].min("head").values, bounds.most[..., at].max("head").values
        read_band(bands[2 * at], along, few[repeated], many[repeated])
        read_band(bands[2 * at + 1], along, least[repeated], most[repeated])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*(f"{share:.4g}" for share in shares), "uniform attention"]
    assert [text.get_text() for text in axes.texts] == ([] if bounds.most.notnull().any() else ["no data"])
    heads = spelled("head", asked.a.heads)
    assert axes.get_xlabel() == f"layer{below(asked)}"
    assert axes.get_ylabel() == f"keys per query\nmean over {heads}, fewest to most in light colour"
    assert squeezed(axes.get_title()).startswith(squeezed(f"Keys that hold a share of the attention{part_of(asked)}"))


def read_band(band, xs, under, above):
    """Lower and upper end at each place, none where there is no data."""
    corners = np.concatenate([np.empty((0, 2)), *(path.vertices for path in band.get_paths())])
    for x, *ends in zip(xs, under, above, strict=True):
        there = corners[corners[:, 0] == x][:, 1]
        close([there.min(), there.max()] if there.size else [np.nan] * 2, ends)


def percent(share: float) -> str:
    """Without what is behind the point; what is not nothing is not 0 %, and what is not all is not 100 %."""
    if np.isnan(share):
        return "–"
    return "<1%" if 1e-6 < share < 0.005 else ">99%" if 0.995 <= share < 1 - 1e-6 else f"{share:.0%}"


def of_own_text(read):
    """A figure of one row shows its own text alone; `head_comparison` is of all rows."""

    def of_row(figure, asked):
        first, stop = own_ends(asked.a, asked.batch)
        pairs = None if asked.pairs is None else asked.pairs[..., first:stop, first:stop]
        runs = {"a": own_text(asked.a, asked.batch), "b": own_text(asked.b, asked.batch)}
        read(figure, replace(asked, pairs=pairs, **runs))

    return read if read in (head_comparison, coverage) else of_row


READ_BACK = {
    f"plot_{read.__name__}": of_own_text(read)
    for read in (
        attention_map, comparison, distance_histogram, head_comparison, head_grid, head_roles, hidden_norms, kv_norms,
        layer_heads, layer_profile, massive_activations, model_view, token_strip, rows, sources, coverage,
    )
}  # fmt: skip


def drawn(name: str, asked: Asked):
    """The figure that the function makes of what was asked."""
    function = getattr(viz, name)
    known = inspect.signature(function).parameters
    sources = (asked.a, asked.b) if "a" in known else (asked.a,)
    return function(*sources, **options_of(name, asked))


def options_of(name: str, asked: Asked) -> dict[str, object]:
    """What the function takes; of most options None is what it does if it is not asked."""
    given = {field.name: getattr(asked, field.name) for field in fields(asked) if takes(name, field.name)}
    left_out = {key for key, value in given.items() if value is None and key not in ("layer", "head", "query_slice")}
    return {key: value for key, value in given.items() if key not in left_out | {"a", "b"}}


def takes(name: str, parameter: str) -> bool:
    return parameter in inspect.signature(getattr(viz, name)).parameters
