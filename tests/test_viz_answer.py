"""Pictures of an answer: what is written of long texts, what is left out, and what cannot be drawn."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from test_answer import NEW, PROMPT, Run

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import sources
from llama_attn.viz import plot_coverage, plot_rows, plot_sources
from llama_attn.viz.figures.rows import MOST_TOKENS
from llama_attn.viz.style import NO_DATA


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture(scope="module")
def long():
    """1,500 tokens, of which some in the middle get nearly all."""
    ids = torch.randint(3, 97, (1, 1500), generator=torch.Generator().manual_seed(0))
    config = AttentionStatsConfig(statistics="entropy", rows=(1200, -1))
    with torch.no_grad():
        model = tiny_model(max_position_embeddings=2048)
        stats = model(ids, output_attention_stats=config).attention_stats
    weights = torch.full((1500,), 1e-5)
    weights[[700, 703, 900]] = 0.3
    stats["row_weights"][:, 0, :, -1] = weights
    return replace(stats, tokens=[[f"Ġt{at}" for at in range(1500)]])


def shades(figure):
    return shades_in(figure.axes[0])


def shades_in(axes):
    return next(each for each in axes.collections if isinstance(each, PatchCollection))


def test_long_texts_are_written_where_they_are_attended(long):
    figure = plot_rows(long)
    written = [text.get_text() for text in figure.axes[0].texts]
    tokens = [text for text in written if not text.startswith(" […")]
    gaps = [re.fullmatch(r" \[…([\d,]+) tokens: ([\d.]+)%…\] ", text) for text in written if text.startswith(" […")]
    assert len(tokens) <= MOST_TOKENS
    assert {" t0", " t695", " t700", " t703", " t710", " t895", " t900", " t1499"} <= set(tokens)
    assert len(tokens) + sum(int(gap[1].replace(",", "")) for gap in gaps) == 1500, "every token is written or counted"
    values = shades(figure).get_array()
    assert values.mask.sum() == len(gaps)
    # What the gaps say they get is what is not written.
    left_out = sum(float(gap[2]) for gap in gaps) / 100
    assert left_out == pytest.approx(
        float(long["row_weights"][0, 0, 0, -1].sum()) - values.sum(), abs=0.001 * len(gaps)
    )
    lines = {text.get_position()[1] for text in figure.axes[0].texts}
    ends = {line: max(t.get_position()[0] + len(t.get_text()) for t in figure.axes[0].texts if t.get_position()[1] == line) for line in lines}  # fmt: skip
    assert max(ends.values()) <= figure.axes[0].get_xlim()[1], "no line runs over its end"


def test_a_query_within_the_text_sees_what_is_before_it(long):
    figure = plot_rows(long, row=1200, layer=1, head=2)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written[-1] == " t1200"
    assert "“␣t1200” at 1200, layer 1, head 2" in figure.axes[0].get_title()


def test_without_the_sink(run):
    with_sink, without = plot_rows(run.stats, batch=1), plot_rows(run.stats, batch=1, sink=False)
    found, left = shades(with_sink).get_array(), shades(without).get_array()
    assert not found.mask.any()
    assert left.mask.tolist() == [True] + [False] * (len(left) - 1)
    np.testing.assert_array_equal(found[1:], left[1:])
    assert shades(without).norm.vmax == left.max()
    assert "without the sink" in without.axes[0].get_title()
    mean = run.weights[:, 1, :, -1, 4:].mean((0, 1))
    np.testing.assert_allclose(found, mean, rtol=1e-6)
    bar = next(axes for axes in with_sink.axes if axes.get_label() == "<colorbar>")
    assert f"uniform: {1 / (PROMPT + NEW - 1 - 4):.2g}" in bar.get_ylabel()


def test_tokens_that_are_not_known_are_positions(run):
    figure = plot_rows(replace(run.stats, tokens=None), batch=0)
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{at} " for at in range(run.length)]
    bars = plot_sources(replace(run.stats, tokens=None))
    ticks = [tick.get_text() for tick in bars.axes[0].get_xticklabels()]
    assert ticks[:-2] == [str(at) for at in range(PROMPT, PROMPT + NEW)]


def test_line_breaks_stay(run):
    stats = replace(run.stats, tokens=[["a", "b\n", "c", *row[3:]] for row in run.stats.tokens])
    heights = [text.get_position()[1] for text in plot_rows(stats).axes[0].texts]
    assert heights[0] == heights[1] < heights[2]


def test_in_axes_of_ones_own(run, long):
    figure = Figure(figsize=(12, 4))
    left, middle, right = figure.subplots(1, 3)
    assert plot_rows(long, ax=left) is figure
    assert plot_sources(run.stats, ax=middle) is figure
    config = AttentionStatsConfig(statistics=("weight_count", "weight_mass"))
    with torch.no_grad():
        stats = tiny_model()(torch.randint(3, 97, (1, 20)), output_attention_stats=config).attention_stats
    assert plot_coverage(stats, mass=(0.5,), ax=right) is figure
    high = left.get_position().height * 4 * 72
    size = left.texts[0].get_fontsize()
    assert len({text.get_position()[1] for text in left.texts}) * size <= high, "letters are as small as they must be"
    for plot in (plot_rows, plot_sources):
        with pytest.raises(TypeError, match="ax: expected one matplotlib Axes"):
            plot(run.stats, ax=[left])


@pytest.mark.parametrize("layout", ["constrained", None])
def test_letters_stand_on_their_shade(layout, run):
    """Beside a colour bar too, which takes some of the axes' room."""
    figure = Figure(figsize=(14, 5), layout=layout)
    ax = figure.subfigures(1, 2)[1].subplots(1, 2)[0]
    plot_rows(run.stats, ax=ax)
    FigureCanvasAgg(figure).draw()
    for text, path in zip(ax.texts, shades_in(ax).get_paths(), strict=True):
        wide = path.get_extents().transformed(ax.transData).width
        assert text.get_window_extent().width < 1.1 * wide, text.get_text()


