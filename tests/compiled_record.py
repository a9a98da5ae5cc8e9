"""`record` around compiled models of any type: compiled anew, or long before anybody recorded.

Run by test_compile.py.
"""

from __future__ import annotations

import pytest
import torch
from any_model import draw, left_padding, state
from conftest import tiny_model
from torch._dynamo.utils import counters
from zoo import ENTRIES

from llama_attn import AttentionStatsConfig, ablate_heads, block_keys, record
from llama_attn.testing import relative_error

# Dynamo warns about transformers' own code while it traces.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = draw(12)
EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def built(name, backend="sdpa"):
    """One of the zoo, but for the third layer of a decoder: Dynamo takes seconds for each."""
    model = ENTRIES[name].build(backend)
    if model.config.model_type in ("qwen3", "mistral"):
        del model.model.layers[2:]
        model.config.num_hidden_layers = 2
    return model


def run(module, length=12, **inputs):
    with torch.no_grad():
        return module(input_ids=IDS[:, :length], **inputs)


def graphs():
    return counters["stats"]["unique_graphs"]


def assert_same(actual, expected, bound=1e-5):
    assert actual.names == expected.names
    for name in expected.names:
        assert relative_error(actual[name], expected[name]) <= bound, name


@pytest.mark.parametrize(("name", "backend"), [("qwen3", "sdpa"), ("mistral", "streaming"), ("bert", "eager")])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_compiled_model(warm, name, backend):
    model = built(name, backend)
    with record(model) as recording:
        run(model)
    expected = recording.stats
    compiled = torch.compile(model, backend="aot_eager")
    if warm:
        plain = run(compiled)[0]
    with record(compiled) as recording:
        recorded = run(compiled)[0]
    if not warm:
        plain = run(compiled)[0]
    assert torch.equal(recorded, plain)
    assert_same(recording.stats, expected)


@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_many_recordings_take_few_graphs(name):
    model = built(name)
    inputs = {"decoder_input_ids": draw(7, seed=3)} if name == "t5" else {}
    compiled = torch.compile(model, backend="aot_eager")
    run(compiled, **inputs)
    before, found = graphs(), state(model)
    seen = []
    for _ in range(12):
        with record(compiled) as recording:
            run(compiled, **inputs)
        seen.append(recording.stats["entropy"])
    assert all(torch.equal(entropy, seen[0]) for entropy in seen)
    assert graphs() <= 2 * before + 1
    assert state(model) == found


def test_one_graph():
    """The observed calls do not break it."""
    model = built("qwen3")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with record(compiled) as recording:
        run(compiled)
    with record(model) as plain:
        run(model)
    assert_same(recording.stats, plain.stats)
    assert graphs() == 1


def test_steps_of_a_compiled_model():
    """What is recorded grows, and the graph does not see it."""
    model = built("qwen3")
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    with record(compiled) as recording:
        for _ in range(10):
            run(compiled)
    assert len(recording.forwards) == 10
    assert graphs() <= 2


UNSEEN = ("duplicate_token", "induction", "value_output_norm")
ONE_NORM = AttentionStatsConfig(statistics=("entropy", "hidden_norm"))


def test_everything_is_measured():
    model = built("qwen3")
    with record(model, EVERYTHING) as plain:
        run(model, attention_mask=left_padding(12))
    compiled = torch.compile(model, backend="aot_eager")
    with record(compiled, EVERYTHING) as recording:
        run(compiled, attention_mask=left_padding(12))
    # What is not in the attention call is seen by hooks, which a graph does not run in time.
    seen = [name for name in plain.stats.names if not name.startswith("hidden") and name not in UNSEEN]
    assert recording.stats.names == tuple(seen)
    for name in seen:
        assert relative_error(recording.stats[name], plain.stats[name]) <= 1e-5, name
    with pytest.raises(ValueError, match="'hidden_norm' cannot be given"), record(compiled, ONE_NORM):
        run(compiled)


def test_gradients():
    model = built("qwen3").train()
    compiled = torch.compile(model, backend="aot_eager")

    def gradients(recorded):
        model.zero_grad(set_to_none=True)
        recording = record(compiled)
        if recorded:
            recording.__enter__()
        compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        if recorded:
            recording.__exit__(None, None, None)
            assert len(recording.forwards) == 1
        return [parameter.grad.clone() for parameter in model.parameters()]

    off = gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), off, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa", "streaming"])
def test_what_is_changed_in_a_compiled_model(backend):
    model = built("qwen3", backend)
    compiled = torch.compile(model, backend="aot_eager")
    plain = run(model).logits
    torch.testing.assert_close(run(compiled).logits, plain, rtol=0, atol=1e-5)
    for change in (ablate_heads(model, {1: [0]}, "mean"), block_keys(model, [3], first_query=5)):
        with change:
            expected = run(model).logits
            found = []
            for _ in range(3):
                torch.testing.assert_close(run(compiled).logits, expected, rtol=0, atol=1e-5)
                found.append(graphs())
        assert found[2] == found[0]
        assert float((expected - plain).abs().max()) > 0.01
        torch.testing.assert_close(run(compiled).logits, plain, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_layer_that_calls_attention_twice_in_one_forward(is_compiled):
    model = built("qwen3")
    attention = model.model.layers[1].self_attn
    once = attention.forward
    attention.forward = lambda *args, **kwargs: [once(*args, **kwargs), once(*args, **kwargs)][1]
    module = torch.compile(model, backend="aot_eager") if is_compiled else model
    with pytest.raises(ValueError, match="Qwen3Attention calls attention several times"), ablate_heads(model, {0: [1]}):
        run(module, use_cache=False)
    with pytest.raises(ValueError, match="Qwen3Attention calls attention several times"), record(model):
        run(module, use_cache=False)


@torch.no_grad()
def test_a_layer_that_is_compiled_and_does_not_run():
    """What a graph that was made before has done is asked of the forwards of the block."""
    model = built("qwen3")
    compiled = torch.compile(model, backend="aot_eager")
    block = ablate_heads(model, {1: [0]})
    with block:
        run(compiled)
    with pytest.raises(ValueError, match="nothing was changed"), block:
        pass
    found = graphs()
    with block:
        run(compiled)
    assert graphs() == found


@torch.no_grad()
def test_a_change_of_one_of_several_layers_that_are_one_module():
    model = built("albert")
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match="in a compiled model it cannot be seen"), ablate_heads(model, {1: [1]}):
        compiled(IDS)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "around it"])
def test_a_graph_of_the_decoder_alone(in_place):
    """Our class observes it from outside, with one graph for all forwards."""
    model = tiny_model("sdpa", num_hidden_layers=2)
    expected = run(model, output_attention_stats=True).attention_stats
    if in_place:
        model.model.compile(backend="aot_eager")
    else:
        model.model = torch.compile(model.model, backend="aot_eager")
    found = []
    for _ in range(3):
        assert_same(run(model, output_attention_stats=True).attention_stats, expected)
        found.append(graphs())
    assert found[2] == found[0]
