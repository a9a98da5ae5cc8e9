"""Every engine on weights by their size and on kept keys: numbers that are known by hand, and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from calls import BOUND, CPU
from cases import cases
from engines import SIZES, blocks, taken
from hypothesis import given
from oracle import rounding_bound

from llama_attn import AttentionStatsConfig
from llama_attn.stats.block import Wanted
from llama_attn.stats.counts import Counts
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import make_inputs, relative_error

COUNT, MASS, KEPT = (statistics_table()[name] for name in ("weight_count", "weight_mass", "kept_mass"))
BINNED, CONFIG = (COUNT, MASS), AttentionStatsConfig()
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def binned(engine, query, key, visibility, scoring=Scoring(1.0), **sizes):  # noqa: B008 - it is frozen
    """Raw counts and masses."""
    raw = engine.walk(query, key, None, visibility, scoring, Wanted(BINNED, CONFIG), **sizes).raw
    return raw["weight_count"].double(), raw["weight_mass"].double()


@BOTH
@pytest.mark.parametrize("rows", [None, 5, 4096])
@pytest.mark.parametrize("length", [1, 2, 17, 129, 2100])
def test_uniform_attention(length, rows, dtype, engine):
    """Query i gives 1 / (i + 1) to every key; powers of two are the largest of their bin."""
    zeros = torch.zeros(1, 2, length, 8, dtype=dtype)
    sizes = {"block_rows": rows, "tile_rows": rows, "block_keys": {5: 64}.get(rows, rows)} if rows else {}
    counts, masses = binned(engine, zeros, zeros[:, :1], Visibility(1, 0, length, CPU), **taken(engine, sizes))
    expected_counts, expected_masses = torch.zeros(31, dtype=torch.float64), torch.zeros(31, dtype=torch.float64)
    for seen in range(1, length + 1):
        expected_counts[seen.bit_length() - 1] += seen
        expected_masses[seen.bit_length() - 1] += 1
    assert torch.equal(counts[0, :, :-1], expected_counts[:-1].expand(2, -1))
    assert relative_error(masses[0], expected_masses.expand(2, -1)) < BOUND[dtype]


@BOTH
def test_more_weights_than_a_sum_holds(dtype, engine):
    """Four million of 2^−11 in one block, whose sum is exact."""
    zeros = torch.zeros(1, 1, 2048, 4, dtype=dtype)
    sizes = taken(engine, {"block_rows": 2048, "tile_rows": 2048})
    counts, masses = binned(engine, zeros, zeros, Visibility(1, 0, 2048, CPU, causal=False), **sizes)
    assert counts[0, 0, 11] == counts[0, 0, :-1].sum() == 2048**2
    assert masses[0, 0, 11] == masses.sum() == 2048


@BOTH
def test_weights_whose_roundings_add_up(dtype, engine):
    """Each of 2,100 queries gives 1/2100 to every key, and every addition to a sum of them errs in the same direction."""
    zeros = torch.zeros(1, 1, 2100, 4, dtype=dtype)
    _, masses = binned(engine, zeros, zeros, Visibility(1, 0, 2100, CPU, causal=False))
    expected = torch.zeros(31, dtype=torch.float64)
    expected[11] = 2100
    assert relative_error(masses[0, 0], expected) < BOUND[dtype]


@BOTH
@pytest.mark.parametrize("bin", range(31))
def test_both_ends_of_every_bin(bin, dtype, engine):
    """One key takes nearly all, and others 2^−bin, just below it, and just above the next power of two."""
    next_to_one = 1 - 4 * torch.finfo(dtype).eps
    weights = torch.tensor([1.0, next_to_one, 0.5 / next_to_one], dtype=torch.float64) * 2.0**-bin
    # A learned sink takes what is missing to 1, so that exp(score) is the weight.
    rest = 1 - float(weights.sum())
    if rest < 0:
        weights, rest = weights[1:2], 1 - float(weights[1])
    query = torch.ones(1, 1, 1, 8, dtype=dtype)
    key = (weights.log() / 8).to(dtype)[None, None, :, None].expand(-1, -1, -1, 8)
    scoring = Scoring(1.0, sinks=torch.tensor([math.log(rest)], dtype=torch.float64).to(dtype))
    counts, masses = binned(engine, query, key, Visibility(1, len(weights) - 1, len(weights), CPU), scoring)
    # Rounding of the scores moves those at the ends, but none beyond the bins beside it.
    assert counts[0, 0, max(0, bin - 1) : bin + 2].sum() == (len(weights) if bin < 29 else counts.sum())
    exact = (masses[0, 0].sum() / weights.sum() - 1).abs()
    assert exact < torch.finfo(dtype).eps * 64


@BOTH
def test_weights_that_are_small(dtype, engine):
    """Down to 2^−46, and some that are rounded to 0; the mass of the last bin is right in proportion to itself."""
    scores = -torch.linspace(0, 32, 500, dtype=torch.float64) - torch.rand(500, dtype=torch.float64) * 1e-3
    scores[-40:] = -800
    query, key = torch.ones(1, 1, 1, 4, dtype=dtype), (scores / 4).to(dtype)[None, None, :, None].expand(-1, -1, -1, 4)
    counts, masses = binned(engine, query, key, Visibility(1, 499, 500, CPU))
    weights = (key[0, 0].double().sum(-1)).softmax(0)
    for bin in range(31):
        inside = (weights <= 2.0**-bin) & (weights > (2.0 ** -(bin + 1) if bin < 30 else -1))
        mass = weights[inside].sum()
        assert (masses[0, 0, bin] - mass).abs() <= 64 * torch.finfo(dtype).eps * mass, bin
        if bin < 30:
            assert counts[0, 0, bin] == inside.sum(), bin


@given(cases(dtypes=(torch.float64, torch.float32, torch.bfloat16)), SIZES)
def test_counts_and_masses_of_anything(engine, case, sizes):
    """Weights that lie within rounding of the end of a bin may be counted on either side; all others are not moved."""
    raw = replace(case, value=None).walk(engine, BINNED, **taken(engine, sizes)).raw
    reference = case.reference()
    pairs = (reference.visible & reference.real_queries[:, None, :, None]).expand_as(reference.weights)
    counts = COUNT.finish(raw["weight_count"][None], Counts.of(case.visibility), CONFIG)[0].double()
    real = reference.real_queries.sum(-1)[:, None].double()
    # Of a row of the batch without a real query there is no mean.
    there = real[:, 0] > 0
    for bin in range(30):
        least, slack = 2.0 ** -(bin + 1), 2 * case.bound
        larger = counts[..., : bin + 1].sum(-1) * real
        surely = (pairs & (reference.weights > least * (1 + slack))).sum((-2, -1))
        perhaps = (pairs & (reference.weights > least * (1 - slack))).sum((-2, -1))
        assert (larger >= surely - 1e-2)[there].all(), bin
        assert (larger <= perhaps + 1e-2)[there].all(), bin
    assert relative_error((counts.sum(-1) * real)[there], pairs.sum((-2, -1))[there]) < 1e-5
    total = raw["weight_mass"].double().sum(-1)
    assert relative_error(total, reference.weights.masked_fill(~pairs, 0).sum((-2, -1))) <= case.bound


@BOTH
def test_rows_that_are_no_numbers(dtype, engine):
    """They are counted in the first bin of their head, and spoil no other."""
    inputs = make_inputs(queries=80, padding="right", dtype=dtype)
    query = inputs.query.clone()
    query[0, 1, 40] = torch.nan
    right, wrong = (
        engine.walk(each, inputs.key, None, inputs.visibility, inputs.scoring, Wanted(BINNED, CONFIG)).raw
        for each in (inputs.query, query)
    )
    for name in ("weight_count", "weight_mass"):
        assert wrong[name].isnan().sum() == 1
        assert wrong[name][0, 1, 0].isnan()
        assert torch.equal(wrong[name][1], right[name][1])


@BOTH
@pytest.mark.parametrize("kind", ["by KV head", "of all", "none", "all"])
@pytest.mark.parametrize("queries", [1, 90])
def test_kept_keys(queries, kind, dtype, engine):
    """One mask for all KV heads or one for each, in any layout; all and none."""
    inputs = make_inputs(heads=6, kv_heads=3, queries=queries, cached=70, padding="left", dtype=dtype)
    keys = inputs.key.shape[2]
    keep = torch.rand(keys, 2, 3, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0) < 0.4
    keep = (
        keep if kind == "by KV head" else keep[:, :1] if kind == "of all" else torch.full((2, 1, keys), kind == "all")
    )
    reference = inputs.reference(CONFIG)
    kept = keep.expand(-1, 3, -1).repeat_interleave(2, 1)[:, :, None]
    expected, real = (reference.weights * kept).sum(-1), inputs.visibility.real_queries[:, None].expand(-1, 6, -1)
    for sizes in blocks(engine):
        call = (inputs.query, inputs.key, None, inputs.visibility, inputs.scoring, Wanted([KEPT], CONFIG, keep=keep))
        mass = engine.walk(*call, **sizes).raw["kept_mass"]
        assert relative_error(mass[real], expected[real]) <= rounding_bound(inputs.query, inputs.key), sizes
        assert kind != "none" or not mass[real].any()


def test_kept_keys_that_nobody_gave_or_of_other_tokens(engine):
    inputs = make_inputs()
    call = (inputs.query, inputs.key, None, inputs.visibility, inputs.scoring)
    with pytest.raises(ValueError, match="'kept_mass' needs `keep`"):
        engine.walk(*call, Wanted([KEPT], CONFIG))
    with pytest.raises(ValueError, match=r"ke(ep|pt): expected"):
        engine.walk(*call, Wanted([KEPT], CONFIG, keep=torch.ones(2, 1, 3, dtype=torch.bool)))
