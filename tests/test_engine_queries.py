"""Every engine on some of the queries, on masks of the user's own, and on calls with nothing in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import CPU, KINDS, make_call
from cases import Case
from engines import check, refused, same

from llama_attn import AttentionStatsConfig
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import make_inputs


def case_of(inputs, visibility, **more):
    """Everything is measured, with every other key kept, from another one on in each KV head."""
    batch, kv_heads, keys = inputs.key.shape[:3]
    generator = torch.Generator().manual_seed(5)
    config = AttentionStatsConfig(
        statistics="all", sink_tokens=3, window=11, top_k=3, map_size=8, rows=slice(None),
        segments=torch.randint(0, 3, (batch, keys), generator=generator),
        keep=((torch.arange(keys) + torch.arange(kv_heads)[:, None]) % 2 == 0).expand(1, batch, -1, -1),
    )  # fmt: skip
    tokens = torch.randint(0, 5, (batch, keys), generator=generator)
    return Case(inputs.query, inputs.key, inputs.value, visibility, config, tokens, **more)


@pytest.mark.parametrize("kind", ["bool", "additive", "bfloat16", "per_head", "nobody", "transposed"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_a_mask_of_the_users_own(kind, heads, engine):
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, heads[0] if kind in ("per_head", "nobody") else 1, 70, 70, generator=generator) < 0.4
    if kind == "nobody":
        seen[1, 2, 5] = False  # one head of one query sees nothing
    if kind == "transposed":
        seen = seen.mT
    mask, bias = seen, None
    if kind in ("additive", "bfloat16"):
        drawn = torch.randn(seen.shape, generator=generator, dtype=torch.float64)
        mask = drawn.masked_fill(~seen, -torch.inf).masked_fill(~seen & (drawn > 0), -1e4)
        bias = mask = mask.to(torch.bfloat16) if kind == "bfloat16" else mask
    visibility = Visibility.of_mask(mask, batch=2, device=CPU)
    inputs = make_inputs(heads=heads[0], kv_heads=heads[1], queries=70, dtype=torch.float64)
    check(engine, case_of(inputs, visibility, mask=seen, bias=bias), 1e-10, gradients=False)


@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({"stride": 3}, range(15, 103, 3)),
        ({"stride": 4, "first": 9}, range(16, 103, 4)),
        ({"first": 50}, range(50, 103)),
        ({"rows": torch.tensor([True, False])}, range(13, 103)),
    ],
    ids=["every third", "every fourth", "the last", "of one row"],
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_some_of_the_queries(changes, slots, padding, engine):
    inputs = make_inputs(queries=90, cached=13, padding=padding, dtype=torch.float64)
    visibility = inputs.visibility.measured(**changes)
    assert visibility.query_slots.tolist() == list(slots)
    query = inputs.query[:, :, [slot - 13 for slot in slots]]
    case = case_of(replace(inputs, query=query), visibility, rows=changes.get("rows"))
    check(engine, case, 1e-10, gradients=False)


def test_only_what_is_wanted(engine):
    call = replace(make_call(dtype=torch.float32), value=None)
    of_all = call.walk(engine).raw
    for statistic in call.known(engine):
        raw = call.walk(engine, [statistic]).raw
        assert set(raw) == {statistic.name}
        assert same(raw[statistic.name], of_all[statistic.name]), statistic.name


def test_keys_behind_those_that_the_visibility_knows(engine):
    """A static cache holds more than it is filled with: nobody sees them, and their gradient is zero."""
    call = make_call(spans="window", dtype=torch.float32)
    longer = [torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=2) for tensor in (call.key, call.value)]
    walk = engine.walk(call.query, *longer, call.visibility, call.scoring)
    assert torch.equal(walk.output, engine.walk(call.query, call.key, call.value, call.visibility, call.scoring).output)
    rest = (walk.output, walk.logsumexp, call.visibility, call.scoring)
    grad, keys = torch.ones_like(walk.output), call.key.shape[2]
    actual = engine.backward(grad, call.query, *longer, *rest)
    expected = engine.backward(grad, call.query, call.key, call.value, *rest)
    for mine, right in zip(actual[1:3], expected[1:3], strict=True):
        assert torch.equal(mine[:, :, :keys], right)
        assert (mine[:, :, keys:] == 0).all()


@pytest.mark.parametrize("kind", ["causal", "sinks in a window", "a mask in a window", "soft-cap, bias and sinks"])
def test_no_queries(kind, engine):
    """Sums are over nothing, and there are no rows."""
    call = make_call(**KINDS.get(kind, {}), dtype=torch.float32)
    if refused(engine, call):
        return
    visibility = call.visibility.measured(first=call.visibility.num_keys)
    if call.scoring.position_bias is not None:
        call = replace(call, scoring=replace(call.scoring, position_bias=call.scoring.position_bias[:, :, :0]))
    rest = (call.query[:, :, :0], call.key, call.value, visibility, call.scoring)
    walk = engine.walk(*rest, call.wanted(call.known(engine)))
    assert walk.output.shape == (2, 0, 4, 64)
    check_nothing(engine, walk, call, (2, 4), 0)
    gradients = engine.backward(walk.output, *rest[:3], walk.output, walk.logsumexp, *rest[3:])
    assert gradients.query.shape == rest[0].shape
    assert (gradients.key == 0).all()
    assert (gradients.value == 0).all()


@pytest.mark.parametrize("queries", [1, 23])
def test_no_rows(queries, engine):
    """A batch with nothing in it, of a token behind a long cache as well."""
    call = make_call(queries=queries, before=1500, dtype=torch.float32)
    none = [tensor[:0] for tensor in (call.query, call.key, call.value)]
    visibility = Visibility(0, 1500, 1500 + queries, CPU)
    wanted = call.wanted(call.known(engine))
    wanted = replace(wanted, segments=wanted.segments[:0], tokens=wanted.tokens[:0], keep=wanted.keep[:0])
    walk = engine.walk(*none, visibility, call.scoring, wanted)
    assert walk.output.shape == (0, queries, 4, 64)
    check_nothing(engine, walk, call, (0, 4), queries)
    gradients = engine.backward(walk.output, *none, walk.output, walk.logsumexp, visibility, call.scoring)
    assert [gradient.shape for gradient in gradients[:3]] == [tensor.shape for tensor in none]


def check_nothing(engine, walk, call, batch_and_heads, queries):
    """Every statistic is there in its own shape, and sums are 0."""
    keys = call.key.shape[2]
    sizes = {"query": queries, "row": queries, "key": keys, "rank": 3, "segment": call.wanted().num_segments}
    sizes |= {"weight_bin": 31, "distance_bin": len(f"{keys:b}")}
    width = next(width for width in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if -(-keys // width) <= 7)
    sizes |= dict.fromkeys(("query_bin", "key_bin"), -(-keys // width))
    assert {*walk.raw} == {statistic.name for statistic in call.known(engine)}
    for statistic in call.known(engine):
        raw, last = walk.raw[statistic.name], [sizes[dim] for dim in statistic.dims[3:]]
        assert raw.shape == (*batch_and_heads, *statistic.parts, *last), statistic.name
        assert raw.dtype == (statistic.dtype or torch.float32)
        assert (raw == 0).all()
