"""Figures of analysis: what is drawn is read back and compared with the statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CACHE, tiny_model
from matplotlib.colors import to_rgb
from test_viz import Tokenizer, image

from llama_attn import AttentionStatsConfig, viz
from llama_attn.analysis import classify_heads, compare, layer_evolution
from llama_attn.stats.token_text import readable
from llama_attn.viz import (
    plot_comparison,
    plot_distance_histogram,
    plot_head_comparison,
    plot_head_grid,
    plot_head_roles,
    plot_layer_heads,
    plot_layer_profile,
    plot_massive_activations,
    plot_model_view,
    plot_token_strip,
)
from llama_attn.viz.figures.grids import ROLE_COLOURS
from llama_attn.viz.style import drawable


def measure(ids, left_padding=None, seed=0, **settings):
    config = AttentionStatsConfig(**({"statistics": "all", "norms": True} | settings))
    with torch.no_grad():
        return tiny_model(seed=seed)(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats


@pytest.fixture
def stats(ids, left_padding):
    return measure(ids, left_padding)


def drawn(figure) -> np.ndarray:
    return image(figure).get_array().filled(np.nan)


def colour_bar_label(figure) -> str:
    (label,) = {axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes if axes.get_label() == "<colorbar>"}
    return label


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("statistic", ["entropy", "received", "key_norm", "value_output_norm"])
def test_head_grid(statistic, batch, stats):
    figure = plot_head_grid(stats, statistic=statistic, batch=batch)
    close(drawn(figure), np.nanmean(stats[statistic][:, batch].numpy(), axis=-1))
    assert stats.labels[statistic].unit in colour_bar_label(figure)
    assert figure.axes[0].get_xlabel() == ("KV head" if statistic == "key_norm" else "head")
    assert figure.axes[0].get_ylabel() == "layer"


def test_head_grid_sorts_layers_and_names_what_was_measured(ids):
    stats = measure(ids, layers=(2, 0), heads=(5, 1))
    figure = plot_head_grid(stats)
    close(drawn(figure), stats["entropy"][[1, 0], 0].mean(-1))
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "2"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "1"]


def test_head_roles(stats):
    ds = stats.to_xarray()
    ds["induction"][1, :, 3] = 0.8
    ds["sink_mass"][2, :, 5] = 0.9
    figure = plot_head_roles(ds, query_slice=slice(20, None), batch=1)
    frame = classify_heads(ds.isel(batch=[1]), slice(20, None))
    names = list(ROLE_COLOURS)
    expected = [[names.index(role) for role in frame[frame.layer == layer].role] for layer in range(3)]
    np.testing.assert_array_equal(drawn(figure), expected)
    assert expected[1][3] == names.index("induction")
    assert expected[2][5] == names.index("first_token_sink")
    assert {(text.get_position(), text.get_text()) for text in figure.axes[0].texts} >= {((3, 1), "80"), ((5, 2), "90")}
    legend = {
        text.get_text(): patch.get_facecolor()[:3]
        for text, patch in zip(figure.legends[0].get_texts(), figure.legends[0].get_patches(), strict=True)
    }
    assert legend["induction: 1"] == to_rgb(ROLE_COLOURS["induction"])
    (shown,) = figure.axes[0].images
    assert tuple(shown.cmap(shown.norm(names.index("induction")))[:3]) == pytest.approx(
        to_rgb(ROLE_COLOURS["induction"])
    )


@pytest.mark.parametrize("kind", ["weights", "logits"])
def test_layer_heads(kind, stats):
    figure = plot_layer_heads(stats, layer=1, batch=1, kind=kind)
    maps = stats[f"{kind}_map"][1, 1].numpy()
    panels = [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]
    assert [axes.get_title() for axes in panels] == [f"head {head}" for head in range(6)]
    lower = np.tril_indices(37)
    for axes, cells in zip(panels, maps, strict=True):
        (shown,) = axes.images
        close(shown.get_array().data[lower], cells[lower])
        assert shown.get_array().mask[np.triu_indices(37, 1)].all()
        assert shown.norm is panels[0].images[0].norm
    low, high = panels[0].images[0].get_clim()
    assert low == pytest.approx(0 if kind == "weights" else np.nanmin(maps))
    assert high == pytest.approx(np.nanmax(maps))


@pytest.mark.parametrize("map_size", [64, 10])
@pytest.mark.parametrize("batch", [0, 1])
def test_model_view(map_size, batch, ids, left_padding):
    stats = measure(ids, left_padding, map_size=map_size)
    first = int(left_padding[batch].argmax())
    exact = measure(ids, left_padding)["weights_map"][:, batch].double().numpy()
    # Bins of one token are merged by 3, or 2 beside padding; bins of four tokens are few enough. They begin with the
    # text, but where they were laid out for the batch: then the first holds padding too.
    width, start = (3 - (first > 0), first) if map_size == 64 else (4, first // 4 * 4)
    exact = exact[:, :, start:, start:]
    real = left_padding[batch, start:].bool().numpy()
    length = len(real)
    cells = -(-length // width)
    mosaic = drawn(plot_model_view(stats, batch=batch)).reshape(3, cells, 6, cells)
    for q in range(cells):
        for k in range(cells):
            queries = [i for i in range(width * q, min(length, width * q + width)) if real[i]]
            mass = (
                exact[:, :, queries, width * k : width * k + width].sum(-1).mean(-1)
                if queries and k <= q
                else np.full((3, 6), np.nan)
            )
            none = ~np.nan_to_num(mass).any(1)
            mass[none] = np.nan
            np.testing.assert_allclose(mosaic[:, q, :, k], mass, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("statistic", ["entropy", "hidden_norm", "value_norm"])
def test_layer_profile(statistic, stats):
    figure = plot_layer_profile(stats, statistic=statistic, batch=0)
    axes = figure.axes[0]
    summary = layer_evolution(stats.select(batch=0))[statistic]
    mean, std, low, high = (summary.sel(summary=name).values for name in ("mean", "std", "min", "max"))
    (line,) = axes.lines
    close(line.get_ydata(), mean)
    np.testing.assert_array_equal(line.get_xdata(), summary[summary.dims[0]])
    widest, narrow = (band.get_paths()[0].vertices for band in axes.collections)
    for vertices, bottom, top in (
        (widest, low, high),
        (narrow, np.maximum(low, mean - std), np.minimum(high, mean + std)),
    ):
        for x in range(len(mean)):
            ys = vertices[vertices[:, 0] == x][:, 1]
            close([ys.min(), ys.max()], [bottom[x], top[x]])
    assert axes.get_ylabel() == f"{statistic.replace('_', ' ')} [{stats.labels[statistic].unit}]"
    assert "tokens" in figure.legends[0].get_texts()[0].get_text() or statistic != "hidden_norm"


@pytest.mark.parametrize("head", [None, 2])
def test_distance_histogram(head, stats):
    figure = plot_distance_histogram(stats, layer=1, head=head, batch=1)
    histogram = stats["distance_histogram"][1, 1].numpy()
    axes = figure.axes[0]
    close([bar.get_height() for bar in axes.patches], histogram.mean(0) if head is None else histogram[head])
    assert len(axes.lines) == (6 if head is None else 0)
    for line, each in zip(axes.lines, histogram, strict=False):
        close(line.get_ydata(), each)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1–2", "3–6", "7–14", "15–30", "31–36"]


@pytest.mark.parametrize("head", [None, 4])
def test_token_strip(head, stats, ids):
    figure = plot_token_strip(stats.with_tokens(Tokenizer(), torch.arange(74).view(2, 37)), layer=2, head=head, batch=0)
    shown = {axes.get_ylabel().split("\n")[0]: axes for axes in figure.axes}
    assert list(shown) == ["received", "sink mass", "hidden norm", "key norm", "value norm"]
    for name in ("received", "sink_mass"):
        values = stats[name][2, 0, :, 9:].numpy()
        (steps,) = shown[name.replace("_", " ")].patches
        heights, edges, _ = steps.get_data()
        close(heights, values.mean(0) if head is None else values[head])
        np.testing.assert_array_equal(edges, np.arange(29) - 0.5)
    close(shown["hidden norm"].lines[0].get_ydata(), stats["hidden_norm"][2, 0, 9:])
    close(shown["key norm"].lines[0].get_ydata(), stats["key_norm"][2, 0, :, 9:].mean(0))
    labels = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
    # Those behind nine tokens of padding.
    assert labels[:4] == ["_^{", "%s", "\\alpha", ""]
    assert "[probability]" in shown["received"].get_ylabel()


def test_token_strip_of_what_there_is(ids):
    config = {"statistics": ("received", "topk_weight"), "norms": False}
    assert len(plot_token_strip(measure(ids, **config)).axes) == 1
    assert len(plot_token_strip(measure(ids), statistics=["entropy", "value_norm"]).axes) == 2
    with pytest.raises(ValueError, match=r'"sink_mass"'):
        plot_token_strip(measure(ids, **config), statistics=["sink_mass"])
    with pytest.raises(ValueError, match="expected statistics of tokens, got 'topk_weight' with axes"):
        plot_token_strip(measure(ids, **config), statistics=["topk_weight"])
    with pytest.raises(ValueError, match=r'"received"'):
        plot_token_strip(measure(ids, statistics="entropy", norms=False))


NEW = ["hidden_top", "hidden_top_channel", "hidden_layer_median"]


def test_massive_activations(stats):
    ds = stats.to_xarray()
    ds["hidden_top"][2:, 1, 5, :2] = [1e5, 4e4]
    ds["hidden_top_channel"][2:, 1, 5, :2] = [7, 2]
    ds["hidden_top"][3, 1, 30, :3] = [2e5, 1e5, 9e4]
    ds["hidden_top_channel"][3, 1, 30, :3] = [11, 7, 40]
    figure = plot_massive_activations(ds, batch=1)
    left, right = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    close(left.images[0].get_array().filled(np.nan), ds.hidden_top[:, 1, :, 0])
    marks = {
        line.get_label(): set(zip(line.get_ydata().tolist(), line.get_xdata().tolist(), strict=True))
        for line in left.lines
    }
    assert marks == {
        "massive, channel 7": {(2, 5), (3, 5), (3, 30)}, "massive, channel 2": {(2, 5), (3, 5)},
        "massive, channel 11": {(3, 30)}, "massive, channel 40": {(3, 30)},
    }  # fmt: skip
    sizes = [line.get_markersize() for line in left.lines]
    assert sizes == sorted(sizes, reverse=True), "each is seen behind the next"
    lines = {line.get_label(): line.get_xdata() for line in right.lines}
    median = ds.hidden_layer_median[:, 1]
    close(lines["median"], median)
    close(lines["massive beyond"], np.maximum(100, 1000 * median))


def test_massive_activations_of_which_the_largest_is_known(stats):
    ds = stats.to_xarray().drop_vars(NEW)
    ds["hidden_max"][2:, 1, 5] = 1e5
    ds["hidden_max_channel"][2:, 1, 5] = 7
    ds["hidden_max"][3, 1, 30] = 2e5
    ds["hidden_max_channel"][3, 1, 30] = 11
    figure = plot_massive_activations(ds, batch=1)
    left, right = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    close(left.images[0].get_array().filled(np.nan), ds.hidden_max[:, 1])
    marks = {
        line.get_label(): set(zip(line.get_ydata().tolist(), line.get_xdata().tolist(), strict=True))
        for line in left.lines
    }
    assert marks == {"massive, channel 7": {(2, 5), (3, 5)}, "massive, channel 11": {(3, 30)}}
    lines = {line.get_label(): line.get_xdata() for line in right.lines}
    median = ds.hidden_median[:, 1].median("query").values
    close(lines["largest"], ds.hidden_max[:, 1].max("query"))
    close(lines["median"], median)
    close(lines["massive beyond"], np.maximum(100, 1000 * median))
    assert {text.get_text() for text in figure.legends[0].get_texts()} == marks.keys() | lines.keys()
    assert "activation" in colour_bar_label(figure)


def test_positions_behind_a_cache_and_with_a_stride(ids):
    model = tiny_model()
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        config = AttentionStatsConfig(statistics="all", norms=True, query_stride=4)
        stats = model(ids[:, 20:], **{CACHE: cache}, output_attention_stats=config).attention_stats
    ds = stats.to_xarray()
    assert ds["query"].values.tolist() == [20, 24, 28, 32, 36]
    ds["hidden_top"][2, 0, 3, 0] = 1e6
    axes = plot_massive_activations(ds).axes[0]
    assert axes.images[0].get_extent() == [18, 38, 3.5, -0.5]
    assert axes.lines[0].get_xdata().tolist() == [32]
    strip = plot_token_strip(ds, statistics=["entropy", "sink_mass"])
    assert strip.axes[0].lines[0].get_xdata().tolist() == [20, 24, 28, 32, 36]
    np.testing.assert_array_equal(strip.axes[1].patches[0].get_data().edges, [18, 22, 26, 30, 34, 38])
    (line,) = viz.plot_hidden_norms(ds).axes[0].lines
    assert line.get_xdata().tolist() == [20, 24, 28, 32, 36]


def test_more_channels_than_colours(stats):
    ds = stats.to_xarray()
    for token in range(9):
        ds["hidden_top"][1, 1, token, 0] = 1e6
        ds["hidden_top_channel"][1, 1, token, 0] = token
    left = plot_massive_activations(ds, batch=1).axes[0]
    assert len(left.lines) == 7
    assert sum(len(line.get_xdata()) for line in left.lines) == 9


@pytest.mark.parametrize("kind", ["weights", "logits"])
@pytest.mark.parametrize("head", [None, 3])
def test_comparison(kind, head, stats, ids, left_padding):
    other = measure(ids, left_padding, seed=1)
    figure = plot_comparison(stats, other, layer=1, head=head, batch=1, kind=kind)
    maps = [run[f"{kind}_map"][1, 1].numpy() for run in (stats, other)]
    first, second = (each.mean(0) if head is None else each[head] for each in maps)
    lower = np.tril_indices(37)
    close(drawn(figure)[lower], (second - first)[lower])
    assert np.isnan(drawn(figure)[np.triu_indices(37, 1)]).all()
    low, high = image(figure).get_clim()
    assert -low == high == np.abs(second - first)[lower].max(), "zero is in the middle"
    assert "b − a" in colour_bar_label(figure)


def test_comparison_of_different_lengths(stats, ids):
    with pytest.raises(ValueError, match="b: expected a map of 37 keys as in a, got 20; plot_head_comparison"):
        plot_comparison(stats, measure(ids[:, :20]), batch=1)
    with pytest.raises(ValueError, match="b: expected a map of 37 key_bins as in a, got 10"):
        plot_comparison(stats, measure(ids, map_size=10), batch=1)


@pytest.mark.parametrize("statistic", ["entropy", "key_norm"])
def test_head_comparison(statistic, stats, ids, left_padding):
    other = measure(ids, left_padding, seed=1, layers=(2, 0))
    figure = plot_head_comparison(stats, other, statistic=statistic)
    frame = compare(stats, other).query("statistic == @statistic").set_index(["layer", "head"])
    values = [run[statistic].flatten(3) for run in (stats.select(layers=[0, 2]), other.select(layers=[0, 2]))]
    both = [np.nanmean(each.transpose(1, 2).flatten(2).double().numpy(), axis=-1) for each in values]
    close(drawn(figure), both[1] - both[0])
    close(drawn(figure)[1, 1], frame.difference[2, 1])
    low, high = image(figure).get_clim()
    assert -low == high == pytest.approx(np.abs(drawn(figure)).max())
    with pytest.raises(ValueError, match="statistic: expected one with heads, got 'hidden_norm'"):
        plot_head_comparison(stats, other, statistic="hidden_norm")


def test_a_head_comparison_says_of_how_many_tokens_it_is(ids):
    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [f"t{i}" for i in ids]

    runs = [measure(tokens).with_tokens(Tokenizer(), tokens) for tokens in (ids[:1], ids[:1, 7:])]
    titles = [" ".join(plot_head_comparison(runs[0], b).axes[0].get_title().split()) for b in runs]
    assert titles[0].startswith("Entropy, b − a, mean over tokens ")
    assert titles[1].startswith("Entropy, b − a, mean over the 30 tokens in common ")


def test_identical_runs_have_no_difference(stats):
    assert np.nanmax(np.abs(drawn(plot_comparison(stats, stats)))) == 0
    assert (drawn(plot_head_comparison(stats, stats)) == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda stats: plot_head_grid(stats, statistic="weights_map"), "statistic: expected one number per head and token, one of .*entropy.*, got 'weights_map'"),
        (lambda stats: plot_head_grid(stats, statistic="hidden_norm"), "got 'hidden_norm'"),
        (lambda stats: plot_head_grid(stats, statistic="topk_position"), "got 'topk_position'"),
        (lambda stats: plot_layer_profile(stats, statistic="weights_map"), "one number per layer and token, one of .*hidden_norm"),
        (lambda stats: plot_layer_profile(stats, statistic="hidden_max_channel"), "got 'hidden_max_channel', whole numbers are positions or channels"),
        (lambda stats: plot_layer_profile(stats, statistic="topk_weight"), "got 'topk_weight'"),
        (lambda stats: plot_head_grid(stats, statistic="entropi"), "there is no statistic 'entropi'; did you mean 'entropy'.*; measured are .*'entropy'"),
        (lambda stats: plot_layer_profile(stats, statistic="qqqqqq"), "there is no statistic 'qqqqqq'; measured are"),
        (lambda stats: plot_layer_heads(stats, kind="scores"), "kind: expected one of"),
        (lambda stats: plot_comparison(stats, stats, kind="scores"), "kind: expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message, stats):
    with pytest.raises(ValueError, match=message):
        call(stats)


def test_tokens_that_fonts_lack_are_boxes():
    assert [drawable(token) for token in ("🦜", "日本a", "Ġthe", "é", "שלום")] == ["□", "□□a", "␣the", "é", "שלום"]


@pytest.mark.parametrize(
    ("token", "shown"),
    [("Ã©", "é"), ("ĠcafÃ©", "␣café"), ("æĹ¥", "日"), ("ðŁ", "ðŁ"), ("ĉĉ", "⇥⇥"), ("é", "é"), ("▁é", "␣é"), ("ĊĊ", "⏎⏎"), ("\u202eabc", "·abc")],
)  # fmt: skip
def test_byte_level_tokens_are_read(token, shown):
    assert readable(token) == shown


def test_what_is_no_number_is_not_drawn_as_nothing(stats, ids, left_padding):
    """One head of one layer without data: grey, neither a difference nor attention of 0."""
    broken = measure(ids, left_padding)
    broken["weights_map"][1, 1, 2] = torch.nan
    assert np.isnan(drawn(plot_comparison(broken, stats, layer=1, head=2, batch=1))).all()
    mosaic = drawn(plot_model_view(broken, batch=1)).reshape(3, 13, 6, 13)
    assert np.isnan(mosaic[1, :, 2]).all()
    assert np.isfinite(mosaic[1, :, 3]).any()


def test_where_uniform_attention_is_unknown_the_legend_says_so():
    """The token before the answer sees the sink alone, and nothing is left of uniform attention without it."""
    ids = torch.tensor([[3, 4]])
    stats = measure(ids, segments=[["prompt", "generated"]], rows=slice(None), sink_tokens=2)
    legend = [text.get_text() for text in viz.plot_sources(stats).legends[0].get_texts()]
    assert "prompt: no data (uniform –)" in legend


def test_a_strip_of_states_alone_names_no_head_that_there_is_not(stats):
    with pytest.raises(ValueError, match="head: 99 was not measured; there are"):
        plot_token_strip(stats, head=99, statistics=["hidden_norm"])


def test_without_tokens_ticks_are_positions():
    """A text whose evenly spaced ticks would stand between tokens."""
    stats = measure(torch.arange(3, 25)[None], torch.ones(1, 22, dtype=torch.long))
    for call in (viz.plot_attention_map, viz.plot_layer_heads, viz.plot_token_strip):
        figure = call(stats, layer=0)
        figure.canvas.draw()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if "[token]" in axis.get_label_text():
                    assert all(place == round(place) for place in axis.get_majorticklocs()), call
