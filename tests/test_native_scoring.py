"""The C++ engine on calls of every kind: statistics, output and gradients against float64."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from calls import CPU, calls, make_call
from hypothesis import given
from oracle import rounding_bound
from test_calls import BOUND, KINDS
from test_native import SIZES

from llama_attn import AttentionStatsConfig
from llama_attn.engines import native
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import relative_error

pytestmark = pytest.mark.usefixtures("built_native")

KNOWN = tuple(statistic for statistic in statistics_table().values() if native.knows(statistic))
DEFAULT = tuple(statistic for statistic in KNOWN if statistic.default)
# Beyond a tile of 24 rows and a block of 64 keys, with rows that see nothing, and windows that begin within a panel.
LARGE = {
    "causal": {},
    "causal, left padding": {"padding": True},
    "window": {"spans": "window", "width": 9},
    "window wider than a block": {"spans": "window", "width": 90},
    "window, the cache has dropped keys": {"spans": "window", "width": 90, "queries": 70, "before": 70, "offset": 99},
    "chunks": {"spans": "chunk", "width": 33, "padding": True},
    "window both ways": {"spans": "both sides", "width": 40},
    "random spans": {"spans": "random", "padding": True},
    "documents": {"packed": True, "spans": "window", "width": 30},
    "every third query": {"spans": "window", "width": 70, "stride": 3},
    "cross-attention": {"aligned": False, "after": 60, "padding": True},
    "cross-attention to few keys": {"aligned": False, "after": -100},
}
EVERYTHING = {"softcap": 3.0, "sinks": (-1.0, 2.0), "bias": (1, 4), "spread": 1.5}


def known(call):
    return [statistic for statistic in KNOWN if call.visibility.aligned or not statistic.of_distance]


def check_statistics(call, bound, **sizes):
    """Compare what is measured, and the output; return the walk."""
    walk = call.walk(native, KNOWN, **sizes)
    assert set(walk.raw) == {statistic.name for statistic in KNOWN}
    values = call.finished(walk.raw, known(call))
    for name, expected in call.expected(known(call)).items():
        error = relative_error(values[name], expected)
        assert error <= bound, (name, error)
    expected, real = call.reference().output.transpose(1, 2), call.real_queries
    bound = bound * max(1.0, float(call.value.abs().max())) + torch.finfo(call.value.dtype).eps
    assert relative_error(walk.output[real], expected[real]) <= bound
    assert not walk.output.isnan().any()
    return walk


def check_gradients(call, walk, bound=None, **sizes):
    shape = walk.output.shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(call.query.dtype) / shape[-1] ** 0.5
    scoring = call.scoring
    given_tensors = (call.query, call.key, call.value, scoring.position_bias, scoring.sinks)
    leaves = [None if tensor is None else tensor.double().clone().requires_grad_() for tensor in given_tensors]
    there = [leaf for leaf in leaves if leaf is not None]
    expected = iter(torch.autograd.grad(call.written_out(*leaves), there, grad.double()))
    actual = native.backward(
        grad, call.query, call.key, call.value, walk.output, walk.logsumexp, call.visibility, scoring, **sizes
    )
    for name, mine, tensor in zip(actual._fields, actual, given_tensors, strict=True):
        assert (mine is None) == (tensor is None), name
        if tensor is not None:
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
            error = relative_error(mine, next(expected))
            assert error <= (bound or BOUND[call.query.dtype]), (name, error)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, dtype):
    call = make_call(**KINDS[kind], dtype=dtype)
    check_gradients(call, check_statistics(call, BOUND[dtype]))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("scores", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", LARGE)
def test_many_tiles_and_blocks(kind, scores, dtype):
    call = make_call(**{"queries": 140} | LARGE[kind] | scores, dtype=dtype)
    sizes = {"tile_rows": 24, "block_keys": 64}
    walk = check_statistics(call, BOUND[dtype], **sizes)
    check_gradients(call, walk, **sizes)
    # The output does not depend on what is measured, nor the numbers on whether there is an output.
    plain = native.walk(call.query, call.key, call.value, call.visibility, call.scoring, None, **sizes)
    assert torch.equal(plain.output, walk.output)
    assert torch.equal(plain.logsumexp, walk.logsumexp)
    observed = native.walk(call.query, call.key, None, call.visibility, call.scoring, call.wanted(KNOWN), **sizes)
    for name, values in walk.raw.items():
        assert torch.equal(observed.raw[name].nan_to_num(), values.nan_to_num()), name


@given(calls(dtypes=(torch.float64, torch.float32, torch.bfloat16)), SIZES)
def test_any_call(call, sizes):
    scoring, exact = call.scoring, call.query.dtype == torch.float64
    largest = max(float(t.abs().max()) for t in (scoring.position_bias, scoring.sinks, torch.zeros(1)) if t is not None)
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    sizes = dict(zip(("tile_rows", "block_keys"), sizes, strict=True))
    walk = check_statistics(call, rounding_bound(call.query, call.key) + 8 * eps * (largest + 1), **sizes)
    if exact:
        check_gradients(call, walk, **sizes)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("channels", "value_channels"), [(12, 6), (6, 12), (192, 128), (256, 256), (320, 64), (576, 512), (1, 1), (80, 576)]
)
def test_head_sizes(channels, value_channels, dtype):
    shape = {"queries": 70, "heads": 4, "kv_heads": 1, "channels": channels, "value_channels": value_channels}
    call = make_call(**shape, **EVERYTHING, spans="window", width=20, dtype=dtype)
    check_gradients(call, check_statistics(call, BOUND[dtype]))


def test_as_many_heads_as_a_latent_attention_has():
    """128 query heads that share one key: more rows in a tile than it should have."""
    call = make_call(heads=128, kv_heads=1, sinks=(-1.0, 1.0), spans="window", batch=1)
    check_gradients(call, check_statistics(call, 1e-10))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
def test_a_bias_that_is_shared(shape):
    call = make_call(bias=shape, queries=70)
    call = replace(call, scoring=replace(call.scoring, position_bias=call.scoring.position_bias.mT.contiguous().mT))
    check_gradients(call, check_statistics(call, 1e-10))


def test_a_bias_that_hides():
    """−∞ in it, and zero times it is no number."""
    call = make_call(queries=90, sinks=(-1.0, 1.0))
    hidden = torch.rand(1, 1, 90, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[..., range(90), range(90)] = False
    bias = torch.zeros(1, 1, 90, 90, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    biased = replace(call, scoring=replace(call.scoring, position_bias=bias))
    masked = replace(call, visibility=replace(call.visibility, mask=~hidden))
    walk, expected = biased.walk(native, KNOWN), masked.walk(native, KNOWN)
    for name in walk.raw:
        assert relative_error(walk.raw[name], expected.raw[name]) <= 1e-10, name
    gradients = native.backward(
        torch.ones_like(walk.output), call.query, call.key, call.value, walk.output, walk.logsumexp, call.visibility,
        biased.scoring,
    )  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("score", [-torch.inf, -1e30, -1e4, -50.0, 50.0, 1e4, 1e30])
def test_sinks_that_take_nothing_or_everything(score, dtype):
    call = make_call(sinks=(score, score), padding=True, dtype=dtype)
    check_gradients(call, check_statistics(call, BOUND[dtype]))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_cap_is_a_hyperbolic_tangent(dtype):
    """To two roundings of each result, through the largest score of one key."""
    numbers = torch.cat([torch.linspace(-22, 22, 40_001), torch.logspace(-30, 1.3, 4_000), torch.zeros(1)]).to(dtype)
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    query = torch.cat([numbers, infinite])[None, None, :, None]
    visibility = Visibility(1, 0, 1, CPU, causal=False, stop_query=query.shape[2], aligned=False)
    wanted = Wanted([statistics_table()["max_logit"]], AttentionStatsConfig())
    capped = native.walk(query, torch.ones(1, 1, 1, 1, dtype=dtype), None, visibility, Scoring(1.0, 1.0), wanted)
    actual, expected = capped.raw["max_logit"].flatten().double(), query.flatten().double().tanh()
    assert ((actual - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()


def test_keys_behind_those_that_the_visibility_knows():
    """A static cache holds more than it is filled with: nobody sees them, and their gradient is zero."""
    call = make_call(spans="window", sinks=(-1.0, 1.0))
    longer = [torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=2) for tensor in (call.key, call.value)]
    walk = native.walk(call.query, *longer, call.visibility, call.scoring)
    assert torch.equal(walk.output, native.walk(call.query, call.key, call.value, call.visibility, call.scoring).output)
    rest = (walk.output, walk.logsumexp, call.visibility, call.scoring)
    grad, keys = torch.ones_like(walk.output), call.key.shape[2]
    actual = native.backward(grad, call.query, *longer, *rest)
    expected = native.backward(grad, call.query, call.key, call.value, *rest)
    for mine, right in zip(actual[1:3], expected[1:3], strict=True):
        assert torch.equal(mine[:, :, :keys], right)
        assert (mine[:, :, keys:] == 0).all()


def test_no_queries():
    """Statistics of keys are sums over nothing."""
    call = make_call()
    visibility = replace(call.visibility, first_query=call.visibility.num_keys)
    rest = (call.query[:, :, :0], call.key, call.value, visibility, call.scoring)
    walk = native.walk(*rest[:3], *rest[3:], call.wanted(KNOWN))
    assert walk.output.shape == (2, 0, 4, 16)
    assert (walk.raw["received"] == 0).all()
    assert (walk.raw["distance_histogram"] == 0).all()
    gradients = native.backward(walk.output, *rest[:3], walk.output, walk.logsumexp, *rest[3:])
    assert (gradients.key == 0).all()
    assert (gradients.value == 0).all()


def test_a_view_that_is_negated():
    """Its numbers in memory have the other sign."""
    call = make_call()
    names = ("query", "key", "value")
    negated = {name: torch.complex(torch.zeros(()).double(), -getattr(call, name)).conj().imag for name in names}
    assert all(tensor.is_neg() for tensor in negated.values())
    check_gradients(replace(call, **negated), check_statistics(replace(call, **negated), 1e-10))


def test_a_window_costs_what_its_pairs_cost():
    """Of 16,384 tokens a window of 512 leaves a sixteenth of the pairs, and of the time; a fifth is allowed."""
    length, window = 16_384, 512
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 32, generator=generator) for _ in range(3))
    wanted = Wanted(DEFAULT, AttentionStatsConfig())
    i = torch.arange(length, dtype=torch.int32)[None]
    times = []
    for limits in ({}, {"first_key": (i - window + 1).clamp(min=0)}):
        visibility = Visibility(1, 0, length, CPU, **limits)
        best = float("inf")
        for _ in range(2):
            start = time.process_time()
            walk = native.walk(query, key, value, visibility, Scoring(32**-0.5), wanted)
            native.backward(walk.output, query, key, value, walk.output, walk.logsumexp, visibility, Scoring(32**-0.5))
            best = min(best, time.process_time() - start)
        times.append(best)
    assert times[1] < times[0] / 5, times


@pytest.mark.parametrize("missing", ["softcap", "sinks", "position_bias", "first_key"])
def test_the_comparison_can_fail(missing):
    call = make_call(spans="window", **EVERYTHING)
    if missing == "first_key":
        wrong = replace(call, visibility=replace(call.visibility, first_key=None))
    else:
        wrong = replace(call, scoring=replace(call.scoring, **{missing: None}))
    values = wrong.finished(wrong.walk(native, KNOWN).raw, KNOWN)
    assert relative_error(values["entropy"], call.expected(KNOWN)["entropy"]) > 1e-3
