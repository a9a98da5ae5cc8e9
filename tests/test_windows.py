"""Analysis, figures and report of models whose layers see different keys: windows, chunks, both sides, a short cache."""

from __future__ import annotations

import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from imagined import Model, Rule, Text
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_page import Page

from llama_attn import viz
from llama_attn.analysis import (
    classify_heads,
    compare,
    locality,
    massive_activations,
    sink_positions,
    sink_rate,
    summarize_layers,
)
from llama_attn.analysis.dataset import without_attention
from llama_attn.analysis.part import named_layers
from llama_attn.analysis.row import row_alone
from llama_attn.viz.figures.multiples import pooled_maps

LENGTH = 20
PADDING = 3
PADDED = [False] * PADDING + [True] * (LENGTH - PADDING)
WHOLE = [True] * LENGTH


def both(window=None):
    return Rule("bidirectional", window=window)


MODELS = {
    "windowed": Model(Text(PADDED, [0] * LENGTH), {0: Rule(window=5), 1: Rule(window=5)}, 2),
    "hybrid": Model(Text(PADDED, [0] * LENGTH), {1: Rule(), 3: Rule(window=4), 7: Rule(chunk=6)}, 9),
    "both sides": Model(Text(PADDED, [0] * LENGTH), {0: both(), 1: both()}, 2),
    "both sides, windowed": Model(Text(PADDED, [0] * LENGTH), {0: both(), 1: both(4), 2: both(2)}, 3),
    "a cache that dropped keys": Model(
        Text(WHOLE, [0] * LENGTH, first_query=17, dropped=12), {0: Rule(window=6), 1: Rule(window=4)}, 2
    ),
    "strided": Model(Text(PADDED, [0] * LENGTH, stride=4), {0: Rule(), 1: Rule(window=3)}, 2),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def padding_of(model):
    """Tokens in front of the text, which nothing that shows one row counts."""
    return 0 if all(model.text.real) else PADDING


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def each_head(model):
    """Layer by name and place, head, its weights, the pairs it sees, and the places of its real queries."""
    for at, layer in enumerate(model.layers):
        mask = model.masks[at]
        for head in range(model.heads):
            yield layer, at, head, model.weights[at, head], mask, np.flatnonzero(mask.any(1))


def test_locality(model):
    found = locality(model.dataset()).isel(batch=0)
    for layer, _, head, weights, mask, rows in each_head(model):
        near, far = ((weights[rows] * what[rows]).sum(1) for what in (model.distance < 3, model.distance))
        uniform = mask[rows] / mask[rows].sum(1, keepdims=True)
        uniform_near, uniform_far = (
            (uniform * what[rows]).sum(1) for what in (model.distance < 3, model.distance)
        )  # fmt: skip
        of_head = found.sel(layer=layer, head=head)
        close(of_head.local_mass, near.mean())
        close(of_head.mean_distance, far.mean())
        close(of_head.relative_distance, far.mean() / uniform_far.mean())
        assert of_head.reach == ("local" if far.mean() / uniform_far.mean() < 0.5 else "global")
        close(of_head.uniform_local_mass, uniform_near.mean())
        close(of_head.uniform_distance, uniform_far.mean())


def test_sinks(model):
    ds = model.dataset()
    found = sink_positions(ds, epsilon=0.2, fewest_queries=4).isel(batch=0)
    heads = np.zeros((len(model.keys), 2))
    for layer, _, head, weights, mask, _ in each_head(model):
        best = (-1, 0)
        for place, key in enumerate(model.keys):
            seeing = np.flatnonzero(mask[:, place])
            of_key = found.sel(layer=layer, head=head, key=key)
            if not len(seeing):
                assert np.isnan(of_key.boost)
                assert not of_key.sink
                continue
            alpha = weights[seeing, place].mean()
            close(of_key.boost, alpha / np.mean([1 / mask[i].sum() for i in seeing]))
            close(of_key.share, weights[seeing, place].sum() / mask.any(1).sum())
            sink = alpha > 0.2 and len(seeing) >= 4
            assert of_key.sink == sink
            heads[place] += sink, 1
            if sink and weights[:, place].sum() > best[1]:
                best = key, weights[:, place].sum()
        assert found.position.sel(layer=layer, head=head) == best[0]
    with np.errstate(invalid="ignore"):
        close(found["heads"], heads[:, 0] / heads[:, 1])


def test_sink_rate(model):
    ds = model.dataset()
    if model.text.dropped:
        with pytest.raises(ValueError, match="key: the first 12 tokens are no longer in the cache"):
            sink_rate(ds)
        return
    real = [place for place, key in enumerate(model.keys) if model.masks.any((0, 1))[place]]
    for number in (0, 2):
        hits = {}
        for layer, _, _, weights, mask, _ in each_head(model):
            seeing = np.flatnonzero(mask[:, real[number]])
            if len(seeing):
                hits.setdefault(layer, []).append(weights[seeing, real[number]].mean() > 0.3)
        close(sink_rate(ds, key=number), np.mean([hit for of_layer in hits.values() for hit in of_layer]))
        close(sink_rate(ds, key=number, by="layer"), [np.mean(hits.get(layer, np.nan)) for layer in model.layers])
    assert sink_rate(ds).attrs["T"] == len(real)


@pytest.mark.parametrize("query_slice", [None, slice(12, None), slice(-4, None)])
def test_roles(query_slice, model):
    if model.text.dropped and query_slice == slice(12, None):
        query_slice = slice(18, None)
    ds = model.dataset()
    frame = classify_heads(ds, query_slice).set_index(["layer", "head"])
    counted = range(LENGTH)[query_slice or slice(None)]
    for layer, _, head, weights, mask, rows in each_head(model):
        rows = [i for i in rows if model.queries[i] in counted and mask[i].sum() > 1]
        uniform = mask[rows] / mask[rows].sum(1, keepdims=True)
        score = 1 - (weights[rows] * model.distance[rows]).sum() / (uniform * model.distance[rows]).sum()
        close(frame.local_score[layer, head], score)
        entropy = [-(weights[i, mask[i]] * np.log(weights[i, mask[i]])).sum() / np.log(mask[i].sum()) for i in rows]
        close(frame.uniform_score[layer, head], np.mean(entropy))
        # The first tokens, of queries whose window still holds one of them; of all, where it is unknown who does:
        # between padding and the first measured query, or what is no longer in the cache, may lie more.
        known = not model.text.dropped and model.text.stride == 1
        sees = [i for i in rows if mask[i].sum() > 2 and (not known or (mask[i] & (model.rank < 2)).any())]
        sink = np.mean([(weights[i] * (model.rank < 2)).sum() for i in sees]) if sees else np.nan
        close(frame.first_token_sink_score[layer, head], sink)
        # In texts this short no key takes more than chance explains.
        close(frame.sink_score[layer, head], 0.0 if {*model.queries} <= {*counted} else np.nan)


def test_one_line_per_layer(model):
    summary = summarize_layers(model.dataset())
    assert summary.index.tolist() == model.layers
    for at, layer in enumerate(model.layers):
        mask = model.masks[at]
        taken = model.weights[at].sum(1).mean(0) / mask.any(1).sum()
        sees = [i for i in np.flatnonzero(mask.any(1)) if mask[i].sum() > 2]
        # The row alone begins with its first token, so that it is known who sees it at any stride.
        if not model.text.dropped:
            sees = [i for i in sees if (mask[i] & (model.rank < 2)).any()]
        mass = (model.weights[at] * (model.rank < 2)).sum(-1)
        close(summary.sink_mass[layer], mass[:, sees].mean() if sees else np.nan)
        strongest = int(np.argmax(taken))
        seeing = mask[:, strongest]
        assert summary.sink_position[layer] == model.keys[strongest] - padding_of(model)
        assert summary.queries[layer] == seeing.sum()
        close(summary.share[layer], taken[strongest])
        close(summary.received[layer], model.weights[at][:, seeing, strongest].mean())
        close(summary.boost[layer], summary.received[layer] / (1 / mask[seeing].sum(1)).mean())


def test_massive_activations_beside_windows(model):
    found = massive_activations(model.dataset()).isel(batch=0)
    first = model.queries[model.masks.any((0, 2)).argmax()]
    assert found.sel(query=first).channels.values.tolist() == [[-1] * 4] + [[7, 30, -1, -1]] * len(model.layers)
    for layer, _, _, _, _, _ in each_head(model):
        place = first - model.text.dropped
        at, seeing = model.layers.index(layer), model.masks[model.layers.index(layer), :, place]
        # In a narrow window too few queries see it to tell.
        told = seeing.sum() == model.masks[at].any(1).sum()
        alpha = [model.weights[at, head, seeing, place].mean() for head in range(model.heads)] if told else []
        expected = np.mean(np.array(alpha) > 0.3) if alpha else np.nan
        close(found.sink_heads.sel(layer=layer, query=first), expected)


def test_compare_aligns_positions(model):
    other = Model(model.text, model.rules, model.num_layers, seed=3)
    frame = compare(model.dataset(), other.dataset()).query("statistic == 'received'").set_index(["layer", "head"])
    for layer, at, head, weights, mask, _ in each_head(model):
        with np.errstate(invalid="ignore"):
            difference = (other.weights[at, head].sum(0) - weights.sum(0)) / mask.sum(0)
        place = int(np.nanargmax(np.abs(difference)))
        close(frame.largest[layer, head], difference[place])
        assert frame.position[layer, head] == model.keys[place] - padding_of(model)
        assert frame.token[layer, head] == f"t{model.keys[place]}"


def test_cross_attention_has_two_texts(tmp_path):
    model = Model(Text(WHOLE, [0] * LENGTH), {0: Rule("cross"), 1: Rule("cross")}, 2)
    ds = model.dataset()
    for name in ("mean_distance", "local_mass", "previous_token", "distance_histogram"):
        ds[name] = ds[name] * np.nan
    assert (locality(ds).reach == "no data").all()
    assert locality(ds).uniform_distance.isnull().all()
    assert "sink_heads" not in massive_activations(ds), "the keys are other tokens"
    assert np.isfinite(sink_positions(ds).boost).all()
    # The same queries, and keys of which only some are the same: every query counts.
    other = ds.copy(deep=True).assign_coords(key_token=(("batch", "key"), [["x", "y", *ds.key_token.values[0, 2:]]]))
    other["entropy"][..., 0] += 1
    frame = compare(ds, other).query("statistic == 'entropy'")
    close(frame.difference, 1 / LENGTH)
    assert (frame.position == 0).all()
    with pytest.raises(ValueError, match="the report shows one text, and cross-attention has two"):
        viz.report(ds, tmp_path / "report.html")
    other = ds.assign_coords(query_token=(("batch", "query"), [[f"q{i}" for i in model.queries]]))
    axes = viz.plot_attention_map(other).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"t{i}" for i in range(LENGTH)]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"q{i}" for i in range(LENGTH)]


