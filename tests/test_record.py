"""`record`: what it takes, gives and refuses, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from pathlib import Path

import pytest
import torch
from any_model import draw, left_padding, state
from conftest import CACHE
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import ENTRIES, NOT_SERVED

from llama_attn import AttentionStatsConfig, record
from llama_attn.observe import compiled, interface, requests
from llama_attn.testing import relative_error

IDS = draw(12)
T5_SELF, T5_CROSS, T5_ENCODER = (stack.path for stack in ENTRIES["t5"].stacks)


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """After every test, in whatever way it ended, transformers and the registries are as they were."""
    before = sorted(vars(ALL_ATTENTION_FUNCTIONS)), dict(interface.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    yield
    after = sorted(vars(ALL_ATTENTION_FUNCTIONS)), dict(interface.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    assert after == before
    for registry in (
        interface._watched,
        interface._intervening,
        interface._cross,
        interface._shadowed,
        compiled.modules,
    ):
        assert not registry
    assert not requests._notes.requests


@pytest.fixture
def model():
    return ENTRIES["qwen3"].build()


@pytest.fixture
def t5():
    return ENTRIES["t5"].build()


def run(module, ids=IDS, **inputs):
    with torch.no_grad():
        return module(input_ids=ids, **inputs)


def run_t5(module):
    with torch.no_grad():
        return module(input_ids=IDS, decoder_input_ids=draw(7, seed=3))


def measured(module, config=True, **inputs):
    with record(module, config) as recording:
        run(module, **inputs)
    return recording.stats


def assert_same(actual, expected, bound=0.0):
    assert actual.names == expected.names
    for name in expected.names:
        assert relative_error(actual[name], expected[name]) <= bound, name


# What it gives.


def test_one_forward(model):
    stats = measured(model)
    assert stats["entropy"].shape == (3, 2, 4, 12)
    assert stats.stack == "model.layers.#.self_attn"
    assert stats.paths == tuple(f"model.layers.{n}.self_attn" for n in range(3))
    assert (stats.layers, stats.num_layers, stats.direction, stats.backend) == ((0, 1, 2), 3, "causal", "sdpa")


def test_each_statistic_by_itself(model):
    """What a layer is looked at for does not depend on what else was asked for."""
    whole = measured(model, AttentionStatsConfig(statistics="all", norms=True))
    names = [name for name in whole.names if name not in ("visible_keys", "visible_queries")]
    assert {"entropy", "hidden_top", "hidden_norm", "key_norm", "value_output_norm", "induction"} <= set(names)
    for name in names:
        alone = measured(model, AttentionStatsConfig(statistics=(name,), norms=False))
        assert name in alone.names
        assert relative_error(alone[name], whole[name]) <= 1e-5, name


def test_several_forwards_that_are_no_run(model):
    with record(model) as recording:
        run(model)
        run(model, draw(9))
    assert [stats["entropy"].shape[-1] for stats in recording.forwards] == [12, 9]
    with pytest.raises(ValueError, match=r"forward 2 of 2 does not go on.*recording\.forwards"):
        _ = recording.stats
    assert_same(recording.forwards[0], measured(model))


def test_forwards_of_one_run(model):
    whole = measured(model)
    with record(model) as recording:
        cache = run(model, IDS[:, :7]).past_key_values
        cache = run(model, IDS[:, 7:9], **{CACHE: cache}).past_key_values
        run(model, IDS[:, 9:], **{CACHE: cache})
    assert [next(iter(stats.queries)) for stats in recording.forwards] == [0, 7, 9]
    assert_same(recording.stats, whole, 1e-5)


def test_statistics_can_be_looked_at_while_it_runs(model):
    with record(model) as recording:
        cache = run(model, IDS[:, :7]).past_key_values
        first = recording.stats["entropy"].clone()
        run(model, IDS[:, 7:], **{CACHE: cache})
    assert torch.equal(recording.stats["entropy"][..., :7], first)


def test_a_part_of_a_model(model):
    whole = measured(model)
    with record(model.model) as recording:
        run(model)
    assert recording.stacks == ("layers.#.self_attn",)
    assert_same(recording.stats, whole)
    with record(model.model.layers[1]) as recording:
        run(model)
    assert recording.stats.paths == ("self_attn",)
    assert torch.equal(recording.stats["entropy"][0], whole["entropy"][1])


def test_selections(model):
    whole = measured(model)
    stats = measured(model, AttentionStatsConfig(layers=(0, 2), heads=(3, 1), query_stride=5))
    assert stats.layers == (0, 2)
    assert torch.equal(stats["entropy"], whole["entropy"][[0, 2]][:, :, [3, 1], ::5])


def test_stacks_are_listed_and_chosen(t5):
    with record(t5) as recording:
        run_t5(t5)
    assert set(recording.stacks) == {T5_SELF, T5_CROSS, T5_ENCODER}
    assert recording.stacks[0] == T5_ENCODER  # in the order in which they are called
    assert (recording.stats.stack, recording.stats.direction) == (T5_SELF, "causal")
    with record(t5, stack=T5_ENCODER) as recording:
        run_t5(t5)
    assert recording.stats.direction == "bidirectional"
    assert recording.stats["entropy"].shape[-1] == 12


def test_cross_attention_has_no_distances(t5):
    with record(t5, AttentionStatsConfig(statistics="all"), stack=T5_CROSS) as recording:
        run_t5(t5)
    stats = recording.stats
    assert stats.direction == "cross"
    assert stats["received"].shape[-1] == 12
    assert stats["entropy"].shape[-1] == 7
    for name in ("mean_distance", "local_mass", "distance_histogram", "previous_token"):
        assert stats[name].isnan().all(), name
    assert not stats["entropy"].isnan().any()


def test_norms_that_a_model_cannot_give():
    hybrid = ENTRIES["qwen3_next"].build()
    stats = measured(hybrid, AttentionStatsConfig(statistics="all", norms=True))
    assert "value_output_norm" not in stats.names  # a gate stands between attention and its projection
    assert "hidden_norm" in stats.names
    assert stats.layers == (1, 3)
    with pytest.raises(ValueError, match="value_output_norm"):
        measured(hybrid, AttentionStatsConfig(statistics=("entropy", "value_output_norm")))
    run(hybrid)


# What it refuses.


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_models_that_never_ask_the_interface(name):
    entry = NOT_SERVED[name]
    module = entry.build(entry.stock[0])
    if "get_interface" in Path(inspect.getfile(type(module))).read_text():
        pytest.skip("this transformers has brought it to the interface")
    with pytest.raises(ValueError, match=r"record: .* has no attention that goes through"), record(module):
        run(module)


def test_names_that_are_not_there(model):
    with pytest.raises(ValueError, match=r"stack: there is no 'model\.encoder'.*self_attn"):
        record(model, stack="model.encoder").__enter__()
    # Modules that are there, but hold attention or are part of it.
    for name in ("model.layers", "model.layers.#", "model.layers.#.self_attn.q_proj"):
        with pytest.raises(ValueError, match=rf"stack: there is no '{name}'; there are .*self_attn"):
            record(model, stack=name).__enter__()
    with (
        pytest.raises(ValueError, match=r"record: 'lm_head' called no attention; .*self_attn"),
        record(model, stack="lm_head"),
    ):
        run(model)
    with pytest.raises(ValueError, match="layers"):
        record(model, AttentionStatsConfig(layers=(0, 7))).__enter__()
    with pytest.raises(ValueError, match="heads"), record(model, AttentionStatsConfig(heads=(9,))):
        run(model)
    hybrid = ENTRIES["qwen3_next"].build()
    with pytest.raises(ValueError, match=r"\[0\].*have no attention.*\[1, 3\]"):
        record(hybrid, AttentionStatsConfig(layers=(0,))).__enter__()
    run(model)


def test_arguments():
    with pytest.raises(TypeError, match="module: expected"):
        record("gpt2")
    with pytest.raises(ValueError, match="config"):
        record(torch.nn.Linear(2, 2), False)


def test_a_body_without_a_forward(model):
    with pytest.raises(ValueError, match="no attention of Qwen3ForCausalLM was called"), record(model):
        pass
    other = ENTRIES["qwen3"].build()
    with pytest.raises(ValueError, match="no attention of Qwen3ForCausalLM was called"), record(model):
        run(other)


def test_a_stack_that_was_not_called(t5):
    with pytest.raises(ValueError, match="SelfAttention"), record(t5, stack=T5_CROSS):
        t5.encoder(input_ids=IDS)


def test_the_same_module_twice(model):
    with record(model) as outer:
        with pytest.raises(ValueError, match="already being recorded"):
            record(model).__enter__()
        run(model)
    assert_same(outer.stats, measured(model))


def test_a_recording_is_used_once(model):
    with record(model) as recording:
        run(model)
    with pytest.raises(ValueError, match="has been used"):
        recording.__enter__()


def test_an_exception_in_the_body_passes_through(model):
    before = state(model)

    def body():
        with record(model, AttentionStatsConfig(statistics="all", norms=True)):
            run(model)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        body()
    assert state(model) == before
    assert_same(measured(model), measured(model))


def test_an_exception_in_the_middle_of_a_forward(model):
    def fail(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    recording = record(model)
    with pytest.raises(KeyboardInterrupt), recording:
        run(model)
    handle.remove()
    with pytest.raises(ValueError, match="nothing was measured"):
        _ = recording.stats
    expected = measured(model)
    with record(model) as recording:
        run(model)
    assert_same(recording.stats, expected)


def test_a_forward_that_fails_and_is_tried_again(model):
    """A body that handles its own error has the statistics of what went well."""
    expected = measured(model)
    with record(model) as recording:
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model)
        handle.remove()
        run(model)
    assert_same(recording.forwards[-1], expected)


def test_clip_and_siglip_have_different_defaults():
    inputs = ENTRIES["clip"].inputs(2)
    clip, siglip = ENTRIES["clip"].build(), ENTRIES["siglip"].build()
    with record(clip) as recording:
        run(clip, **inputs)
    assert recording.stats.stack.startswith("text_model")
    with pytest.raises(ValueError, match=r"choose one: record\(module, stack=…\).*text_model.*vision_model"):
        measured(siglip, **inputs)


def test_continuous_batching_is_refused(model):
    model.set_attn_implementation("sdpa")
    attention, states = model.model.layers[0].self_attn, torch.randn(1, 5, 32)
    rotary = model.model.rotary_emb(states, torch.arange(5)[None])
    # Since transformers 5.24 the layer fills the cache itself, and its function sees where to read.
    cache = type("PagedAttentionCache", (), {})()
    paged = {"cache": cache} if CACHE == "past_key_values" else {"read_index": object()}
    with pytest.raises(ValueError, match="generate_batch"), record(model), torch.no_grad():
        attention(states, position_embeddings=rotary, attention_mask=None, **paged)


# Several of them.


def test_nested_recordings_of_parts(model):
    expected = measured(model)
    with record(model) as outer, record(model.model) as inner, record(model.model.layers[2]) as layer:
        run(model)
    assert_same(outer.stats, expected)
    assert_same(inner.stats, expected)
    assert torch.equal(layer.stats["entropy"][0], expected["entropy"][2])


def test_stacks_of_one_model_at_once(t5):
    with record(t5) as own, record(t5, stack=T5_CROSS) as cross, record(t5, stack=T5_ENCODER) as encoder:
        run_t5(t5)
    assert [r.stats.direction for r in (own, cross, encoder)] == ["causal", "cross", "bidirectional"]


def test_interleaved_recordings(model):
    other = ENTRIES["mistral"].build()
    first, second = record(model), record(other)
    first.__enter__()
    run(model)
    second.__enter__()
    run(other)
    first.__exit__(None, None, None)
    run(other)
    run(model)
    second.__exit__(None, None, None)
    assert len(first.forwards) == 1
    assert len(second.forwards) == 2
    assert_same(first.stats, measured(model))


def test_a_model_with_the_same_configuration_is_left_alone(model):
    other = type(model)(model.config).eval()
    expected = run(other).logits
    with record(model) as recording:
        run(model)
        assert torch.equal(run(other).logits, expected)
    assert len(recording.forwards) == 1


def test_threads(model):
    """The recorded model is recorded in whatever thread it runs; another's thread goes on undisturbed."""
    other, expected = ENTRIES["mistral"].build(), measured(model)
    logits, found, errors = run(other).logits, [], []
    stop = threading.Event()

    def beside():
        while not stop.is_set():
            found.append(torch.equal(run(other).logits, logits))

    def within():
        try:
            run(model)
        except BaseException as error:
            errors.append(error)

    beside_thread = threading.Thread(target=beside)
    beside_thread.start()
    with record(model) as recording:
        worker = threading.Thread(target=within)
        worker.start()
        worker.join()
    while not found:
        pass
    stop.set()
    beside_thread.join()
    assert not errors
    assert all(found)
    assert_same(recording.stats, expected)


