"""The torch engine on calls of every kind: spans, learned sinks, soft-caps, position biases, odd widths."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from calls import CPU, calls, make_call
from hypothesis import given, strategies as st
from oracle import rounding_bound

from llama_attn import AttentionStatsConfig
from llama_attn.engines import torch as engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import relative_error

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
KINDS = {
    "window": {"spans": "window"},
    "window over padding": {"spans": "window", "padding": True},
    "window of one": {"spans": "window", "width": 1},
    "window wider than the row": {"spans": "window", "width": 100, "sinks": (-1.0, 1.0)},
    "window, the cache has dropped keys": {"spans": "window", "before": 4, "offset": 31, "padding": True},
    "window, one step of decoding": {"spans": "window", "queries": 1, "before": 4, "offset": 18},
    "window in a static cache": {"spans": "window", "before": 4, "after": 6},
    "window over documents": {"spans": "window", "packed": True},
    "every third query of a window": {"spans": "window", "stride": 3, "offset": 4, "before": 3},
    "chunks": {"spans": "chunk"},
    "chunks, the cache has dropped keys": {"spans": "chunk", "before": 7, "offset": 9},
    "chunks both ways": {"spans": "chunk", "causal": False},
    "window both ways": {"spans": "both sides", "padding": True},
    "random spans": {"spans": "random", "padding": True, "queries": 40},
    "full, the cache has dropped keys": {"before": 3, "offset": 40, "padding": True},
    "sinks": {"sinks": (-2.0, 3.0)},
    "sinks far above and below": {"sinks": (-300.0, 300.0), "padding": True},
    "sinks in a window": {"spans": "window", "sinks": (-2.0, 3.0), "packed": True},
    "soft-cap": {"softcap": 1.5, "spread": 3.0},
    "soft-cap, bias and sinks": {"softcap": 5.0, "bias": (2, 4), "sinks": (-1.0, 2.0), "padding": True},
    "bias of all heads": {"bias": (1, 1), "causal": False},
    "bias in a window": {"bias": (1, 4), "spans": "both sides"},
    "a mask in a window": {"mask": "bool", "spans": "window", "padding": True},
    "an additive mask and a bias": {"mask": "additive", "bias": (2, 1), "stride": 2},
    "wider values": {"value_channels": 40},
    "narrower values": {"channels": 24, "value_channels": 8, "spans": "window"},
    "head size 576": {"channels": 576, "value_channels": 512, "kv_heads": 1},
    "cross-attention": {"aligned": False, "after": 9, "padding": True},
    "cross-attention to few keys": {"aligned": False, "queries": 40, "after": -35},
    "cross-attention with sinks and a bias": {"aligned": False, "after": 3, "sinks": (-1.0, 1.0), "bias": (1, 4)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_statistic(kind, dtype):
    call = make_call(**KINDS[kind], dtype=dtype)
    for rows in (None, 1, 7):
        walk = call.walk(engine, block_rows=rows)
        values = call.finished(walk.raw)
        for name, expected in call.expected().items():
            if name == "topk_position" and dtype == torch.float32:
                continue
            assert relative_error(values[name], expected) <= BOUND[dtype], name
        output = call.reference().output.transpose(1, 2)
        assert relative_error(walk.output[call.real_queries], output[call.real_queries]) <= BOUND[dtype]


@given(calls(dtypes=(torch.float64, torch.float32, torch.bfloat16)), st.integers(1, 50))
def test_any_call_equals_the_textbook(call, rows):
    walk = call.walk(engine, block_rows=rows)
    values, scoring = call.finished(walk.raw), call.scoring
    exact = call.query.dtype == torch.float64
    # A bias and a sink are as large as scores may be, and as roundly added.
    largest = max(float(t.abs().max()) for t in (scoring.position_bias, scoring.sinks, torch.zeros(1)) if t is not None)
    bound = rounding_bound(call.query, call.key) + 8 * torch.finfo(torch.float64 if exact else torch.float32).eps * (
        largest + 1
    )
    for name, expected in call.expected().items():
        # Below float64, and where a soft-cap flattens scores, the order of nearly equal weights is a matter of rounding.
        if name != "topk_position" or (exact and scoring.softcap is None):
            assert relative_error(values[name], expected) <= bound, name
    output, real = call.reference().output.transpose(1, 2), call.real_queries
    bound = bound * max(1.0, float(call.value.abs().max())) + torch.finfo(call.value.dtype).eps
    assert relative_error(walk.output[real], output[real]) <= bound
    assert not walk.output.isnan().any()


@given(calls())
def test_visibility_tells_pair_by_pair_who_sees_whom(call):
    visibility, sees = call.visibility, call.sees
    assert torch.equal(visibility.real_queries, call.real_queries)
    counted = sees & call.real_queries[..., None]
    assert torch.equal(visibility.visible_keys.long(), counted.sum(-1))
    assert torch.equal(visibility.visible_queries.long(), counted.sum(-2))
    real = visibility.real_keys
    assert torch.equal(visibility.rank[real], call.rank[real])
    if visibility.mask is not None:
        return
    keys, queries = torch.arange(visibility.num_keys), torch.arange(visibility.num_queries)[:, None]
    first, stop = (span[:, :, None] for span in visibility.key_spans)
    assert torch.equal((first <= keys) & (keys < stop) & real[:, None], sees)
    first, stop = (span[:, None] for span in visibility.query_spans)
    assert torch.equal((first <= queries) & (queries < stop), sees)


@given(calls(), st.integers(1, 9))
def test_a_span_is_the_smallest_run_of_keys_that_some_row_sees(call, size):
    visibility = call.visibility
    first, stop = visibility.key_spans
    for start in range(0, visibility.num_queries, size):
        rows = range(start, min(start + size, visibility.num_queries))
        begin, end = visibility.span_of(rows)
        part = slice(rows.start, rows.stop)
        if bool((first[:, part] < stop[:, part]).any()):
            assert begin <= int(first[:, part].min())
            assert end >= int(stop[:, part].max())
        assert end > begin
        if not visibility.has_spans:
            continue
        assert end - begin <= max(1, int(stop[:, part].max()) - int(first[:, part].min()))
        seen = visibility.visible(rows).expand(visibility.batch, -1, -1, -1)[:, 0]
        assert torch.equal(seen, call.sees[:, part, begin:end])


@given(calls(), st.integers(1, 50), st.randoms())
def test_any_gradient_equals_that_of_the_written_out_softmax(call, rows, random):
    scoring = call.scoring
    walk = engine.walk(call.query, call.key, call.value, call.visibility, scoring, block_rows=rows)
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    grad = torch.randn(walk.output.shape, generator=generator, dtype=torch.float64)
    actual = engine.backward(
        grad, call.query, call.key, call.value, walk.output, walk.logsumexp, call.visibility, scoring, block_rows=rows
    )
    given_tensors = (call.query, call.key, call.value, scoring.position_bias, scoring.sinks)
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in given_tensors]
    output = call.written_out(*leaves)
    assert relative_error(walk.output, output) <= 1e-10
    expected = torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad)
    found = [gradient for gradient in actual if gradient is not None]
    for name, one, other in zip(
        (name for name, leaf in zip(actual._fields, leaves, strict=True) if leaf is not None),
        found,
        expected,
        strict=True,
    ):
        assert relative_error(one, other) <= 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype):
    call = make_call(bias=(1, 4), sinks=(-1.0, 1.0), dtype=dtype, spans="window")
    walk = call.walk(engine)
    tensors = (call.query, call.key, call.value, walk.output, walk.logsumexp, call.visibility, call.scoring)
    gradients = engine.backward(torch.ones_like(walk.output), *tensors)
    given_tensors = (call.query, call.key, call.value, call.scoring.position_bias, call.scoring.sinks)
    for gradient, tensor in zip(gradients, given_tensors, strict=True):
        assert (gradient.dtype, gradient.shape) == (dtype, tensor.shape)


@pytest.mark.parametrize("odds", [-1e4, -200.0, 200.0, 1e4, -torch.inf])
def test_sinks_of_any_size(odds):
    """In float32, where their exponentials overflow."""
    call = make_call(sinks=(odds, odds), dtype=torch.float32)
    walk = call.walk(engine)
    values = call.finished(walk.raw)
    for name in (
        "entropy",
        "effective_keys",
        "learned_sink_mass",
        "logsumexp",
        "max_logit",
        "max_weight",
        "logits_map",
    ):
        assert relative_error(values[name], call.expected()[name]) <= 1e-5, name
    gradients = engine.backward(
        torch.ones_like(walk.output), call.query, call.key, call.value, walk.output, walk.logsumexp, call.visibility,
        call.scoring,
    )  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("documents", [3, 7, 50])
def test_distances_in_documents_far_from_the_first_token(documents):
    """In float32, where numbers of tokens cancel one another."""
    length = 1_500
    call = make_call(queries=8, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, length, 16, generator=generator) for _ in range(2))
    visibility = Visibility(1, 0, length, CPU, sequence=(torch.arange(length) // documents)[None])
    names = ("mean_distance", "local_mass", "distance_histogram", "previous_token")
    wanted = Wanted([statistics_table()[name] for name in names], call.config)
    single, double = (
        engine.walk(query.to(dtype), key.to(dtype), None, visibility, Scoring(0.25), wanted).raw for dtype in BOUND
    )
    for name in names:
        assert relative_error(single[name], double[name]) <= 1e-6, name
    assert (single["mean_distance"] >= 0).all()


def scores_of(monkeypatch):
    """Numbers of scores that the engine computes, block by block."""
    counts, blocks = [], engine._blocks

    def counted(*arguments, **options):
        for block in blocks(*arguments, **options):
            counts.append(block.scores.numel())
            yield block

    monkeypatch.setattr(engine, "_blocks", counted)
    return counts


@pytest.mark.parametrize("kind", ["window", "chunks", "documents"])
def test_no_work_outside_the_window(kind, monkeypatch):
    length, width, heads = 4_096, 256, 2
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 8, generator=generator) for _ in range(3))
    positions = torch.arange(length)
    spans = {
        "window": {"first_key": (positions - width + 1)[None]},
        "chunks": {"first_key": (positions // width * width)[None]},
        "documents": {"sequence": (positions // width)[None]},
    }
    visibility = Visibility(1, 0, length, CPU, **spans[kind])
    pairs = heads * int(visibility.visible_keys.sum())
    counts = scores_of(monkeypatch)
    wanted = Wanted([s for s in statistics_table().values() if s.default], AttentionStatsConfig())
    walk = engine.walk(query, key, value, visibility, Scoring(0.3), wanted)
    forward = sum(counts)
    engine.backward(
        torch.ones_like(walk.output), query, key, value, walk.output, walk.logsumexp, visibility, Scoring(0.3)
    )
    # A block has a triangle on both sides, of half as many pairs as the rows of the block squared.
    assert pairs <= forward <= 2.1 * pairs
    assert sum(counts) == 2 * forward
    full = Visibility(1, 0, length, CPU)
    counts.clear()
    engine.walk(query, key, value, full, Scoring(0.3))
    assert sum(counts) > 3 * forward, "the check can fail"


@pytest.mark.parametrize("kind", ["bool", "additive", "per head", "decoding", "cross"])
def test_a_mask_alone(kind):
    """Keys are real if some query sees them, queries if they see some key."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3 if kind == "per head" else 1, 1 if kind == "decoding" else 7, 9)
    mask = torch.rand(shape, generator=generator) < 0.3
    mask[0, :, -1, :] = kind == "decoding"
    mask[1, :, :, 4] = False
    given_mask = mask
    if kind == "additive":
        given_mask = torch.zeros(shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    options = {"aligned": False} if kind == "cross" else {"offset": 5} if kind == "decoding" else {}
    visibility = Visibility.of_mask(given_mask, batch=2, device=CPU, **options)
    assert not visibility.causal
    assert visibility.queries == range(*{"decoding": (8, 9), "cross": (0, 7)}.get(kind, (2, 9)))
    assert visibility.length == (14 if kind == "decoding" else 9)
    sees = mask.any(-1).any(1)
    assert torch.equal(visibility.real_queries, sees)
    assert torch.equal(visibility.real_keys, mask.any(-2).any(1))
    assert torch.equal(visibility.visible_keys.long(), mask.sum(-1).amax(1))
    assert torch.equal(visibility.visible_queries_per_head.long(), mask.sum(-2))
    assert visibility.rank[0, 8] == (5 if kind == "decoding" else 0) + mask.any(-2).any(1)[0, :8].sum()
    half = visibility.of_heads((0,)).measured(first=visibility.offset + 6)
    assert half.mask.shape == (2, 1, {"decoding": 1, "cross": 1}.get(kind, 3), 9)
    assert torch.equal(half.real_queries, sees[:, -half.num_queries :])


def test_another_device_has_every_vector():
    flags = torch.ones(2, 9, dtype=torch.bool)
    visibility = Visibility(
        2, 0, 9, CPU, real=flags, sequence=torch.zeros(2, 9, dtype=torch.long), mask=flags[:, None, :, None].expand(2, 1, 9, 9),
        rows=flags[:, 0], sees=flags, first_key=torch.zeros(1, 9, dtype=torch.long),
        stop_key=torch.full((1, 9), 9), dropped=torch.zeros(2, dtype=torch.long),
    )  # fmt: skip
    there = visibility.to("meta")
    vectors = [
        getattr(there, field.name) for field in fields(there) if isinstance(getattr(there, field.name), torch.Tensor)
    ]
    assert len(vectors) == 8
    assert {vector.device.type for vector in vectors} == {"meta"}
    assert visibility.to("cpu") is visibility


@pytest.mark.parametrize("missing", ["hidden", "sinks", "soft-cap", "bias"])
def test_the_comparison_can_fail(missing, monkeypatch):
    call = make_call(spans="window", sinks=(-1.0, 2.0), softcap=2.0, bias=(1, 4))
    expected = call.expected()
    if missing == "hidden":
        monkeypatch.setattr(Visibility, "hidden", lambda self, rows: iter(()))
    field = {"sinks": "sinks", "soft-cap": "softcap", "bias": "position_bias"}.get(missing)
    walked = replace(call, scoring=replace(call.scoring, **{field: None})) if field else call
    values = call.finished(walked.walk(engine).raw)
    assert relative_error(values["entropy"], expected["entropy"]) > 1e-3