def test_a_learned_sink_is_not_far_away():
    """A head that gives half to a learned sink and looks at keys as uniform attention does is as global as that."""
    model = Model(Text(WHOLE, [0] * LENGTH), {0: Rule(window=6), 1: Rule()}, 2)
    shares = np.linspace(0.1, 0.9, LENGTH)
    uniform = model.masks / model.masks.sum(-1, keepdims=True)
    model.weights = np.repeat((uniform * (1 - shares)[:, None])[:, None], 3, 1)
    ds = model.dataset()
    # Entropy counts the sink as one more outcome.
    ds["entropy"] = ds.entropy - xlogx(shares)
    ds["learned_sink_mass"] = ds.entropy * 0 + shares
    found = locality(ds)
    close(found.relative_distance, np.ones((2, 1, 3)))
    close(found.local_mass, found.uniform_local_mass.broadcast_like(found.local_mass))
    frame = classify_heads(ds)
    close(frame.local_score, np.zeros(6))
    outcomes = model.masks.sum(-1) + 1
    entropy = -(model.masks.sum(-1) * xlogx((1 - shares) / model.masks.sum(-1)) + xlogx(shares))
    expected = (entropy / np.log(outcomes)).mean(-1)
    close(found.normalized_entropy.isel(batch=0, head=0), expected)
    ds["learned_sink_mass"] = ds.learned_sink_mass * 0
    assert (locality(ds).relative_distance < 0.6).all()


