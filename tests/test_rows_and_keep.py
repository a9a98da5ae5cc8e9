"""Weights of chosen queries and the mass on kept keys: as stock eager attention has them, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from calls import calls
from conftest import tiny_model
from hypothesis import given, strategies as st
from oracle import stock_of

from llama_attn import AttentionStats, AttentionStatsConfig, record
from llama_attn.engines import native, torch as reference_engine
from llama_attn.stats.row_positions import GENERATED, positions, read_rows, runs_of_positions
from llama_attn.stats.table import statistics_table
from llama_attn.stats.weight_bins import NUM_WEIGHT_BINS
from llama_attn.testing import relative_error

ROWS = (-1, 4, 30, 31)


def weights_of(model, ids, **inputs):
    """Weights of stock eager attention, (layer, batch, head, query, key)."""
    stock = stock_of(model)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(stock(ids, output_attentions=True, **inputs).attentions)


def measure(model, ids, config, **inputs):
    with torch.no_grad():
        return model(ids, output_attention_stats=config, **inputs).attention_stats


@pytest.mark.parametrize("backend", ["eager", "sdpa", "streaming"])
def test_rows_are_those_of_eager_attention(backend, ids, left_padding):
    model = tiny_model(backend)
    config = AttentionStatsConfig(rows=ROWS, statistics="entropy")
    stats = measure(model, ids, config, attention_mask=left_padding)
    assert stats.rows == (4, 30, 31, 36)
    expected = weights_of(model, ids, attention_mask=left_padding)[..., list(stats.rows), :]
    padding = ~left_padding.bool()
    expected = expected.masked_fill(padding[None, :, None, None], torch.nan)
    expected = expected.masked_fill(padding[:, list(stats.rows)][None, :, None, :, None], torch.nan)
    assert padding[0, 4]
    torch.testing.assert_close(stats["row_weights"], expected, rtol=0, atol=1e-5, equal_nan=True)


def test_rows_of_the_demo_model(smollm2):
    """A forward and what is generated, all layers and heads, against the weights of stock eager attention."""
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is Paris. The capital of Spain is", return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_attention_stats=AttentionStatsConfig(rows="generated"),
    )  # fmt: skip
    stats, length = output.attention_stats, output.sequences.shape[1] - 1
    assert stats.rows == tuple(range(ids.shape[1] - 1, length))
    weights = weights_of(model, output.sequences[:, :-1])
    assert float((stats["row_weights"] - weights[..., ids.shape[1] - 1 :, :]).abs().max()) < 2e-5
    whole = measure(model, output.sequences[:, :-1], AttentionStatsConfig(rows=slice(-3, None), heads=(5, 2)))
    assert whole.rows == tuple(range(length - 3, length))
    assert float((whole["row_weights"] - weights[:, :, [5, 2], -3:]).abs().max()) < 2e-5


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_generated_rows_inside_record(new_tokens, ids):
    model = tiny_model()
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    config = AttentionStatsConfig(rows=GENERATED)
    own = model.generate(ids, output_attention_stats=config, return_dict_in_generate=True, **settings).attention_stats
    stock = stock_of(model)
    with record(stock, config) as recording:
        stock.generate(ids, **settings)
    assert recording.stats.rows == own.rows == tuple(range(36, 36 + new_tokens))
    torch.testing.assert_close(recording.stats["row_weights"], own["row_weights"], rtol=0, atol=1e-6, equal_nan=True)


def test_beams_have_the_rows_of_what_they_return(ids):
    model = tiny_model()
    output = model.generate(
        ids[:1], max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_attention_stats=AttentionStatsConfig(rows=GENERATED, keep=ids[:1] % 2 == 0),
    )  # fmt: skip
    stats = output.attention_stats
    assert stats.replayed
    assert stats.rows[0] == ids.shape[1] - 1
    weights = weights_of(model, output.sequences[:, :-1])
    torch.testing.assert_close(stats["row_weights"], weights[..., ids.shape[1] - 1 :, :], rtol=0, atol=1e-5)
    kept = torch.cat([ids[:1] % 2 == 0, torch.ones(1, weights.shape[-1] - ids.shape[1], dtype=torch.bool)], 1)
    torch.testing.assert_close(stats["kept_mass"], (weights * kept).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "streaming", "streaming_torch"])
@pytest.mark.parametrize("heads", [None, (3, 0)])
def test_kept_mass_of_every_kv_head(backend, heads, ids):
    model = tiny_model(backend)
    kv_heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    keep = torch.rand(layers, len(ids), kv_heads, ids.shape[1], generator=torch.Generator().manual_seed(3)) < 0.5
    stats = measure(model, ids, AttentionStatsConfig(keep=keep, heads=heads))
    group = model.config.num_attention_heads // kv_heads
    expected = (weights_of(model, ids) * keep.repeat_interleave(group, 2)[:, :, :, None]).sum(-1)
    expected = expected if heads is None else expected[:, :, list(heads)]
    torch.testing.assert_close(stats["kept_mass"], expected, rtol=0, atol=1e-5)
    part = measure(model, ids, AttentionStatsConfig(keep=keep[[2, 0]], layers=(2, 0), heads=heads))
    torch.testing.assert_close(part["kept_mass"], expected[[2, 0]], rtol=0, atol=1e-5)


def test_what_is_generated_counts_as_kept(ids):
    model = tiny_model()
    keep = ids % 3 == 0
    output = model.generate(
        ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
        output_attention_stats=AttentionStatsConfig(keep=keep),
    )  # fmt: skip
    kept = torch.cat([keep, torch.ones(len(ids), 4, dtype=torch.bool)], 1)
    expected = (weights_of(model, output.sequences[:, :-1]) * kept[:, None, None]).sum(-1)
    torch.testing.assert_close(output.attention_stats["kept_mass"], expected, rtol=0, atol=1e-5)


def test_bins_of_weights_at_their_edges():
    """Scores of 0 and of ln 2 give weights that are powers of two, which belong to the bin that they close."""
    from llama_attn.stats.weight_bins import _bins

    powers = 2.0 ** -torch.arange(40)
    for dtype in (torch.float32, torch.float64):
        at = powers.to(dtype)
        above = torch.nextafter(at, torch.tensor(2.0, dtype=dtype))
        assert _bins(at).tolist() == [min(b, 30) for b in range(40)]
        assert _bins(above)[1:].tolist() == [min(b, 30) for b in range(39)]
    assert _bins(torch.zeros(1)).tolist() == [30]


@pytest.mark.parametrize("backend", ["sdpa", "streaming", "streaming_torch"])
def test_the_histogram_of_weights(backend, ids, left_padding):
    model = tiny_model(backend, torch.float64)
    config = AttentionStatsConfig(statistics=("weight_count", "weight_mass"))
    stats = measure(model, ids, config, attention_mask=left_padding)
    assert stats["weight_count"].shape[-1] == NUM_WEIGHT_BINS == len(stats.coordinates()["weight_bin"])
    rows = measure(model, ids, AttentionStatsConfig(rows=slice(None)), attention_mask=left_padding)["row_weights"]
    seen = (torch.arange(37) <= torch.arange(37)[:, None]) & ~rows.isnan()
    bins = torch.where(seen, (-rows.log2()).floor().clamp(max=30), -1)
    real = left_padding.sum(-1)[None, :, None]
    for b in range(NUM_WEIGHT_BINS):
        torch.testing.assert_close(
            stats["weight_count"][..., b], (bins == b).double().sum((-2, -1)) / real, rtol=0, atol=1e-9
        )
        mass = torch.where(bins == b, rows, 0).sum((-2, -1)) / real
        torch.testing.assert_close(stats["weight_mass"][..., b], mass, rtol=0, atol=1e-9)


def test_they_are_saved_and_selected(tmp_path, ids):
    config = AttentionStatsConfig(rows=slice(-9, None, 3), keep=ids >= 0, statistics="all")
    stats = measure(tiny_model(), ids, config)
    stats.save(tmp_path / "run.safetensors")
    loaded = AttentionStats.load(tmp_path / "run.safetensors")
    assert loaded.rows == stats.rows == (28, 31, 34)
    assert loaded.config.rows == slice(-9, None, 3)
    torch.testing.assert_close(loaded["row_weights"], stats["row_weights"])
    part = stats.select(queries=slice(30, 35), heads=2)
    assert part.rows == (31, 34)
    torch.testing.assert_close(part["row_weights"], stats["row_weights"][:, :, [2], 1:])
    assert "row_weights" not in stats.select(queries=(3, 4))
    dataset = stats.to_xarray()
    assert dataset["row_weights"].sel(row=31, key=2).shape == (3, 2, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": (37,)}, "expected positions from -37 to 36, got .37,."),
        ({"rows": (-38,)}, "expected positions from -37 to 36"),
        ({"rows": slice(40, 50)}, "none of the positions 0 to 36"),
        ({"keep": torch.ones(2, 36, dtype=torch.bool)}, "expected batch 2 and 37 keys, got batch 2 and 36"),
        ({"keep": torch.ones(4, 2, 2, 37, dtype=torch.bool)}, "expected 1 or 3 layers, got 4"),
        ({"keep": torch.ones(3, 2, 3, 37, dtype=torch.bool)}, "expected 1 or 2 KV heads, got 3"),
    ],
)
def test_what_does_not_fit_the_forward(settings, message, ids):
    model = tiny_model("streaming")
    runs = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=message):
        measure(model, ids, AttentionStatsConfig(**settings))
    hook.remove()
    assert not runs, "the model went on"


@pytest.mark.parametrize(
    "rows", [(), (1, 1), "last", (1.5,), (True,), slice(0, 5, 0), slice(0, 5, -1), slice("a", None), object()]
)
def test_rows_that_mean_nothing(rows):
    with pytest.raises(ValueError, match="rows: expected distinct positions"):
        AttentionStatsConfig(rows=rows)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.ones(2, 5), "booleans"),
        (torch.ones(5, dtype=torch.bool), "booleans"),
        (torch.tensor([[True, False], [False, False]]), "nothing is kept in layer 0, row 1"),
        (torch.ones(0, 4, dtype=torch.bool), "booleans"),
    ],
)
def test_masks_that_mean_nothing(keep, message):
    with pytest.raises(ValueError, match=f"keep: .*{message}"):
        AttentionStatsConfig(keep=keep)


def test_the_end_of_what_is_generated_is_not_known(ids):
    model = tiny_model()
    config = AttentionStatsConfig(rows=(-1,))
    with pytest.raises(ValueError, match=r'count from the end .* use "generated"'):
        model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_attention_stats=config)
    with record(model, config) as recording:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [stats.rows for stats in recording.forwards] == [(36,), (37,), (38,)]
    with pytest.raises(ValueError, match="count from the end"):
        _ = recording.stats


def test_weights_that_would_fill_the_memory(ids, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("llama_attn.stats.row_positions.MOST_BYTES", 2**17)
    config = AttentionStatsConfig(rows=slice(None))
    with pytest.raises(ValueError, match=r"rows: .* GiB.*fewer rows, `layers` or `heads`, or offload"):
        measure(model, ids, config)
    assert measure(model, ids, replace(config, offload="cpu"))["row_weights"].shape == (3, 2, 6, 37, 37)
    assert measure(model, ids, replace(config, layers=(1,)))["row_weights"].shape[0] == 1
    pages = {"SC_AVPHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(ValueError, match=r"rows: .*choose fewer rows, `layers` or `heads`$"):
        measure(model, ids, replace(config, offload="cpu"))


def test_positions():
    assert positions(slice(-4, None), range(10), None) == (6, 7, 8, 9)
    assert positions((-1, 0), range(10), None) == (0, 9)
    assert positions(GENERATED, range(10), None) == (9,)
    assert positions(GENERATED, range(10, 12), None) == (10, 11)
    assert positions(GENERATED, range(10), 10) == (9,)
    assert positions(GENERATED, range(5), 10) == ()
    assert positions((3, 11), range(10, 12), None) == (11,)
    assert runs_of_positions((1, 2, 3, 7, 9, 10)) == [range(1, 4), range(7, 8), range(9, 11)]
    assert runs_of_positions(()) == []
    assert read_rows(torch.tensor([3, 1])) == (3, 1)
    assert read_rows(-1) == (-1,)


@pytest.mark.usefixtures("built_native")
@pytest.mark.parametrize("engine", [reference_engine, native], ids=["torch", "native"])
@given(call=calls(), random=st.randoms())
def test_an_engine_takes_chosen_rows_from_the_blocks_of_all(engine, call, random):
    statistics = [statistics_table()[name] for name in ("entropy", "row_weights")]
    everyone = range(call.query.shape[2])
    chosen = sorted(random.sample(everyone, random.randint(1, len(everyone))))
    wanted = replace(call.wanted(statistics), rows=chosen)
    sizes = {"block_rows": random.randint(1, 9)} if engine is reference_engine else {"block_keys": 64}
    walk = engine.walk(call.query, call.key, call.value, call.visibility, call.scoring, wanted, **sizes)
    shown = (call.sees.any(-1) & call.real_queries)[:, None, :, None]
    expected = statistics[1].textbook(call.reference()).masked_fill(~shown, torch.nan)[:, :, chosen]
    assert relative_error(walk.raw["row_weights"], expected) < 1e-10
    assert walk.raw["entropy"].shape[2] == len(everyone)


@pytest.mark.usefixtures("built_native")
@pytest.mark.parametrize("backend", ["streaming_native", "streaming_torch"])
def test_rows_need_no_second_walk(backend, monkeypatch):
    walks = []

    def counted(engine, walk):
        def walked(query, *rest):
            walks.append(query.shape[2])
            return walk(query, *rest)

        monkeypatch.setattr(engine, "walk", walked)

    for engine in (native, reference_engine):
        counted(engine, engine.walk)
    config = AttentionStatsConfig(statistics=("entropy",), rows=(5, 30))
    measure(tiny_model(backend), torch.arange(3, 40)[None], config)
    assert walks == [37] * 3
