"""Pictures of long texts and of strong sinks: scales of colours, rows, bins, and names of what stands out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from asked import bar_of, labels
from conftest import tiny_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_windows import MODELS

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import sink_positions
from llama_attn.viz import (
    plot_attention_map,
    plot_distance_histogram,
    plot_hidden_norms,
    plot_kv_norms,
    plot_layer_heads,
    plot_massive_activations,
    plot_model_view,
    plot_token_strip,
    save_seed_figures,
)
from llama_attn.viz.figures.along import tokens_per_bin


def measure(length, tokens=True, **settings):
    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(1))
    names = ("received", "sink_mass", "weights_map", "logits_map", "distance_histogram")
    config = AttentionStatsConfig(**({"statistics": names, "norms": True} | settings))
    with torch.no_grad():
        model = tiny_model(max_position_embeddings=2048)
        stats = model(ids, output_attention_stats=config).attention_stats
    return replace(stats, tokens=[[f"t{place}" for place in range(length)]]) if tokens else stats


def shown_image(figure):
    (image,) = figure.axes[0].images
    return image


def sink_map(length=20):
    """A head that gives nearly all to the first key, and very little to others."""
    stats = measure(length)
    maps = stats["weights_map"]
    maps[:] = torch.tril(torch.full_like(maps, 1e-4))
    maps[..., 0] = 0.97
    maps[:, :, 2, 5, 3] = 0
    return stats


@pytest.mark.parametrize("draw", [plot_attention_map, plot_layer_heads])
@pytest.mark.parametrize(("scale", "note"), [(None, "square-root"), ("sqrt", "square-root"), ("log", "log")])
def test_a_sink_does_not_swallow_the_rest(scale, note, draw):
    figure = draw(sink_map(), scale=scale)
    image = shown_image(figure)
    assert bar_of(figure) == f"attention weight [probability]\n{note} scale"
    assert image.norm(0.01) > 0.09
    even = shown_image(draw(sink_map(), scale="linear"))
    assert even.norm(0.01) < 0.011
    assert bar_of(draw(sink_map(), scale="linear")) == "attention weight [probability]"
    np.testing.assert_array_equal(image.get_array(), even.get_array())


def test_a_weight_of_zero_is_not_no_data():
    """On a logarithmic scale it has the darkest colour, and the colour bar says that it lies below."""
    figure = plot_attention_map(sink_map(), head=2, scale="log")
    image = shown_image(figure)
    assert not np.ma.is_masked(image.get_array()[5, 3])
    assert not np.ma.is_masked(image.norm(image.get_array())[5, 3])
    assert image.to_rgba(image.get_array())[5, 3].tolist() == list(image.cmap(0.0))
    assert image.colorbar.extend == "min"
    stats = sink_map()
    stats["weights_map"][..., 5, 3] = 1e-4
    assert shown_image(plot_attention_map(stats, head=2, scale="log")).colorbar.extend == "neither"


def test_scales_that_there_are_not():
    stats = sink_map()
    for draw in (plot_attention_map, plot_layer_heads):
        with pytest.raises(ValueError, match=r"scale: expected one of \['linear', 'sqrt', 'log'\], or None .* 'cubic'"):
            draw(stats, scale="cubic")
        with pytest.raises(ValueError, match="scale: expected 'linear' for scores, which are negative too, got 'log'"):
            draw(stats, kind="logits", scale="log")


@pytest.mark.parametrize("layers", [(1,), None])
def test_ticks_of_a_short_colour_bar_are_apart(layers):
    figure = plot_model_view(measure(16, layers=layers))
    FigureCanvasAgg(figure).draw()
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    boxes = [label.get_window_extent() for label in bar.get_yticklabels() if label.get_text()]
    assert len(boxes) > 4
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_the_colour_bar_of_massive_activations_is_its_own_panels():
    figure = plot_massive_activations(measure(16))
    FigureCanvasAgg(figure).draw()
    left, right, bar = figure.axes
    box, other = (axes.get_tightbbox() for axes in (bar, right))
    assert box.y1 < left.get_window_extent().y0, "below the panel that it is of"
    assert box.x1 < other.x0
    assert (left.get_window_extent().y0, left.get_window_extent().y1) == (
        right.get_window_extent().y0, right.get_window_extent().y1,
    )  # fmt: skip


def test_seed_figures_are_as_they_were(tmp_path, monkeypatch):
    """Their maps are linear and their default names the original ones; other layers have names that sort."""
    stats = measure(12)
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **_: (drawn.append(figure), path.touch())
    )
    stats = replace(stats, num_layers=101, layers=(2, 9, 100))
    names = [path.name for path in save_seed_figures(stats, tmp_path)]
    assert names[::3] == ["layer_2_attention.png", "layer_9_attention.png"]
    assert names[1:3] == ["hidden_states_2_norm.png", "kv_2_norm.png"]
    assert shown_image(drawn[0]).norm(0.25 * shown_image(drawn[0]).norm.vmax) == pytest.approx(0.25)
    names = [path.name for path in save_seed_figures(stats, tmp_path, layers=[100, 2, 9])]
    assert names[1:3] == ["hidden_states_100_norm.png", "kv_100_norm.png"]
    assert sorted(names[::3]) == ["layer_002_attention.png", "layer_009_attention.png", "layer_100_attention.png"]


def curves(figure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): tuple(line.get_data()) for line in figure.axes[0].lines}


@pytest.mark.parametrize("name", MODELS)
def test_uniform_attention_by_distance(name):
    """What the layer's own mask shows counts: windows, chunks, padding, both sides."""
    model = MODELS[name]
    for layer, mask in zip(model.layers, model.masks, strict=True):
        (dashes,) = plot_distance_histogram(model.dataset(), layer=layer).axes[0].collections
        shares = mask / np.maximum(mask.sum(-1, keepdims=True), 1)
        edges = [2**b - 1 for b in range(model.text.length.bit_length() + 1)]
        near = [(shares * ((model.distance >= a) & (model.distance < b))).sum() for a, b in itertools.pairwise(edges)]
        found = [segment[0, 1] for segment in dashes.get_segments()]
        np.testing.assert_allclose(found, np.array(near) / mask.any(-1).sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 1), (700, 1), (800, 1), (801, 2), (1600, 2), (1601, 4), (6000, 8), (100_000, 128)]
)
def test_how_many_tokens_are_a_point(tokens, size):
    assert tokens_per_bin(tokens) == size