def xlogx(x):
    return x * np.log(x)


def test_layers_are_named_in_ranges():
    assert named_layers([4]) == "layer 4"
    assert named_layers([2, 0, 1, 5, 7, 8]) == "layers 0–2, 5, 7–8"
    assert named_layers(range(0, 60, 2)).endswith("20, 22, …")


ABSENT = {"without_attention": json.dumps([0, 2, 4, 5, 6, 8])}
NAMED = "layers 0, 2, 4–6, 8 without attention weights"


def test_figures_name_layers_without_attention():
    ds = MODELS["hybrid"].dataset(**ABSENT)
    assert without_attention(ds) == (0, 2, 4, 5, 6, 8)
    assert without_attention(MODELS["hybrid"].dataset()) == ()
    figures = [
        viz.plot_head_grid(ds), viz.plot_head_roles(ds), viz.plot_layer_profile(ds), viz.plot_model_view(ds),
        viz.plot_massive_activations(ds), viz.plot_head_comparison(ds, ds),
    ]  # fmt: skip
    for figure in figures:
        assert figure.axes[0].get_xlabel().endswith(f"\n{NAMED}")
        FigureCanvasAgg(figure).draw()
        box = figure.axes[0].xaxis.label.get_window_extent()
        assert box.y0 >= 0, "the note is within the figure"
        assert box.x1 <= figure.bbox.width
    for figure in (viz.plot_head_grid(MODELS["hybrid"].dataset()), viz.plot_layer_profile(MODELS["hybrid"].dataset())):
        assert "without" not in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("name", MODELS)
