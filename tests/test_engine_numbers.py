"""Every engine against other programs and in float64: outputs, gradients, numbers that are none, and threads."""

from __future__ import annotations

import pytest
import torch
from calls import CPU, make_call
from engines import backend, blocks, same, taken
from test_engine_queries import case_of

from llama_attn import AttentionStatsConfig
from llama_attn.stats.block import Wanted
from llama_attn.stats.counts import Counts
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import FEATURES, assert_matches_reference, make_inputs, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_outputs_match_float64(dtype, engine):
    assert_matches_reference(backend(engine), also=FEATURES, dtype=dtype)


@pytest.mark.parametrize("value_channels", [16, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_those_of_sdpa(dtype, value_channels, engine):
    inputs = make_inputs(heads=6, kv_heads=2, queries=130, dtype=torch.float64)
    value = torch.randn(2, 2, 130, value_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs.query, inputs.key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(output, leaves, grad)
    call = (inputs.query.to(dtype), inputs.key.to(dtype), value.to(dtype))
    sizes = taken(engine, {"block_rows": 30, "tile_rows": 30, "block_keys": 64})
    walk = engine.walk(*call, inputs.visibility, inputs.scoring)
    actual = engine.backward(
        grad.transpose(1, 2).to(dtype), *call, walk.output, walk.logsumexp, inputs.visibility, inputs.scoring, **sizes
    )
    for mine, sdpas in zip(actual[:3], expected, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, sdpas) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("queries", "cached"), [(80, 0), (1, 600)], ids=["a prompt", "a token"])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_scores_that_are_no_numbers(strange, queries, cached, engine):
    """They spoil the row that they are of, and no other."""
    inputs, row = make_inputs(queries=queries, cached=cached, padding="right" if queries > 1 else "left"), queries // 2
    case = case_of(inputs, inputs.visibility)
    known, right = case.known(engine), case.expected()
    exact = case.reference().output.transpose(1, 2)
    query = inputs.query.clone()
    query[1, 1, row] = strange
    call = (query, inputs.key, inputs.value, inputs.visibility, inputs.scoring)
    spoiled, real = torch.zeros(2, queries, 4, dtype=torch.bool), case.real_queries
    spoiled[1, row, 1] = True
    for sizes in blocks(engine):
        walk = engine.walk(*call, case.wanted(known), **sizes)
        assert walk.output[spoiled].isnan().all()
        others = ~spoiled & real[..., None]
        assert relative_error(walk.output[others], exact[others]) < 1e-5
        values = case.finished(walk.raw, known)
        for name in ("entropy", "max_weight", "logsumexp"):
            assert values[name][1, 1, row].isnan(), name
            rows = others.transpose(1, 2)
            assert relative_error(values[name][rows], right[name][rows]) < 1e-5, name
        engine.backward(torch.ones_like(walk.output), *call[:3], walk.output, walk.logsumexp, *call[3:], **sizes)


def test_a_walk_that_nobody_differentiates(engine):
    """It gives the same without the logsumexp."""
    call = make_call()
    wanted = call.wanted(call.known(engine))
    given = (call.query, call.key, call.value, call.visibility, call.scoring, wanted)
    whole, without = engine.walk(*given), engine.walk(*given, for_backward=False)
    assert whole.logsumexp.shape == call.query.shape[:3]
    assert without.logsumexp is None
    assert torch.equal(without.output, whole.output)
    assert list(without.raw) == list(whole.raw)
    assert all(same(without.raw[name], whole.raw[name]) for name in whole.raw)


def test_the_number_of_threads_changes_nothing(engine):
    """But for rounding, and not even that where the same number works as before."""
    inputs = make_inputs(heads=6, kv_heads=3, queries=700, padding="left")
    case = case_of(inputs, inputs.visibility)
    call, known, results = (inputs.query, inputs.key, inputs.value), case.known(engine), []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        walk = case.walk(engine)
        gradients = engine.backward(
            torch.ones_like(walk.output), *call, walk.output, walk.logsumexp, inputs.visibility, inputs.scoring
        )
        results.append([walk.output, walk.logsumexp, *(walk.raw[s.name] for s in known), *gradients[:3]])
    torch.set_num_threads(1)
    assert all(same(one, other) for one, other in zip(results[1], results[3], strict=True))
    for result in results[1:]:
        assert all(relative_error(one, other) < 1e-5 for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype, engine):
    call = make_call(bias=(1, 4), sinks=(-1.0, 1.0), dtype=dtype, spans="window")
    walk = call.walk(engine)
    tensors = (call.query, call.key, call.value, walk.output, walk.logsumexp, call.visibility, call.scoring)
    gradients = engine.backward(torch.ones_like(walk.output), *tensors)
    of = (call.query, call.key, call.value, call.scoring.position_bias, call.scoring.sinks)
    for gradient, tensor in zip(gradients, of, strict=True):
        assert (gradient.dtype, gradient.shape) == (dtype, tensor.shape)


@pytest.mark.parametrize("documents", [3, 7, 50])
def test_distances_in_documents_far_from_the_first_token(documents, engine):
    """In float32, where numbers of tokens cancel one another."""
    length, config = 1_500, AttentionStatsConfig(sink_tokens=2, window=4)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, length, 16, generator=generator) for _ in range(2))
    places = torch.arange(length)
    visibility = Visibility(1, 0, length, CPU, sequence=(places // documents)[None])
    same_document = places[:, None] // documents == places // documents
    reference = Reference(
        query, key, None, 0.25, (same_document.tril())[None, None], torch.ones(1, length, dtype=torch.bool),
        (places % documents)[None], places, config,
    )  # fmt: skip
    names = ("mean_distance", "local_mass", "distance_histogram", "previous_token")
    known = [s for s in (statistics_table()[name] for name in names) if engine.knows(s)]
    raw = engine.walk(query, key, None, visibility, Scoring(0.25), Wanted(known, config)).raw
    for statistic in known:
        value = raw[statistic.name]
        if statistic.finish is not None:
            value = statistic.finish(value[None], Counts.of(visibility), config)[0]
        assert relative_error(value, statistic.textbook(reference)) <= 1e-6, statistic.name
    assert (raw["mean_distance"] >= 0).all()
