"""Rows, sources and coverage, read back from their artists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from asked import (
    average,
    bar_label,
    bar_of,
    below,
    close,
    labels,
    part_of,
    read_band,
    read_colours,
    read_title,
    spelled,
    squeezed,
    words,
)
from matplotlib.collections import PatchCollection, PolyCollection
from own_text import own_ends
from PIL.Image import Image
from prompt_pictures import brightness, rows_of_prompt

from llama_attn.analysis import coverage as coverage_of
from llama_attn.viz.style import drawable, written


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

    # A head of which one of both is not known is left out of both.
    known = ~np.isnan(sink + learned + mass.sum(-1))
    rest = 1 - of_chosen(np.where(known, sink + learned, np.nan))
    # Of a query that sees the sink alone, as the only token before the answer does, nothing is left.
    of_rest = of_chosen(np.where(known[..., None], np.maximum(mass - of_sink, 0), np.nan))
    shares = of_rest / np.where(rest > 1e-6, rest, np.nan)[:, None]
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


def image_rows(figure, asked):
    """Of the run as it is: images are counted with the padding."""
    axes, a, batch = figure.axes[0], asked.a, asked.batch
    first, _ = own_ends(a, batch)
    known = rows_of_prompt(a, asked.segments, batch, asked.layer)
    row = known[-1] if asked.row is None else asked.row
    span = asked.segments.images[batch][asked.image_index]
    weights = asked.at("row_weights")[a.rows.index(row + first), span.first : span.stop]
    below, above = axes.images
    grey = brightness(asked.image)
    # PIL rounds to whole steps of 255.
    np.testing.assert_allclose(below.get_array(), grey, atol=1.01 / 255 if isinstance(asked.image, Image) else 1e-12)
    assert below.get_extent() == above.get_extent() == [-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, grey.shape[1] - 0.5), (grey.shape[0] - 0.5, -0.5))
    close(above.get_array().filled(np.nan), weights.reshape(span.grid))
    of_weights = replace(asked, kind="weights")
    read_colours(above, weights, of_weights)
    assert bar_of(figure) == bar_label(of_weights)
    assert axes.get_xlabel() == f"{span.grid[1]} × {span.grid[0]} tokens"
    named = "" if a.tokens is None else f" “{drawable(str(a.tokens[batch][row + first]))}”"
    number = len(asked.segments.images[batch])
    gets = percent(float(weights.sum()), 1)
    whole = f"image {asked.image_index} of {number}, which gets {gets} of it"
    read_title(axes.get_title(), f"Attention of the token{named} at {row} to {whole}, {words(asked)}", asked)


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


def percent(share: float, digits: int = 0) -> str:
    """Rounded; what is not nothing is not 0 %, and what is not all is not 100 %."""
    if np.isnan(share):
        return "–"
    least = 10.0 ** -(digits + 2)
    if 1e-6 < share < least / 2:
        return f"<{least:.{digits}%}"
    return f">{1 - least:.{digits}%}" if 1 - least / 2 <= share < 1 - 1e-6 else f"{share:.{digits}%}"