# What happens to the model meanwhile.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_are_not_recorded(copied, model):
    expected = run(model).logits
    with record(model, AttentionStatsConfig(statistics="all", norms=True)) as recording:
        run(model)
        other = copied(model)
        assert torch.equal(run(other).logits, expected)
    assert len(recording.forwards) == 1
    assert torch.equal(run(other).logits, expected)


def test_another_implementation_inside(model):
    expected = measured(model)
    with record(model) as recording:
        run(model)
        model.set_attn_implementation("eager")
        run(model)
        model.set_attn_implementation("streaming")
        run(model)
    assert [stats.backend for stats in recording.forwards] == ["sdpa", "eager", "streaming"]
    for stats in recording.forwards:
        assert_same(stats, expected, 1e-5)


def test_an_implementation_that_is_registered_inside(model, restored_registry):
    expected = measured(model)
    with record(model) as recording:
        AttentionInterface.register("mine", ALL_ATTENTION_FUNCTIONS["sdpa"])
        interface.ALL_MASK_ATTENTION_FUNCTIONS.register("mine", interface.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation("mine")
        run(model, attention_mask=left_padding(12))
    assert recording.stats.backend == "mine"
    assert recording.stats["entropy"].shape == expected["entropy"].shape


def test_state(model):
    before = state(model)
    with record(model, AttentionStatsConfig(statistics="all", norms=True)):
        run(model)
    assert state(model) == before


def test_the_check_of_state_can_fail(model):
    before = state(model)
    handle = model.model.register_forward_hook(lambda *args: None)
    assert state(model) != before
    handle.remove()
    model.model.layers[0].self_attn.something = 1
    assert state(model) != before
