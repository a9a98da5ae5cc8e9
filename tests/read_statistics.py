"""Statistics of heads, layers and tokens, read back from the artists of their figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from asked import (
    Asked,
    average,
    bar_of,
    below,
    close,
    grid_of,
    headline,
    heat,
    labels,
    of_segment,
    part_of,
    read_band,
    read_title,
    read_tokens,
    shown_name,
    spelled,
    squeezed,
    with_unit,
    words,
)
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from llama_attn.analysis import classify_heads
from llama_attn.viz.figures.activations import CHANNEL_COLOURS
from llama_attn.viz.figures.along import MOST_TOKENS


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
