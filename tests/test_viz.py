"""Pictures: what is drawn is what was measured."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import tiny_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import summarize_layers
from llama_attn.stats.token_text import readable
from llama_attn.viz import plot_attention_map, plot_hidden_norms, plot_kv_norms, save_seed_figures
from llama_attn.viz.style import NO_DATA

TOKENS = [
    "<|im_start|>",
    "Ġthe",
    "Ċ",
    "$x$",
    "</script>",
    "\x00\x1b",
    "שלום",
    "🦜",
    "a" * 10_000,
    "_^{",
    "%s",
    "\\alpha",
    "",
    "\"'<b>&amp;",
    "e\u0301\u0302\u0303" * 5,
    "\u202eabc\u200b",
    "\ud800",
    "$",
    "👩‍👩‍👧",
    "नमस्ते",
    "$_^{$",
]


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [TOKENS[i % len(TOKENS)] for i in ids]


def measured(ids, left_padding=None, model=None, **settings):
    config = AttentionStatsConfig(statistics=("weights_map", "logits_map", "sink_mass"), norms=True, **settings)
    with torch.no_grad():
        return (model or tiny_model())(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats


def image(figure: Figure) -> AxesImage:
    (drawn,) = figure.axes[0].images
    return drawn


@pytest.mark.parametrize("kind", ["weights", "logits"])
@pytest.mark.parametrize("head", [None, 4])
def test_attention_map_shows_the_statistics(kind, head, ids, left_padding):
    stats = measured(ids, left_padding)
    figure = plot_attention_map(stats, layer=2, head=head, batch=1, kind=kind)
    drawn = image(figure).get_array()
    maps = stats[f"{kind}_map"][2, 1]
    expected = (maps.mean(0) if head is None else maps[head]).numpy()
    triangle = np.triu(np.ones((37, 37), dtype=bool), k=1)
    np.testing.assert_array_equal(drawn.mask, triangle)
    np.testing.assert_allclose(drawn.data[~triangle], expected[~triangle], rtol=1e-5, atol=1e-6)
    low, high = image(figure).get_clim()
    assert np.isclose(high, expected[~triangle].max())
    assert np.isclose(low, 0 if kind == "weights" else expected[~triangle].min()), "hidden pairs may not set the scale"
    title = figure.axes[0].get_title()
    assert kind in title
    assert "layer 2" in title
    assert ("mean over heads" if head is None else "head 4") in title
    assert {"weights": "probability", "logits": "logit"}[kind] in figure.axes[1].get_ylabel()


@pytest.mark.parametrize("kind", ["weights", "logits"])
def test_padding_is_not_drawn_and_what_is_not_seen_is_no_data(kind, ids, left_padding):
    figure = plot_attention_map(measured(ids, left_padding), batch=0, kind=kind)
    drawn = image(figure).get_array()
    np.testing.assert_array_equal(drawn.mask, np.triu(np.ones((28, 28), dtype=bool), k=1))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    assert (pixels[:, :, :3] == [int(NO_DATA[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any()


def test_bidirectional_attention_has_no_triangle(ids):
    with torch.no_grad():
        config = AttentionStatsConfig(statistics=("weights_map", "logits_map"))
        stats = tiny_model()(ids, is_causal=False, output_attention_stats=config).attention_stats
    for kind in ("weights", "logits"):
        assert not image(plot_attention_map(stats, kind=kind)).get_array().mask.any()


def test_pooled_maps_are_drawn_at_token_positions(ids):
    figure = plot_attention_map(measured(ids, map_size=10))
    assert image(figure).get_array().shape == (10, 10)
    assert image(figure).get_extent() == [-0.5, 39.5, 39.5, -0.5]
    assert "bins of 4 tokens" in figure.axes[0].get_title()


def test_tokens_of_any_kind_are_text(ids):
    stats = measured(ids).with_tokens(Tokenizer(), torch.arange(74).view(2, 37))
    for figure in (plot_attention_map(stats), plot_hidden_norms(stats), plot_kv_norms(stats)):
        figure.savefig(io.BytesIO())
        labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
        assert labels[:4] == ["<|im_start|>", "␣the", "⏎", "$x$"]
        assert labels[5] == "··"
        assert labels[7] == "□", "the font has no parrot"
        assert len(labels[8]) == 14


def test_too_many_tokens_are_not_written(ids):
    long = ids.repeat(1, 3)
    stats = measured(long, map_size=128).with_tokens(Tokenizer(), torch.arange(222).view(2, 111))
    labels = [tick.get_text() for tick in plot_attention_map(stats).axes[0].get_xticklabels()]
    assert "␣the" not in labels


def test_readable():
    assert [readable(t) for t in ("▁a", "Ġ", "a\nb", "", "x" * 15)] == ["␣a", "␣", "a⏎b", "", "x" * 13 + "…"]


def test_norms_show_the_statistics(ids, left_padding):
    stats = measured(ids, left_padding)
    (line,) = plot_hidden_norms(stats, layer=1, batch=1).axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), stats["hidden_norm"][1, 1])
    figure = plot_hidden_norms(stats, layer=3)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), stats["hidden_norm"][3, 0, 9:])
    assert "after the last layer" in figure.axes[0].get_title()
    figure = plot_kv_norms(stats, layer=2, batch=1)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    for name in ("key", "value"):
        np.testing.assert_allclose(lines[f"{name}: mean of norms"], stats[f"{name}_norm"][2, 1].mean(0), rtol=1e-6)
        np.testing.assert_allclose(lines[f"{name}: norm of mean"], stats[f"{name}_mean_norm"][2, 1])
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(lines)
    assert "[activation]" in figure.axes[0].get_ylabel()


def test_every_kind_of_source(ids, tmp_path):
    stats = measured(ids)
    stats.save(tmp_path / "run.safetensors")
    sources = (stats, stats.to_xarray(), tmp_path / "run.safetensors", str(tmp_path / "run.safetensors"))
    drawn = [image(plot_attention_map(source)).get_array() for source in sources]
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])
    with pytest.raises(TypeError, match=r"expected AttentionStats, xarray\.Dataset or the path"):
        plot_attention_map(tiny_model())


def test_seed_figures(ids, tmp_path, capfd):
    stats = measured(ids, layers=(0, 2))
    saved = []
    written = save_seed_figures(stats, tmp_path / "new", on_saved=saved.append)
    names = [
        f"{name}.png" for i in (0, 2) for name in (f"layer_{i}_attention", f"hidden_states_{i}_norm", f"kv_{i}_norm")
    ]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    assert saved == written
    pixels = plt.imread(written[0])
    assert pixels.shape[:2] == (600, 800)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
    assert plt.get_fignums() == [], "no figure is left open"
    assert capfd.readouterr() == ("", "")
    assert save_seed_figures(stats, tmp_path / "none", layers=[1, 7]) == []


@pytest.mark.parametrize("length", [1, 2])
def test_very_short_texts(length, ids, tmp_path):
    stats = measured(ids[:, :length])
    assert len(save_seed_figures(stats, tmp_path)) == 9


def test_a_layer_that_is_all_nan(ids, tmp_path):
    stats = measured(ids)
    for tensor in stats.values.values():
        if tensor.is_floating_point():
            tensor[1] = torch.nan
    assert len(save_seed_figures(stats, tmp_path)) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 1}, r"layer: 1 was not measured; there are \[0, 2\]"),
        ({"layer": -1}, "layer: -1 was not measured"),
        ({"head": 6}, "head: 6 was not measured; there are"),
        ({"batch": 2}, r"batch: 2 was not measured; there are \[0, 1\]"),
        ({"kind": "scores"}, r"kind: expected one of \['weights', 'logits'\], got 'scores'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message, ids):
    with pytest.raises(ValueError, match=message):
        plot_attention_map(measured(ids, layers=(0, 2)), **arguments)


def test_a_missing_statistic_says_how_to_measure_it(ids, tmp_path):
    with torch.no_grad():
        stats = tiny_model()(ids, output_attention_stats=True).attention_stats
    message = r'AttentionStatsConfig\(statistics=\(…, "weights_map"\)\)'
    with pytest.raises(ValueError, match=message):
        plot_attention_map(stats)
    with pytest.raises(ValueError, match='"hidden_norm"'):
        plot_hidden_norms(stats)
    with pytest.raises(ValueError, match='"key_norm", "value_norm", "key_mean_norm", "value_mean_norm"'):
        plot_kv_norms(stats)
    with pytest.raises(ValueError, match=r"weights_map.*hidden_norm"):
        save_seed_figures(stats, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="kind: expected"):
        save_seed_figures(stats, tmp_path / "out", kind="both")


def test_packed_documents_do_not_touch(ids):
    positions = torch.cat([torch.arange(20), torch.arange(17)])[None].expand(2, -1)
    with torch.no_grad():
        stats = tiny_model()(
            ids, position_ids=positions, use_cache=False,
            output_attention_stats=AttentionStatsConfig(statistics=("weights_map", "logits_map")),
        ).attention_stats  # fmt: skip
    weights, logits = (image(plot_attention_map(stats, kind=kind)).get_array().mask for kind in ("weights", "logits"))
    assert weights[20:, :20].all()
    np.testing.assert_array_equal(weights, logits)


def test_one_bin(ids):
    stats = measured(ids, map_size=1).with_tokens(Tokenizer(), torch.arange(74).view(2, 37))
    figure = plot_attention_map(stats)
    assert "bins of 64 tokens" in figure.axes[0].get_title()
    assert image(figure).get_extent() == [-0.5, 63.5, 63.5, -0.5]


def test_summary_of_a_short_text(ids):
    config = AttentionStatsConfig(norms=True)
    with torch.no_grad():
        stats = tiny_model()(ids[:, :2], output_attention_stats=config).attention_stats
    summary = summarize_layers(stats)
    assert np.isfinite(summary.received).all()
    assert (summary.sink_position <= 1).all()
    for wrong in (-1, True, 0.0, None):
        with pytest.raises(ValueError, match=f"batch: .*{wrong}"):
            summarize_layers(stats, batch=wrong)
