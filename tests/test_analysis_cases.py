"""Analysis of unusual runs: masks, caches, one token, no data, bad arguments."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CACHE, tiny_model
from hostile import changed
from matplotlib.colors import to_rgb
from oracle import visible_by_hand

import llama_attn
from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.analysis import (
    classify_heads,
    compare,
    layer_evolution,
    locality,
    massive_activations,
    sink_positions,
    sink_rate,
    summarize_layers,
)
from llama_attn.analysis.roles import THRESHOLDS
from llama_attn.analysis.uniform import measured_with, uniform_attention
from llama_attn.viz.figures.grids import ROLE_COLOURS
from llama_attn.viz.report.findings import findings


def uniform_by_hand(visible, positions, window=5):
    share = visible / np.maximum(visible.sum(-1, keepdims=True), 1)
    with np.errstate(invalid="ignore"):
        received = share.sum(1) / visible.sum(1)
    distance = np.abs(positions[:, None] - np.arange(visible.shape[-1]))
    real = visible.any(-1)
    far, near = ((share * what).sum(-1) for what in (distance, distance < window))
    return received, np.where(real, far, np.nan), np.where(real, near, np.nan)


@pytest.mark.parametrize("case", ["plain", "left", "right", "holes", "packed", "stride", "bidirectional", "window"])
def test_uniform_attention(case, ids, left_padding):
    real = {"left": left_padding, "right": left_padding.flip(-1)}.get(case, torch.ones_like(ids))
    changes, visibility, config = {}, {}, AttentionStatsConfig(window=5, query_stride=3 if case == "stride" else 1)
    if case == "holes":
        real = left_padding.clone()
        real[1, 11:20] = 0
    if case == "packed":
        changes = {
            "position_ids": torch.cat([torch.arange(20), torch.arange(17)])[None].expand(2, -1),
            "use_cache": False,
        }
        visibility = {"sequences": torch.tensor([[0] * 20 + [1] * 17] * 2)}
    if case == "bidirectional":
        changes, visibility = {"is_causal": False}, {"causal": False}
    if case == "window":
        distance = torch.arange(37)[:, None] - torch.arange(37)
        changes = {"attention_mask": ((distance >= 0) & (distance < 7)).expand(2, 1, -1, -1)}
    else:
        changes["attention_mask"] = None if case == "packed" else real
    with torch.no_grad():
        stats = tiny_model()(ids, output_attention_stats=config, **changes).attention_stats
    visible, queries, _, _ = visible_by_hand(
        real.bool(), 37, mask=changes["attention_mask"] if case == "window" else None, **visibility
    )
    visible = (visible[:, 0] & queries[:, :, None]).numpy()[:, :: config.query_stride]
    found = uniform_attention(stats.to_xarray())
    expected = uniform_by_hand(visible, np.arange(37)[:: config.query_stride])
    for name, value in zip(("received", "mean_distance", "local_mass"), expected, strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


def test_uniform_attention_behind_a_cache(ids):
    model = tiny_model()
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        stats = model(
            ids[:, 20:], **{CACHE: cache}, output_attention_stats=AttentionStatsConfig(window=5)
        ).attention_stats
    visible = np.tril(np.ones((37, 37), dtype=bool))[20:]
    found = uniform_attention(stats.to_xarray())
    expected = uniform_by_hand(np.stack([visible, visible]), np.arange(20, 37))
    for name, value in zip(("received", "mean_distance", "local_mass"), expected, strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-12)


def test_a_mask_that_no_rule_explains_has_no_baseline(ids):
    mask = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0] = torch.ones(37, 37).tril().bool()
    with torch.no_grad():
        config = AttentionStatsConfig(statistics="all")
        ds = tiny_model()(ids, attention_mask=mask, output_attention_stats=config).attention_stats.to_xarray()
    boost = sink_positions(ds).boost
    assert boost.sel(batch=0).notnull().all()
    assert boost.sel(batch=1).isnull().all()
    assert (locality(ds).reach.sel(batch=1) == "no data").all()
    assert not sink_positions(ds).layer_sink.sel(batch=1).any()
    assert classify_heads(ds.isel(batch=[1])).sink_score.isna().all()
    words = "".join(word for word in findings(ds.isel(batch=[1]))[0].words if isinstance(word, str))
    assert words.endswith(
        "Other sinks are not named: behind this mask it is unknown what uniform attention would give."
    )
    assert "No other token" not in words


@pytest.fixture
def everything(ids):
    config = AttentionStatsConfig(statistics="all", norms=True, layers=(2, 0), heads=(4, 1))
    with torch.no_grad():
        return tiny_model()(ids, output_attention_stats=config).attention_stats


def test_selected_layers_and_heads_keep_their_names(everything, ids):
    ds = everything.to_xarray()
    assert sink_rate(ds, by="layer").layer.values.tolist() == [2, 0]
    assert sink_rate(ds, by="head")["head"].values.tolist() == [4, 1]
    assert [tuple(pair) for pair in classify_heads(ds)[["layer", "head"]].values] == [(2, 4), (2, 1), (0, 4), (0, 1)]
    assert layer_evolution(ds).hidden_layer.values.tolist() == [2, 0, 3]
    assert massive_activations(ds).hidden_layer.values.tolist() == [2, 0, 3]
    assert summarize_layers(ds).index.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, ""),
        ({"layers": (2, 0)}, "layers 0, 2 of 3"),
        ({"layers": (0, 1, 2), "heads": (0, 1, 5)}, "heads 0–1, 5 of 6"),
        ({"query_stride": 3}, "every 3rd query"),
        ({"layers": (1,), "heads": (4,), "query_stride": 12}, "layer 1 of 3, head 4 of 6, every 12th query"),
    ],
)  # fmt: skip
def test_what_rests_on_a_part_says_which(config, said, ids, tmp_path):
    config = AttentionStatsConfig(statistics="all", norms=True, **config)
    with torch.no_grad():
        stats = tiny_model()(ids[:1], output_attention_stats=config).attention_stats
    answers = [
        function(stats) for function in (sink_rate, sink_positions, locality, layer_evolution, massive_activations,
                                         classify_heads, summarize_layers)
    ]  # fmt: skip
    assert {answer.attrs["part"] for answer in answers} == {said}
    found = findings(stats.to_xarray())
    assert all(("measured: " in finding.caption) == bool(said) for finding in found)
    assert all((finding.words[0] == f"Measured: {said}. ") == bool(said) for finding in found)
    first, last = min(stats.layers), max(stats.layers)
    assert f"mean entropy of layer {first} and of layer {last}" in found[2].caption
    entropy = stats.to_xarray().entropy
    ends = [f"{float(entropy.sel(layer=layer).mean()):#.3g}" for layer in (first, last)]
    assert found[2].figure == " → ".join(ends), "along the model, in whatever order the layers were given"


def test_mixed_is_not_no_data():
    assert not [role for role, colour in ROLE_COLOURS.items() if len(set(to_rgb(colour))) == 1], "grey is no data"
    page = (Path(llama_attn.__file__).parent / "viz/report/page/colours.js").read_text()
    roles = page.split("const ROLES = {")[1].split("};")[0]
    assert re.findall(r"(\w+): [O\"]", roles) == list(ROLE_COLOURS) == [*THRESHOLDS, "mixed"]
    assert "grey" not in roles


def test_what_a_cache_holds_was_not_measured(ids):
    model = tiny_model()
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        stats = model(ids[:, 20:], **{CACHE: cache}, output_attention_stats=True).attention_stats
    assert sink_rate(stats).attrs["part"] == "queries from 20 on"


def test_one_token(ids):
    config = AttentionStatsConfig(statistics="all", norms=True)
    with torch.no_grad():
        ds = tiny_model()(ids[:, :1], output_attention_stats=config).attention_stats.to_xarray()
    assert sink_rate(ds) == 1, "all attention goes to the only key"
    sinks = sink_positions(ds)
    assert (sinks.position == 0).all()
    assert (sinks.boost == 1).all(), "which is what uniform attention would give"
    assert (locality(ds).reach == "no data").all()
    assert np.isfinite(layer_evolution(ds).entropy).all()
    assert classify_heads(ds).role.isna().all()
    assert not massive_activations(ds).massive.any()
    assert (compare(ds, ds).effect == 0).all()


def test_a_layer_without_data(everything):
    for tensor in everything.values.values():
        if tensor.is_floating_point():
            tensor[0] = torch.nan
    ds = everything.to_xarray()
    known = everything.select(layers=0)
    assert sink_rate(ds) == sink_rate(known)
    assert np.isnan(sink_rate(ds, by="layer").sel(layer=2))
    assert (sink_positions(ds).position.sel(layer=2) == -1).all()
    np.testing.assert_array_equal(sink_positions(ds)["heads"], sink_positions(known)["heads"])
    assert (locality(ds).reach.sel(layer=2) == "no data").all()
    assert layer_evolution(ds).entropy.sel(layer=2).isnull().all()
    frame = classify_heads(ds)
    assert frame[frame.layer == 2].role.isna().all()
    assert frame[frame.layer == 0].role.notna().all()
    assert not massive_activations(ds).massive.sel(hidden_layer=2).any()
    frame = compare(ds, ds)
    assert frame[frame.layer == 2].effect.isna().all()
    assert frame.effect.isna().values.tolist() == sorted(frame.effect.isna())


def test_a_row_of_padding_only(ids, left_padding):
    left_padding[0] = 0
    config = AttentionStatsConfig(statistics="all", norms=True)
    with torch.no_grad():
        stats = tiny_model()(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats
    alone = stats.select(batch=1)
    assert sink_rate(stats) == sink_rate(alone)
    assert sink_rate(stats).attrs["T_shortest"] == 0
    assert (sink_positions(stats).position.sel(batch=0) == -1).all()
    assert locality(stats).local_mass.sel(batch=0).isnull().all()
    assert (massive_activations(stats).appears.sel(batch=0) == -1).all()
    for role in THRESHOLDS:
        np.testing.assert_array_equal(classify_heads(stats)[f"{role}_score"], classify_heads(alone)[f"{role}_score"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ds: sink_rate(ds, epsilon=1.5), "epsilon: expected a number from 0 up to but not 1, got 1.5"),
        (lambda ds: sink_rate(ds, epsilon="a"), "epsilon: expected a number"),
        (lambda ds: sink_positions(ds, epsilon=np.nan), "epsilon: expected a number"),
        (lambda ds: sink_positions(ds, fewest_queries=0), "fewest_queries: expected a positive integer, got 0"),
        (lambda ds: sink_positions(ds, fewest_queries=True), "fewest_queries: expected a positive integer, got True"),
        (lambda ds: sink_rate(ds, key=37), "key: expected 0 to 36, the real keys of a row, got 37"),
        (lambda ds: sink_rate(ds, key=-1), "key: expected 0 to 36"),
        (lambda ds: sink_rate(ds, key=True), "key: expected 0 to 36"),
        (lambda ds: sink_rate(ds, by="key"), "by: expected None, 'layer', 'head' or 'batch', got 'key'"),
        (lambda ds: classify_heads(ds, slice(50, None)), r"query_slice: slice\(50, None, None\) holds no query; there"),
        (lambda ds: classify_heads(ds, 5), "query_slice: expected a slice"),
        (lambda ds: massive_activations(ds, magnitude=-1), "magnitude: expected a number from 0 up, got -1"),
        (lambda ds: massive_activations(ds, ratio=np.nan), "ratio: expected a number from 0 up, got nan"),
        (lambda ds: measured_with(ds.assign_attrs(config="{}"), "window"), "does not say window"),
        (lambda ds: locality(ds.drop_attrs()), "does not say window; take the dataset from AttentionStats.to_xarray"),
        (lambda ds: layer_evolution(ds[["visible_keys"]]), "no statistic of layers; there are"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message, everything):
    with pytest.raises(ValueError, match=message):
        call(everything.to_xarray())


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (sink_rate, "received"),
        (sink_positions, "received"),
        (locality, "mean_distance"),
        (classify_heads, "induction"),
        (massive_activations, "hidden_median"),
        (summarize_layers, "hidden_max_channel"),
    ],
)
def test_a_missing_statistic_says_how_to_measure_it(function, missing, everything):
    ds = everything.to_xarray().drop_vars([missing, "hidden_top", "hidden_layer_median"])
    with pytest.raises(
        ValueError,
        match=rf'\[\'{missing}\'\] not measured; measure with AttentionStatsConfig\(statistics=\(…, "{missing}"\)\)',
    ):
        function(ds)
    with pytest.raises(TypeError, match=r"expected AttentionStats, xarray\.Dataset or the path"):
        function(tiny_model())


def test_every_kind_of_source(everything, tmp_path):
    everything.save(tmp_path / "run.safetensors")
    for source in (everything, everything.to_xarray(), tmp_path / "run.safetensors"):
        assert sink_rate(source) == sink_rate(everything)
        assert compare(source, everything).effect.max() == 0


def test_a_selection_of_heads_is_a_part_of_all(ids, tmp_path):
    """Which are all is in the file; of one that was written before it was, they are named where they cannot be all."""
    with torch.no_grad():
        stats = tiny_model()(ids, output_attention_stats=True).attention_stats
    stats.select(heads=range(4)).save(tmp_path / "part.safetensors")
    assert locality(tmp_path / "part.safetensors").attrs["part"] == "heads 0–3 of 6"
    assert locality(stats.select(heads=range(6))).attrs["part"] == ""
    asked_for_all = AttentionStatsConfig(heads=tuple(range(6)))
    with torch.no_grad():
        assert locality(tiny_model()(ids, output_attention_stats=asked_for_all).attention_stats).attrs["part"] == ""
    for heads, said in ((range(4), ""), ([1, 2], "heads 1–2")):
        stats.select(heads=heads).save(tmp_path / "part.safetensors")
        older = changed((tmp_path / "part.safetensors").read_bytes(), lambda header: header.pop("num_heads"))
        (tmp_path / "older.safetensors").write_bytes(older)
        assert AttentionStats.load(tmp_path / "older.safetensors").num_heads == 0
        assert locality(tmp_path / "older.safetensors").attrs["part"] == said
