"""Figures of tables, with any tables: what would be drawn, read from its artists."""

from __future__ import annotations

import re

import numpy as np
import pandas
import pytest
from asked import average, close, grid_of, heat, labels
from figure_state import check_artists, state_of
from hypothesis import Phase, given, settings, strategies as st
from matplotlib.figure import Figure
from random_runs import MODELS

from llama_attn.viz import plot_ablation, plot_budget

ANY = settings(max_examples=settings.default.max_examples // 2, phases=[Phase.generate])
LOSSES = st.floats(-20, 20, width=32) | st.sampled_from([0.0, np.nan])
SHARES = st.floats(0, 1, width=32) | st.just(np.nan)
NAMES = st.fixed_dictionaries({}, optional={"model": st.sampled_from(MODELS), "text": st.sampled_from(MODELS)})


def numbers(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 40), min_size=1, max_size=most, unique=True)


@st.composite
def ablations(draw) -> pandas.DataFrame:
    """Some heads, in any order; all of the same layers and heads, or a few of them missing."""
    pairs = [(layer, head) for layer in draw(numbers(5)) for head in draw(numbers(5))]
    tried = draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=len(pairs), unique=True))
    lines = [(layer, head, draw(LOSSES), draw(LOSSES)) for layer, head in tried]
    frame = pandas.DataFrame(lines, columns=["layer", "head", "loss", "change"])
    about = {"loss": st.floats(0, 9), "mode": st.sampled_from(["zero", "mean"])}
    frame.attrs = draw(NAMES) | draw(st.fixed_dictionaries({}, optional=about))
    return frame


@st.composite
def budgets(draw) -> pandas.DataFrame:
    """Every policy with every budget, each with the same loss in all layers; in any order."""
    policies = draw(st.lists(st.sampled_from(["h2o", "window", "$x$_^{", "a\nb"]), min_size=1, unique=True))
    sizes, layers = [size + 1 for size in draw(numbers(4))], draw(numbers(6))
    lines = [
        (policy, size, layer, draw(SHARES), loss)
        for policy in policies
        for size in sizes
        for loss in [draw(LOSSES)]
        for layer in layers
    ]
    frame = pandas.DataFrame(draw(st.permutations(lines)), columns=["policy", "budget", "layer", "kept", "loss"])
    frame.attrs = draw(NAMES) | draw(st.fixed_dictionaries({}, optional={"full_loss": st.floats(0, 9)}))
    return frame


def drawn(function, frame: pandas.DataFrame) -> Figure:
    """The figure, the same whenever it is drawn; the table is as it was."""
    before = frame.copy(deep=True)
    figure = function(frame)
    assert repr(state_of(function(frame))) == repr(state_of(figure))
    pandas.testing.assert_frame_equal(frame, before)
    assert frame.attrs == before.attrs
    check_artists(figure)
    return figure


@ANY
@given(ablations())
def test_ablation(frame):
    figure = drawn(plot_ablation, frame)
    (image,) = figure.axes[0].images
    cells, rows, columns = grid_of(figure.axes[0]), {*frame.layer.map(str)}, {*frame["head"].map(str)}
    assert cells.keys() == {(row, column) for row in rows for column in columns}
    change = {(str(line.layer), str(line.head)): line.change for line in frame.itertuples()}
    for place, cell in cells.items():
        close(cell, change.get(place, np.nan))
    known = np.abs(frame.change[np.isfinite(frame.change)])
    assert image.norm.vmax == -image.norm.vmin == (known.max() if known.any() else 1.0)
    red, *_, blue = image.cmap([1.0, 0.0])[:, [0, 2]].tolist()
    assert red[0] > red[1], "a loss that rises is red"
    assert blue[0] < blue[1]
    done = "replaced by its mean" if frame.attrs.get("mode") == "mean" else "silenced"
    title = figure.axes[0].get_title()
    assert title.startswith(f"Loss with one head {done}")
    loss = frame.attrs.get("loss")
    assert ("with all heads" in title) == (loss is not None)
    assert loss is None or f"loss {loss:.3f} nat" in " ".join(title.split())


