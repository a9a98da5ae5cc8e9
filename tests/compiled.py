"""`torch.compile` in one graph: the same numbers with statistics off and on, in a forward, in training, in generate.

Run by test_compile.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from calls import KINDS, make_call
from conftest import tiny_model
from torch._dynamo.utils import counters

from llama_attn import AttentionStatsConfig
from llama_attn.engines import default_engine
from llama_attn.engines._fused import fused
from llama_attn.engines._operator import walk
from llama_attn.stats.block import Wanted
from llama_attn.stats.table import statistics_table
from llama_attn.testing import make_inputs, relative_error

# Dynamo warns about transformers' own code while it traces.
pytestmark = pytest.mark.filterwarnings("ignore")

EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)
# Dynamo takes seconds for each layer.
two_layers = partial(tiny_model, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def in_one_graph(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def assert_same_statistics(actual, expected):
    assert actual.names == expected.names
    assert (actual.queries, actual.layers, actual.heads, actual.engine) == (
        expected.queries, expected.layers, expected.heads, expected.engine,
    )  # fmt: skip
    for name, values in expected.values.items():
        assert actual[name].dtype == values.dtype
        assert not actual[name].requires_grad
        assert relative_error(actual[name], values) < 1e-9, name


@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
def test_off_it_compiles_to_one_graph(backend, ids):
    model = two_layers(backend)
    with torch.no_grad():
        torch.testing.assert_close(in_one_graph(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_everything_is_measured_in_one_graph(backend, ids, left_padding):
    model = two_layers(backend, torch.float64)
    inputs = {"input_ids": ids, "attention_mask": left_padding, "output_attention_stats": EVERYTHING}
    with torch.no_grad():
        expected, actual = model(**inputs), in_one_graph(model)(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert_same_statistics(actual.attention_stats, expected.attention_stats)


def test_two_graphs_serve_every_length(ids):
    model = two_layers("streaming", torch.float64)
    compiled = in_one_graph(model)
    with torch.no_grad():
        for length in (37, 30, 33, 22, 25):
            inputs = {"input_ids": ids[:, :length], "output_attention_stats": True}
            assert_same_statistics(compiled(**inputs).attention_stats, model(**inputs).attention_stats)
    assert counters["stats"]["unique_graphs"] == 2


def situations(ids):
    length = ids.shape[1]
    own_mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    # Nobody sees these tokens, which see others.
    own_mask[..., 5:8] = False
    segments = torch.arange(length).expand(2, -1) // 20
    documents = torch.cat([torch.arange(15), torch.arange(length - 15)]).expand(2, -1)
    return {
        "a 4-D mask": {"attention_mask": own_mask, "output_attention_stats": True},
        "packing": {"position_ids": documents, "use_cache": False, "output_attention_stats": True},
        "both directions": {"is_causal": False, "output_attention_stats": True},
        "segments": {"output_attention_stats": AttentionStatsConfig(segments=segments)},
        "rows and kept keys": {
            "output_attention_stats": AttentionStatsConfig(rows=(-1, 3), keep=segments % 2 == 0, statistics="all")
        },
        "a selection": {
            "output_attention_stats": AttentionStatsConfig(layers=(0, 2), heads=(3, 1), query_stride=3, offload="cpu")
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "situation", ["a 4-D mask", "packing", "both directions", "segments", "rows and kept keys", "a selection"]
)
def test_situations(situation, ids):
    build = tiny_model if situation == "a selection" else two_layers
    model = build("streaming", torch.float64)
    inputs = situations(ids)[situation]
    with torch.no_grad():
        expected, actual = model(ids, **inputs), in_one_graph(model)(ids, **inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert_same_statistics(actual.attention_stats, expected.attention_stats)


@pytest.mark.parametrize("statistics", [False, True])
def test_gradients(statistics, ids, left_padding):
    model = two_layers("streaming", torch.float64).train()
    gradients = []
    for forward in (model, in_one_graph(model)):
        model.zero_grad()
        outputs = forward(
            ids, attention_mask=left_padding, labels=ids, use_cache=False, output_attention_stats=statistics
        )
        outputs.loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache, ids, left_padding):
    model = two_layers("streaming", torch.float64)
    arguments = {
        "input_ids": ids, "attention_mask": left_padding, "max_new_tokens": 5, "do_sample": False,
        "cache_implementation": cache, "return_dict_in_generate": True, "output_attention_stats": True,
    }  # fmt: skip
    expected = model.generate(**arguments)
    model.forward = in_one_graph(model.forward)
    actual = model.generate(**arguments)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_same_statistics(actual.attention_stats, expected.attention_stats)


def test_graph_breaks_do_no_harm(ids, left_padding):
    model = two_layers("sdpa", torch.float64)
    arguments = {
        "input_ids": ids, "attention_mask": left_padding, "max_new_tokens": 3, "do_sample": False,
        "cache_implementation": "static", "return_dict_in_generate": True, "output_attention_stats": True,
    }  # fmt: skip
    expected = model.generate(**arguments)
    # One graph is impossible: upstream's 4-D mask for a static cache is checked against its filled length.
    model.forward = torch.compile(model.forward, backend="aot_eager")
    actual = model.generate(**arguments)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_same_statistics(actual.attention_stats, expected.attention_stats)


def test_checkpointing_in_one_graph_is_refused(ids):
    """Dynamo forbids what a layer tells the recorder from within a checkpoint; it says so and gives no numbers."""
    model = two_layers("sdpa").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        in_one_graph(model)(ids, use_cache=False, output_attention_stats=True)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_operator_keeps_the_rules_of_operators(padding):
    inputs = make_inputs(queries=9, cached=4, padding=padding, dtype=torch.float64)
    config = AttentionStatsConfig(statistics="all", segments=torch.zeros(2, 13, dtype=torch.long))
    statistics = [statistic for statistic in statistics_table().values() if not statistic.is_norm]
    tokens = torch.arange(26).view(2, 13) % 5
    keep = tokens[:, None] < 2
    wanted = Wanted(statistics, config, torch.zeros(2, 13, dtype=torch.long), 1, tokens, keep=keep)
    recorded = []

    def record(query, key, value):
        result = walk("torch", query, key, value, inputs.visibility, inputs.scoring, wanted)
        recorded.append((result.output, result.logsumexp, *result.raw.values()))
        return recorded[-1]

    record(inputs.query, inputs.key, inputs.value)
    compiled = torch.compile(record, fullgraph=True, backend="aot_eager")(inputs.query, inputs.key, inputs.value)
    for actual, expected in zip(compiled, recorded[0], strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("engine", ["torch", default_engine(torch.device("cpu"))])
@pytest.mark.parametrize(
    "kind", ["window, the cache has dropped keys", "soft-cap, bias and sinks", "cross-attention with sinks and a bias"]
)
def test_calls_of_every_kind(kind, engine):
    """Windows, soft-cap, sinks and a bias through the operator: numbers, and gradients of all that can learn."""
    call = make_call(**KINDS[kind])
    wanted = call.wanted([statistics_table()[name] for name in ("entropy", "received", "learned_sink_mass")])

    def attention(query, key, value, bias, sinks):
        scoring = replace(call.scoring, position_bias=bias, sinks=sinks)
        output, raw = fused(query, key, value, call.visibility, scoring, engine, wanted)
        return output, raw["entropy"], raw["received"], raw["learned_sink_mass"]

    results = []
    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        tensors = (call.query, call.key, call.value, call.scoring.position_bias, call.scoring.sinks)
        leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
        output, *measured = function(*leaves)
        output.square().sum().backward()
        results.append([output, *measured, *(leaf.grad for leaf in leaves if leaf is not None)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_are_refused(backend):
    """By the operator, and by torch's own compiler."""
    inputs = make_inputs(queries=9)

    def loss(query):
        return fused(query, inputs.key, inputs.value, inputs.visibility, inputs.scoring, "torch")[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    query = inputs.query.clone().requires_grad_()
    message = "differentiated once" if backend == "eager" else "does not currently support double backward"

    def penalty():
        (gradient,) = torch.autograd.grad(compiled(query), query, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match=message):
        penalty()