def test_every_token_of_700_is_written():
    stats = measure(700)
    stats["received"][:] = 1e-3
    stats["received"][..., [0, 333]] = 0.9
    figure = plot_token_strip(stats, layer=1)
    panels = [axes for axes in figure.axes if axes.get_ylabel().startswith("received")]
    written = {}
    for axes in figure.axes[4::5]:
        written |= labels(axes.xaxis)
    assert written == {place: f"t{place}" for place in range(700)}
    assert len(panels) == 5
    heights = np.concatenate([axes.patches[0].get_data().values for axes in panels])
    np.testing.assert_allclose(heights, stats["received"][1, 0].mean(0), rtol=1e-6)
    for panel in range(5):
        assert len({axes.get_ylim() for axes in figure.axes[panel::5]}) == 1, "rows can be compared"
    assert len({round(np.ptp(axes.get_xlim()), 6) for axes in figure.axes}) == 1
    norms = np.concatenate([axes.lines[0].get_ydata() for axes in figure.axes[2::5]])
    np.testing.assert_allclose(norms, stats["hidden_norm"][1, 0], rtol=1e-6)
    FigureCanvasAgg(figure).draw()
    boxes = [label.get_window_extent() for label in figure.axes[4].get_xticklabels()]
    assert all(one.x1 <= two.x0 for one, two in itertools.pairwise(boxes)), "none overlap"
    # Marks are the sinks of the analysis, of any head.
    sinks = sink_positions(stats).sink.sel(layer=1, batch=0).any("head").values
    marks = np.concatenate([line.get_xdata() for axes in panels for line in axes.lines])
    assert marks.tolist() == np.flatnonzero(sinks).tolist() == [0, 333]


