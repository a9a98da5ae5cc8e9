"""Maps of attention, read back from their artists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from asked import (
    bar_label,
    bar_of,
    close,
    heat,
    labels,
    part_of,
    read_beyond,
    read_colours,
    read_title,
    read_tokens,
    words,
)


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
    (with_bar,) = [axes.images[0] for axes in panels.values() if axes.images[0].colorbar is not None]
    read_beyond(with_bar, everything)
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