def test_every_figure_of_a_run(name, tmp_path):
    model = MODELS[name]
    ds = model.dataset()
    layer = model.layers[-1]
    strip = viz.plot_token_strip(ds, layer=layer)
    padding = padding_of(model)
    shown = list(model.keys)[padding:]
    places = [key - padding for key in shown]
    labels = [tick.get_text() for tick in strip.axes[-1].get_xticklabels()]
    assert labels == [f"t{key}" for key in shown]
    assert strip.axes[-1].get_xlim() == (places[0] - 0.7, places[-1] + 0.7)
    axes = viz.plot_attention_map(ds, layer=layer).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"t{key}" for key in shown]
    assert axes.get_xticks().tolist() == places
    farthest = viz.plot_distance_histogram(ds, layer=layer).axes[0].get_xticklabels()[-1].get_text()
    assert farthest == f"15–{places[-1]}"
    viz.plot_model_view(ds)
    viz.plot_layer_heads(ds, layer=layer)
    viz.plot_head_roles(ds)
    assert plt.get_fignums() == []
    # Means over the real queries of two positions each.
    maps = pooled_maps(row_alone(ds, 0).isel(batch=0), 10)
    cells = -(-(LENGTH - padding) // 2)
    assert maps.shape[2:] == (cells, cells)
    for at in range(len(model.layers)):
        real = model.masks[..., :].any((0, 2))
        for query in range(cells):
            rows = [i for i, position in enumerate(model.queries) if (position - padding) // 2 == query and real[i]]
            for key in range(cells):
                columns = [j for j, position in enumerate(model.keys) if (position - padding) // 2 == key]
                expected = model.weights[at][:, rows][:, :, columns].sum(-1).mean(-1) if rows else np.full(3, np.nan)
                expected = expected if expected.any() else np.nan
                np.testing.assert_allclose(maps[at, :, query, key], expected, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_report(name, tmp_path):
    model = MODELS[name]
    ds = model.dataset(**(ABSENT if name == "hybrid" else {}))
    page = Page(viz.report(ds, tmp_path / "report.html"))
    said = ["".join(w if isinstance(w, str) else f"<{w['token']}>" for w in f["words"]) for f in page.about["findings"]]
    padding = padding_of(model)
    assert page.about["length"] == LENGTH - padding
    real = np.zeros(LENGTH, int)
    real[model.text.dropped :] = model.masks.any((0, 1))
    assert not real[:padding].any()
    np.testing.assert_array_equal(page.array("real")[0], real[padding:])
    tokens = [""] * model.text.dropped + [f"t{key}" for key in list(model.keys)[padding:]]
    assert page.about["tokens"] == tokens
    assert page.about["firstKey"] == model.text.dropped
    received = page.array("mean received")[0]
    assert np.isnan(received[:, : model.text.dropped]).all()
    found = locality(ds)
    assert f"{float(found.uniform_distance.mean()):#.3g} if attention were uniform" in said[1]
    assert re.search(r"channel 7 from what (.+) to what (.+), channel 30 from what \1 to what \2;", said[4])
    limits = {
        "windowed": "In every layer a query sees at most 5 tokens. ",
        "hybrid": "In layer 3 a query sees at most 4 tokens. In layer 7 a query sees at most 6 tokens. ",
        "both sides": "",
        "both sides, windowed": "In layer 2 a query sees at most 3 tokens. In layer 1 a query sees at most 7 tokens. ",
        "a cache that dropped keys": "In layer 1 a query sees at most 4 tokens. In layer 0 a query sees at most 6 tokens. ",
        "strided": "In layer 1 a query sees at most 3 tokens. ",
    }
    assert said[1].count("a query sees at most") == limits[name].count("a query sees at most")
    assert limits[name] in said[1]
    assert (" over what each layer sees" in said[1]) == (name not in ("windowed", "both sides"))
    assert ("There are no attention weights in layers 0, 2, 4–6, 8." in said[2]) == (name == "hybrid")
    assert page.about["withoutAttention"] == ("layers 0, 2, 4–6, 8" if name == "hybrid" else "")
    if model.text.dropped:
        assert said[0].startswith(
            "Measured: queries from 17 on. The first 12 tokens are no longer in the cache. The token that takes most of all "
        )
        assert "first token" not in page.about["findings"][0]["caption"]
    else:
        measured = "Measured: every 4th query. " if model.text.stride > 1 else ""
        assert said[0].startswith(f"{measured}The first token, <0>, is a sink of ")
        assert page.about["tokens"][0] == f"t{padding}"


def test_the_page_says_which_tokens_the_cache_has_dropped(open_page, tmp_path):
    page = open_page(viz.report(MODELS["a cache that dropped keys"].dataset(**ABSENT), tmp_path / "report.html"))
    assert "layers 0, 2, 4–6, 8 without attention weights" in page.locator("#facts").inner_text()
    for position, said in ((3, " · no longer in the cache"), (15, "15: t15 · ")):
        page.locator(f'.token[data-position="{position}"]').hover()
        assert said in page.locator("#tip").inner_text().replace("\u2068", "").replace("\u2069", "")
    page = open_page(viz.report(MODELS["windowed"].dataset(), tmp_path / "padded.html"))
    assert page.locator(".token").count() == LENGTH - PADDING, "padding is no token of the text"
    page.locator('.token[data-position="1"]').hover()
    assert f"1: t{PADDING + 1} · " in page.locator("#tip").inner_text().replace("\u2068", "").replace("\u2069", "")
    assert "without attention" not in page.locator("#facts").inner_text()