def test_one_head_has_its_own_sinks():
    stats = measure(40)
    stats["received"][:] = 1e-3
    stats["received"][2, 0, 4, 7] = 0.9
    stats["received"][2, 0, 0, 3] = 0.9
    marks = [plot_token_strip(stats, layer=2, head=head).axes[0].lines for head in (4, 0, 1)]
    assert [[line.get_xdata().tolist() for line in lines] for lines in marks] == [[[7]], [[3]], []]
    figure = plot_token_strip(stats, layer=2, head=0)
    assert figure.legends[0].get_texts()[0].get_text() == "sink of the head"


def in_pairs(values: np.ndarray, function) -> np.ndarray:
    """Of every two tokens; the last one alone."""
    return np.array([function(values[at : at + 2]) for at in range(0, len(values), 2)])


def test_long_texts_are_drawn_in_bins_that_say_so():
    stats = measure(901)
    stats["hidden_norm"][1, 0, 500] = 1e5
    stats["sink_mass"][1, 0, :, 4:6] = torch.nan
    title = "means of 2 tokens, smallest to largest in light colour"
    figure = plot_token_strip(stats, layer=1, head=2)
    assert title in figure.get_suptitle()
    assert len(figure.axes) == 5
    light, dark = (steps.get_data() for steps in figure.axes[1].patches)
    mass = stats["sink_mass"][1, 0, 2].double().numpy()
    np.testing.assert_allclose(dark.values, in_pairs(mass, np.mean), rtol=1e-6)
    np.testing.assert_allclose(light.values, in_pairs(mass, np.max), rtol=1e-6)
    assert np.isnan(dark.values[2])
    np.testing.assert_array_equal(dark.edges[:-1], np.arange(0, 902, 2) - 0.5)
    norms = stats["hidden_norm"][1, 0].double().numpy()
    for axes in (figure.axes[2], plot_hidden_norms(stats, layer=1).axes[0]):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), in_pairs(norms, np.mean), rtol=1e-6)
        corners = axes.collections[0].get_paths()[0].vertices
        assert corners[:, 1].max() == pytest.approx(1e5)
        assert corners[:, 1].min() == pytest.approx(norms.min())
        named = [text.get_text() for text in axes.texts]
        assert "500 t500" in named
    for figure in (plot_hidden_norms(stats, layer=1), plot_kv_norms(stats, layer=1)):
        assert title in figure.axes[0].get_title()
    with_few = plot_hidden_norms(measure(800), layer=1).axes[0]
    assert "means" not in with_few.get_title()
    assert len(with_few.lines[0].get_xdata()) == 800


@pytest.mark.parametrize("tokens", [True, False])
def test_tokens_that_stand_out_are_named(tokens):
    stats = measure(300, tokens=tokens)
    stats["hidden_norm"][1, 0] = 10 + torch.arange(300) % 3
    stats["hidden_norm"][1, 0, [50, 52, 200]] = torch.tensor([30.0, 40.0, 2.0])
    axes = plot_hidden_norms(stats, layer=1).axes[0]
    places = {text.get_text(): text.xy for text in axes.texts}
    expected = {52: 40.0, 200: 2.0}
    assert places == {f"{at} t{at}" if tokens else f"token {at}": (at, value) for at, value in expected.items()}


def test_no_magnitude_of_a_long_text_is_left_out():
    stats = measure(901, statistics=())
    stats["hidden_top"][2, 0, 700, 0] = 1e6
    figure = plot_massive_activations(stats)
    left = figure.axes[0]
    (image,) = left.images
    magnitude = stats["hidden_top"][:, 0, :, 0].double().numpy()
    np.testing.assert_allclose(image.get_array(), [in_pairs(row, np.max) for row in magnitude], rtol=1e-6)
    assert image.get_extent() == [-0.5, 901.5, 3.5, -0.5]
    assert "each cell of 2 tokens" in figure.get_suptitle()
    assert [line.get_xydata().tolist() for line in left.lines] == [[[700, 2]]]