@ANY
@given(budgets())
def test_budget(frame):
    figure = drawn(plot_budget, frame)
    kept_axes, loss_axes, *maps = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    policies, sizes = list(dict.fromkeys(frame.policy)), sorted({*frame.budget})
    assert len(maps) == len(policies)
    full = frame.attrs.get("full_loss")
    ranges = kept_axes.collections
    assert len(ranges) == len(policies)
    aside = []
    for at, (policy, axes) in enumerate(zip(policies, maps, strict=True)):
        lines = frame[frame.policy == policy]
        kept = np.array([lines[lines.budget == size].sort_values("layer").kept for size in sizes])
        colours = {line.get_color() for line in (kept_axes.lines[at], loss_axes.lines[at])}
        assert len(colours) == 1
        close(kept_axes.lines[at].get_ydata(), average(kept))
        places = kept_axes.lines[at].get_xdata()
        # Each stands nearest to its own budget, on the logarithmic axis.
        near = np.abs(np.log2(places)[:, None] - np.log2(sizes)).argmin(1)
        assert near.tolist() == [*range(len(sizes))]
        aside.append(places)
        close(loss_axes.lines[at].get_xdata(), sizes)
        close(loss_axes.lines[at].get_ydata(), [lines.loss[lines.budget == size].iloc[0] for size in sizes])
        known = np.isfinite(kept).any(1)
        drawn_ranges = [(x[0], *y) for x, y in (np.transpose(each) for each in ranges[at].get_segments() if len(each))]
        ends = [
            (place, np.nanmin(each), np.nanmax(each)) for place, each in zip(places[known], kept[known], strict=True)
        ]
        close(np.reshape(drawn_ranges, (-1, 3)), np.reshape(ends, (-1, 3)))
        cells, _, y = heat(axes, origin="lower")
        close(cells, kept.T)
        assert list(labels(axes.xaxis).values()) == [f"{size:,}" for size in sizes]
        assert [labels(axes.yaxis)[place] for place in y] == [str(layer) for layer in sorted({*frame.layer})]
        assert axes.images[0].get_clim() == (0, 1)
    assert (np.diff(aside, axis=0) > 0).all(), "policies stand beside each other, in their order"
    assert len(kept_axes.lines) == len(policies)
    assert len(loss_axes.lines) == len(policies) + (full is not None)
    assert full is None or {*loss_axes.lines[-1].get_ydata()} == {full}


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M-Instruct", "/home/me/SmolLM2-135M-Instruct/"])
@pytest.mark.parametrize("function", [plot_ablation, plot_budget])
def test_titles_name_the_model(function, model):
    frame = pandas.DataFrame(
        {"policy": "h2o", "budget": [1], "layer": 0, "head": 0, "kept": 0.5, "loss": 1.0, "change": 0.0}
    )
    frame.attrs = {"model": model, "text": "a text"}
    figure = drawn(function, frame)
    title = figure.get_suptitle() or figure.axes[0].get_title()
    shown = model if model[0] != "/" else "SmolLM2-135M-Instruct"
    assert f"\n{shown}, a text" in title


@pytest.mark.parametrize("function", [plot_ablation, plot_budget])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda frame: frame.drop(columns="layer"), ValueError, "without ['layer']"),
        (lambda frame: frame[:0], ValueError, "at least one line"),
        (lambda frame: pandas.concat([frame, frame[:1]]), ValueError, "layer 2"),
        (lambda frame: "ablation.csv", TypeError, "pandas.read_csv"),
    ],
)
def test_tables_that_are_none(function, change, error, message, monkeypatch):
    columns = {
        "policy": ["h2o"],
        "budget": [4],
        "head": [1],
        "layer": [2],
        "kept": [0.5],
        "loss": [3.0],
        "change": [0.1],
    }
    monkeypatch.setattr(Figure, "__init__", lambda *_, **__: pytest.fail("a figure was made"))
    with pytest.raises(error, match=re.escape(message)):
        function(change(pandas.DataFrame(columns)))
