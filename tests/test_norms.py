"""The largest magnitudes of each token and the median of a whole layer, against the definitions written out."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from conftest import CACHE, tiny_model
from hypothesis import given, settings, strategies as st
from oracle import capture, stock_of

from llama_attn import AttentionStats, AttentionStatsConfig, Statistic, record, register_statistic
from llama_attn.analysis import compare, layer_evolution
from llama_attn.stats.merge import merges
from llama_attn.stats.recorder import Recorder
from llama_attn.stats.table import statistics_table
from llama_attn.viz import plot_layer_profile

NEW = ("hidden_top", "hidden_top_channel", "hidden_layer_median")


def stream(name, states, real, top_k=8):
    return statistics_table()[name].stream(states, real, AttentionStatsConfig(top_k=top_k))


@st.composite
def streams(draw):
    batch, tokens, channels = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 9))
    # Few different numbers, so that many are equal.
    number = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -3.0, 3.0, 1e-40, 1e30, float("inf")])
    entries = draw(st.lists(number, min_size=batch * tokens * channels, max_size=batch * tokens * channels))
    states = torch.tensor(entries, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    real = draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    return states.view(batch, tokens, channels), torch.tensor(real).view(batch, tokens)


@settings(max_examples=100, deadline=None)
@given(streams(), st.integers(1, 12))
def test_the_largest_of_each_token(drawn, top_k):
    states, real = drawn
    values, channels = stream("hidden_top", states, real, top_k), stream("hidden_top_channel", states, real, top_k)
    assert (values.dtype, channels.dtype) == (states.dtype, torch.int32)
    for b, row in enumerate(states.tolist()):
        for i, token in enumerate(row):
            order = sorted(range(len(token)), key=lambda channel: (-abs(token[channel]), channel))[:top_k]
            missing = top_k - len(order)
            assert channels[b, i].tolist() == order + [-1] * missing
            np.testing.assert_array_equal(values[b, i], [abs(token[c]) for c in order] + [np.nan] * missing)


@settings(max_examples=100, deadline=None)
@given(streams())
def test_the_median_of_a_layer(drawn):
    states, real = drawn
    found = stream("hidden_layer_median", states, real)
    assert found.dtype == states.dtype
    for b, row in enumerate(states):
        entries = [abs(x) for token, is_real in zip(row.tolist(), real[b], strict=True) if is_real for x in token]
        expected = torch.tensor(statistics.median(entries) if entries else torch.nan, dtype=states.dtype)
        np.testing.assert_array_equal(found[b], expected)


def test_what_is_not_a_number_is_not_left_out():
    states, real = torch.ones(1, 3, 4), torch.tensor([[True, True, False]])
    states[0, 0, 2] = torch.nan
    assert stream("hidden_layer_median", states, real).isnan().all()
    assert stream("hidden_top_channel", states, real, 2)[0, 0].tolist() == [2, 0]
    states[0, 0, 2], states[0, 2] = 1, torch.nan
    assert stream("hidden_layer_median", states, real).item() == 1


def test_the_first_is_the_largest(ids, left_padding):
    with torch.no_grad():
        config = AttentionStatsConfig(statistics=(), norms=True, top_k=3)
        stats = tiny_model()(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats
    for name, first in (("hidden_top", "hidden_max"), ("hidden_top_channel", "hidden_max_channel")):
        assert stats[name].shape == (4, 2, 37, 3)
        torch.testing.assert_close(stats[name][..., 0], stats[first], rtol=0, atol=0, equal_nan=True)
    assert stats["hidden_top"][:, 0, :9].isnan().all()
    assert (stats["hidden_top_channel"][:, 0, :9] == -1).all()


@pytest.mark.parametrize("stride", [1, 3])
def test_padding_does_not_count(stride, ids, left_padding):
    model, config = tiny_model(dtype=torch.float64), AttentionStatsConfig(statistics=NEW, query_stride=stride)
    left_padding[1, 30:] = 0
    inputs = {"input_ids": ids, "attention_mask": left_padding}
    with torch.no_grad():
        stats = model(**inputs, output_attention_stats=config).attention_stats
    layers, last = capture(stock_of(model), **inputs)
    for at, hidden in enumerate([*(layer.hidden for layer in layers), last]):
        for b in range(2):
            measured = [i for i in range(0, 37, stride) if left_padding[b, i]]
            expected = np.median(hidden[b, measured].abs().numpy())
            np.testing.assert_allclose(stats["hidden_layer_median"][at, b], expected, rtol=1e-12)
    everyone = np.median(layers[0].hidden[0].abs().numpy())
    assert abs(stats["hidden_layer_median"][0, 0] - everyone) > 1e-3, "padding would have been seen"


def test_a_row_of_padding_has_no_median(ids):
    mask = torch.ones_like(ids)
    mask[1] = 0
    config = AttentionStatsConfig(statistics=NEW)
    with torch.no_grad():
        stats = tiny_model()(ids, attention_mask=mask, output_attention_stats=config).attention_stats
    assert stats["hidden_layer_median"].isnan().tolist() == [[False, True]] * 4


PROMPT = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}


def test_a_run_of_several_forwards_has_no_median_of_the_layer(ids):
    model = tiny_model(dtype=torch.float64)
    out = model.generate(
        ids, **PROMPT, output_attention_stats=AttentionStatsConfig(statistics="all", norms=True, top_k=5)
    )
    run = out.attention_stats
    assert "hidden_layer_median" not in run
    config = AttentionStatsConfig(statistics=NEW, top_k=5)
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], output_attention_stats=config).attention_stats
    for name in ("hidden_top", "hidden_top_channel"):
        torch.testing.assert_close(run[name], whole[name], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="'hidden_layer_median' is a number of one forward"):
        model.generate(ids, **PROMPT, output_attention_stats=config)
    replayed = model.generate(ids, **PROMPT, num_beams=2, output_attention_stats=config).attention_stats
    assert replayed.replayed
    assert replayed["hidden_layer_median"].isfinite().all(), "one forward over what was returned"


def test_forwards_over_one_cache_have_a_median_each(ids):
    assert [name for name, statistic in statistics_table().items() if not merges(statistic)] == ["hidden_layer_median"]
    model = tiny_model()
    config = AttentionStatsConfig(statistics=(), norms=True)
    with torch.no_grad(), record(model, config) as recording:
        cache = model(ids[:, :20], use_cache=True).past_key_values
        model(ids[:, 20:], **{CACHE: cache})
    assert "hidden_layer_median" not in recording.stats
    assert recording.stats["hidden_top"].shape == (4, 2, 37, 8)
    whole = torch.cat([stats["hidden_top"] for stats in recording.forwards], 2)
    torch.testing.assert_close(recording.stats["hidden_top"], whole, rtol=0, atol=0)
    first, second = (stats["hidden_layer_median"] for stats in recording.forwards)
    assert (first != second).all()
    with torch.no_grad(), record(model, AttentionStatsConfig(statistics=("entropy", NEW[2]))) as recording:
        cache = model(ids[:, :20], use_cache=True).past_key_values
        model(ids[:, 20:], **{CACHE: cache})
    with pytest.raises(
        ValueError, match=r"\['hidden_layer_median'\] are numbers of one forward, .* recording.forwards"
    ):
        _ = recording.stats
    assert [stats.names for stats in recording.forwards] == [("entropy", NEW[2])] * 2


@pytest.mark.usefixtures("restored_registry")
def test_a_number_per_layer_of_the_users_own(ids):
    """Statistics without a token axis, also one that is given the states alone."""
    register_statistic(
        Statistic(
            "hidden_rms", ("hidden_layer", "batch"), "activation", "here", observes="hidden",
            stream=lambda states: states.square().mean((1, 2)).sqrt(), textbook=lambda reference: reference.hidden,
        )
    )  # fmt: skip
    model = tiny_model()
    with torch.no_grad():
        out = model(ids, output_attention_stats=AttentionStatsConfig(statistics="hidden_rms"))
    assert out.attention_stats["hidden_rms"].shape == (4, 2)
    with pytest.raises(ValueError, match="'hidden_rms' is a number of one forward"):
        model.generate(ids, **PROMPT, output_attention_stats=AttentionStatsConfig(statistics="hidden_rms"))


def test_numbers_without_a_token_axis_pass_through(ids, left_padding, tmp_path):
    config = AttentionStatsConfig(statistics=("entropy", *NEW), layers=(2, 0), top_k=4)
    with torch.no_grad():
        stats = tiny_model()(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats
    assert stats["hidden_layer_median"].shape == (3, 2)
    assert "hidden_layer_median  (hidden_layer: 3, batch: 2)  [activation]" in repr(stats)
    assert "hidden_top" in stats._repr_html_()
    part = stats.select(layers=0, batch=1)
    assert torch.equal(part["hidden_layer_median"], stats["hidden_layer_median"][1:, 1:])
    assert torch.equal(part["hidden_top"], stats["hidden_top"][1:, 1:])
    dataset = stats.to_xarray()
    assert dataset.hidden_layer_median.dims == ("hidden_layer", "batch")
    assert dataset.hidden_layer_median.sel(hidden_layer=3, batch=0) == stats["hidden_layer_median"][2, 0]
    assert dataset.hidden_top.coords["rank"].values.tolist() == [0, 1, 2, 3]
    stats.save(tmp_path / "run.safetensors")
    loaded = AttentionStats.load(tmp_path / "run.safetensors")
    for name in NEW:
        assert torch.equal(loaded[name].nan_to_num(), stats[name].nan_to_num())
        assert loaded.labels[name] == stats.labels[name]
    evolution = layer_evolution(stats)
    np.testing.assert_allclose(
        evolution.hidden_layer_median.sel(summary="max"), stats["hidden_layer_median"].amax(1), rtol=1e-6
    )
    lines = compare(stats, stats).query("statistic == 'hidden_layer_median'")
    assert lines.layer.tolist() == [2, 0, 3]
    assert lines.position.isna().all()
    assert (lines.effect == 0).all()


def test_a_profile_without_tokens_has_no_spread(ids):
    with torch.no_grad():
        config = AttentionStatsConfig(statistics=NEW)
        stats = tiny_model()(ids, output_attention_stats=config).attention_stats
    figure = plot_layer_profile(stats, statistic="hidden_layer_median", batch=1)
    (line,) = figure.axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), stats["hidden_layer_median"][:, 1], rtol=1e-6)
    assert not figure.axes[0].collections, "there is nothing to be spread over"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hidden layer median"]


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_outputs_are_measured_once(backend, ids, monkeypatch):
    """A layer that says itself what takes its output: the projection that is seen to take it is not asked again."""
    layers, measure = [], Recorder._measure_outputs

    def counted(self, layer, *given):
        layers.append(layer)
        return measure(self, layer, *given)

    monkeypatch.setattr(Recorder, "_measure_outputs", counted)
    model = tiny_model(backend)
    with torch.no_grad(), record(model, AttentionStatsConfig(norms=True)):
        model(ids)
    assert layers == [0, 1, 2]