def test_of_a_short_text_the_colour_bar_can_be_read(run):
    figure = plot_rows(run.stats)
    FigureCanvasAgg(figure).draw()
    bar = next(axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    label = bar.yaxis.label.get_window_extent()
    assert figure.bbox.y0 <= label.y0 < label.y1 <= figure.bbox.y1


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("heads", [None, {1: [0, 4], 2: [3]}])
def test_bars_are_the_sources(heads, sink, run):
    figure = plot_sources(run.stats, heads=heads, sink=sink, batch=1)
    frame = sources(run.stats, heads=heads, batch=1)
    column = "share" if sink else "without_sink"
    axes = figure.axes[0]
    for name, bars in zip(run.stats.segments, axes.containers[::2], strict=True):
        lines = frame[(frame.segment == name) & (frame.position >= 0)]
        np.testing.assert_allclose([bar.get_height() for bar in bars], lines[column], rtol=1e-12)
    title = axes.get_title().replace("\n", " ")
    assert ("heads 1.0, 1.4, 2.3" if heads else "mean over heads 0–5") in title
    assert ("sink included" if sink else "without the sink") in axes.get_ylabel()


def test_a_token_without_data_is_grey(run):
    ds = run.ds.copy(deep=True)
    ds.segment_mass[:, 0, :, PROMPT + 1] = np.nan
    ds.row_weights[:, 0, :, 2] = np.nan
    figure = plot_sources(ds)
    grey = [
        patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == pytest.approx((0.902,) * 3, abs=0.01)
    ]
    assert NO_DATA == "#e6e6e6"
    assert [patch.get_x() + patch.get_width() / 2 for patch in grey] == [pytest.approx(2)]
    assert "no data" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ds: plot_rows(ds.drop_dims("row")), r'row_weights were not measured.*rows=\(-1,\)\) or rows="generated"'),
        (lambda ds: plot_rows(ds, row=3), r"row: 3 was not measured, or is padding; there are \[29, 30, 31"),
        (lambda ds: plot_rows(ds, layer=5), "layer: 5 was not measured"),
        (lambda ds: plot_rows(ds, head=6), "head: 6 was not measured"),
        (lambda ds: plot_rows(ds, batch=2), "batch: 2 was not measured"),
        (lambda ds: plot_sources(ds, batch=2), "batch: 2 was not measured"),
        (lambda ds: plot_sources(ds, heads={0: [9]}), "heads: expected some of"),
        (lambda ds: plot_sources(ds.drop_vars(["segment_mass", "key_segment"])), r"AttentionStatsConfig\(segments=…\)"),
        (lambda ds: plot_coverage(ds), r"\['weight_count', 'weight_mass'\] not measured"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn(call, message, run):
    with pytest.raises(ValueError, match=message):
        call(run.ds)


def test_coverage_of_padding_alone():
    config = AttentionStatsConfig(statistics=("weight_count", "weight_mass"))
    ids = torch.randint(3, 97, (1, 9))
    with torch.no_grad():
        stats = tiny_model()(ids, attention_mask=torch.zeros_like(ids), output_attention_stats=config).attention_stats
    figure = plot_coverage(stats)
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no data"]


def test_coverage_takes_as_many_shares_as_there_are_colours():
    config = AttentionStatsConfig(statistics=("weight_count", "weight_mass"))
    with torch.no_grad():
        stats = tiny_model()(torch.randint(3, 97, (1, 20)), output_attention_stats=config).attention_stats
    assert len(plot_coverage(stats, mass=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)).axes[0].lines) == 12
    with pytest.raises(ValueError, match="mass: expected at most 6 shares"):
        plot_coverage(stats, mass=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
