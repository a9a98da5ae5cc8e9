"""Every engine on calls of every kind: statistics, output and gradients against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import BOUND, CPU, EVERYTHING, KINDS, LARGE, calls, make_call
from engines import SIZES, check, check_gradients, refused, taken
from hypothesis import given
from oracle import rounding_bound

from llama_attn import AttentionStatsConfig
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import relative_error


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, dtype, engine):
    check(engine, make_call(**KINDS[kind], dtype=dtype))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("scores", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", LARGE)
def test_many_blocks(kind, scores, dtype, engine):
    call = make_call(**{"queries": 140} | LARGE[kind] | scores, dtype=dtype)
    sizes = taken(engine, {"block_rows": 24, "tile_rows": 24, "block_keys": 64})
    check(engine, call, sizes=sizes)
    if refused(engine, call):
        return
    # The output does not depend on what is measured, nor the numbers on whether there is an output.
    walk, plain = call.walk(engine, **sizes), call.walk(engine, (), **sizes)
    assert not plain.raw
    assert torch.equal(plain.output, walk.output)
    assert torch.equal(plain.logsumexp, walk.logsumexp)
    observed = replace(call, value=None).walk(engine, **sizes)
    assert observed.output is None
    for name, values in walk.raw.items():
        assert torch.equal(observed.raw[name].nan_to_num(), values.nan_to_num()), name


@given(calls(dtypes=(torch.float64, torch.float32, torch.bfloat16)), SIZES)
def test_any_call(engine, call, sizes):
    scoring, exact = call.scoring, call.query.dtype == torch.float64
    # A bias and a sink are as large as scores may be, and as roundly added.
    largest = max(float(t.abs().max()) for t in (scoring.position_bias, scoring.sinks, torch.zeros(1)) if t is not None)
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    bound = rounding_bound(call.query, call.key) + 8 * eps * (largest + 1)
    check(engine, call, bound, sizes=taken(engine, sizes), gradients=exact)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("channels", "value_channels"), [(12, 6), (6, 12), (192, 128), (256, 256), (320, 64), (576, 512), (1, 1), (80, 576)]
)
def test_head_sizes(channels, value_channels, dtype, engine):
    shape = {"queries": 70, "heads": 4, "kv_heads": 1, "channels": channels, "value_channels": value_channels}
    check(engine, make_call(**shape, **EVERYTHING, spans="window", width=20, dtype=dtype))


def test_as_many_heads_as_a_latent_attention_has(engine):
    """128 query heads that share one key: more rows in a tile than it should have."""
    check(engine, make_call(heads=128, kv_heads=1, sinks=(-1.0, 1.0), spans="window", batch=1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
def test_a_bias_that_is_shared(shape, engine):
    call = make_call(bias=shape, queries=70)
    bias = call.scoring.position_bias.mT.contiguous().mT
    check(engine, replace(call, scoring=replace(call.scoring, position_bias=bias)))


def test_a_bias_that_hides(engine):
    """−∞ in it, and zero times it is no number."""
    call = make_call(queries=90, sinks=(-1.0, 1.0))
    hidden = torch.rand(1, 1, 90, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[..., range(90), range(90)] = False
    bias = torch.zeros(1, 1, 90, 90, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    biased = replace(call, scoring=replace(call.scoring, position_bias=bias))
    walk, known = biased.walk(engine), biased.known(engine)
    values = biased.finished(walk.raw, known)
    for name, expected in biased.expected(known).items():
        assert relative_error(values[name], expected) <= 1e-10, name
    check_gradients(engine, biased, walk)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("score", [-torch.inf, -1e30, -1e4, -200.0, -50.0, 50.0, 200.0, 1e4, 1e30])
def test_sinks_that_take_nothing_or_everything(score, dtype, engine):
    """In float32 the exponentials of some overflow."""
    check(engine, make_call(sinks=(score, score), padding=True, dtype=dtype))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_cap_is_a_hyperbolic_tangent(dtype, engine):
    """To two roundings of each result, through the largest score of one key."""
    numbers = torch.cat([torch.linspace(-22, 22, 40_001), torch.logspace(-30, 1.3, 4_000), torch.zeros(1)]).to(dtype)
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    query = torch.cat([numbers, infinite])[None, None, :, None]
    visibility = Visibility(1, 0, 1, CPU, causal=False, stop_query=query.shape[2], aligned=False)
    wanted = Wanted([statistics_table()["max_logit"]], AttentionStatsConfig())
    capped = engine.walk(query, torch.ones(1, 1, 1, 1, dtype=dtype), None, visibility, Scoring(1.0, 1.0), wanted)
    actual, expected = capped.raw["max_logit"].flatten().double(), query.flatten().double().tanh()
    assert ((actual - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("missing", ["softcap", "sinks", "position_bias", "first_key"])
def test_the_comparison_can_fail(missing, engine):
    call = make_call(spans="window", **EVERYTHING)
    if missing == "first_key":
        wrong = replace(call, visibility=replace(call.visibility, first_key=None))
    else:
        wrong = replace(call, scoring=replace(call.scoring, **{missing: None}))
    known = call.known(engine)
    values = wrong.finished(wrong.walk(engine).raw, known)
    assert relative_error(values["entropy"], call.expected(known)["entropy"]) > 1e-3
