"""`record` around whatever calls a model: wrappers, pipelines, `generate`, checkpointing, offloading."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload
from any_model import draw, left_padding, state
from conftest import CACHE, PEFT_LOSES_CACHE
from forked import Python
from transformers import StaticCache, TextGenerationPipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import ENTRIES

from llama_attn import AttentionStatsConfig, record
from llama_attn.testing import relative_error

# transformers and PEFT warn of one another's old names, and PEFT of positions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

IDS, PADDING = draw(12), left_padding(12)
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)


@pytest.fixture
def model():
    return ENTRIES["qwen3"].build()


def run(module, ids=IDS, **inputs):
    with torch.no_grad():
        return module(input_ids=ids, **inputs)


def measured(module, config=True, ids=IDS, **inputs):
    with record(module, config) as recording:
        run(module, ids, **inputs)
    return recording.stats


def assert_same(actual, expected, bound=1e-5):
    assert actual.names == expected.names
    for name in expected.names:
        assert relative_error(actual[name], expected[name]) <= bound, name


# generate


def generated(model, **settings):
    torch.manual_seed(0)
    plain = model.generate(IDS, attention_mask=PADDING, **settings)
    # A static cache is kept by the model.
    before = state(model)
    torch.manual_seed(0)
    with record(model) as recording:
        tokens = model.generate(IDS, attention_mask=PADDING, **settings)
    assert torch.equal(tokens, plain)
    assert state(model) == before
    return tokens, recording


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 2.0},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
def test_generate(settings, backend, model):
    model.set_attn_implementation(backend)
    tokens, recording = generated(model, **{**GREEDY, **settings})
    fed = tokens[:, :-1]
    mask = torch.nn.functional.pad(PADDING, (0, fed.shape[1] - 12), value=1)
    whole = measured(model, ids=fed, attention_mask=mask)
    if settings == {"use_cache": False}:
        # Every forward begins anew.
        with pytest.raises(ValueError, match=r"recording\.forwards"):
            _ = recording.stats
        assert_same(recording.forwards[-1], whole)
        return
    assert_same(recording.stats, whole)


def test_generate_of_our_own_class():
    """Its own statistics and those of `record` are the same, at the same time."""
    from conftest import tiny_model

    model = tiny_model()
    with record(model) as recording:
        outputs = model.generate(
            IDS, attention_mask=PADDING, return_dict_in_generate=True, output_attention_stats=True, **GREEDY
        )
    assert_same(recording.stats, outputs.attention_stats, 0.0)


def test_beams_are_several_runs(model):
    _, recording = generated(model, **{**GREEDY, "num_beams": 3})
    assert len(recording.forwards) == 4
    assert recording.forwards[1]["entropy"].shape == (3, 6, 4, 1)
    with pytest.raises(ValueError, match=r"recording\.forwards"):
        _ = recording.stats


def test_assisted_generation(model):
    ids = IDS[1:].repeat(1, 2)
    with record(model) as recording:
        model.generate(ids, prompt_lookup_num_tokens=3, **{**GREEDY, "max_new_tokens": 8})
    assert len(recording.forwards) >= 2
    steps = [stats["entropy"].shape[-1] for stats in recording.forwards]
    assert steps[0] >= 24
    assert max(steps[1:]) > 1  # candidates' rows are among them


def test_a_static_cache_of_the_users_own(model):
    whole = measured(model)
    cache = StaticCache(model.config, max_cache_len=20)
    with record(model) as recording:
        run(model, IDS[:, :7], **{CACHE: cache})
        run(model, IDS[:, 7:], **{CACHE: cache})
    assert_same(recording.stats, whole)


def test_encoder_and_decoder():
    t5 = ENTRIES["t5"].build()
    decoder, cross, encoder = (stack.path for stack in ENTRIES["t5"].stacks)
    with record(t5) as own, record(t5, stack=cross) as across, record(t5, stack=encoder) as source:
        t5.generate(IDS, attention_mask=PADDING, **GREEDY)
    assert [len(r.forwards) for r in (own, across, source)] == [4, 4, 1]
    assert own.stats["entropy"].shape == (2, 2, 4, 4)
    assert across.stats["entropy"].shape == (2, 2, 4, 4)
    assert across.stats["received"].shape == (2, 2, 4, 12)
    assert source.stats["entropy"].shape == (2, 2, 4, 12)
    assert own.stats.stack == decoder


def test_pipeline(smollm2):
    model, tokenizer = smollm2
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": 3, "do_sample": False, "return_full_text": True}
    expected = pipeline("The quick brown fox", **settings)
    with record(pipeline.model) as recording:
        assert pipeline("The quick brown fox", **settings) == expected
    stats = recording.stats
    prompt = tokenizer("The quick brown fox", return_tensors="pt").input_ids.shape[1]
    assert stats["entropy"].shape[-1] == prompt + 2


# Wrappers.


def adapted(model, settings):
    torch.manual_seed(0)
    wrapper = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return wrapper


def test_lora(model):
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=2)
    wrapper = adapted(model, settings)
    before = state(wrapper)
    with record(wrapper, EVERYTHING) as recording:
        run(wrapper)
    assert state(wrapper) == before
    assert recording.stats.paths[0] == "base_model.model.model.layers.0.self_attn"
    merged = measured(wrapper.merge_and_unload(), EVERYTHING)
    assert "value_output_norm" in merged.names
    assert_same(recording.stats, merged)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            marks=pytest.mark.skipif(PEFT_LOSES_CACHE, reason="peft's own fault on this transformers"),
        ),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    ],
    ids=["prefix", "prompt", "p-tuning"],
)
def test_virtual_tokens(settings, model):
    wrapper = adapted(model, settings)
    is_prefix = isinstance(settings, peft.PrefixTuningConfig)
    expected = wrapper.generate(input_ids=IDS, attention_mask=PADDING, **GREEDY)
    logits = run(wrapper, attention_mask=PADDING).logits
    with record(wrapper) as recording:
        assert torch.equal(run(wrapper, attention_mask=PADDING).logits, logits)
    stats = recording.stats
    # A prefix is in the cache and asks nothing; a prompt's virtual tokens are queries too.
    assert (stats["entropy"].shape[-1], stats["received"].shape[-1]) == (12 if is_prefix else 15, 15)
    assert stats.visible_keys[1, 0] == (4 if is_prefix else 1)
    with record(wrapper) as recording:
        assert torch.equal(wrapper.generate(input_ids=IDS, attention_mask=PADDING, **GREEDY), expected)
    stats = recording.stats
    keys = 15 + 3 * (1 + 3 * PEFT_LOSES_CACHE)
    assert (stats["entropy"].shape[-1], stats["received"].shape[-1]) == (15 if is_prefix else keys, keys)


def test_ddp(model, tmp_path):
    """In one process, forward and backward: gradients as without, and statistics as of the model inside."""
    code = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel as DDP
from zoo import ENTRIES
from any_model import draw
from llama_attn import record
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = ENTRIES["qwen3"].build().train()
ids = draw(12)
with record(model) as plain:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
wanted = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad(set_to_none=True)
wrapper = DDP(model)
with record(wrapper) as recording:
    wrapper(input_ids=ids, labels=ids, use_cache=False).loss.backward()
assert all(torch.equal(a, p.grad) for a, p in zip(wanted, model.parameters()))
assert torch.equal(recording.stats["entropy"], plain.stats["entropy"])
assert recording.stats.paths[0] == "module.model.layers.0.self_attn"
torch.distributed.destroy_process_group()
"""
    folder = Path(__file__).parent
    status, said = Python("-c", code, tmp_path / "rendezvous", folder=folder).ended()
    assert status == 0, said[-4000:]


def test_a_wrapper_of_ones_own(model):
    class Judge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(input_ids=ids).logits.mean()

    judge = Judge()
    with record(judge) as recording, torch.no_grad():
        judge(IDS)
    assert_same(recording.stats, measured(model), 0.0)
    assert recording.stacks == ("inner.model.layers.#.self_attn",)


@pytest.mark.parametrize("config", [True, EVERYTHING], ids=["default", "all"])
def test_offloaded_weights(config, model):
    expected = measured(model, config)
    cpu_offload(model, execution_device=torch.device("cpu"))
    hooked = state(model)
    assert_same(measured(model, config), expected, 1e-6)
    assert model.model.layers[0].self_attn.o_proj.weight.is_meta
    assert state(model) == hooked


# Training.


def gradients(model, recorded, **kwargs):
    model.train()
    model.zero_grad(set_to_none=True)
    recording = record(model, kwargs.pop("config", True))
    if recorded:
        with recording:
            model(input_ids=IDS, labels=IDS, attention_mask=PADDING, use_cache=False).loss.backward()
    else:
        model(input_ids=IDS, labels=IDS, attention_mask=PADDING, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()], recording


@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "new", "reentrant"])
def test_checkpointing(reentrant, backend, model):
    model.set_attn_implementation(backend)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, _ = gradients(model, False)
    actual, recording = gradients(model, True, config=EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(recording.forwards) == 1
    model.gradient_checkpointing_disable()
    model.eval()
    assert_same(recording.stats, measured(model, EVERYTHING, attention_mask=PADDING), 0.0)


def test_a_backward_after_the_block(model):
    model.train()
    expected, _ = gradients(model, False)
    model.zero_grad(set_to_none=True)
    with record(model, EVERYTHING):
        loss = model(input_ids=IDS, labels=IDS, attention_mask=PADDING, use_cache=False).loss
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))


def test_an_attention_function_may_have_options_of_any_name(model):
    """What runs in its place takes the module by name, too."""
    attention, states = model.model.layers[0].self_attn, torch.randn(3, 1, 4, 5, 16)
    given = dict(zip(("query", "key", "value"), states, strict=True)) | {"attention_mask": None, "is_causal": True}
    options = {"attend": 1, "name": "a name", "outside": True}

    def attend():
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(module=attention, **given, **options)[0]

    expected = attend()
    with record(model), torch.no_grad():
        assert torch.equal(attend(), expected)


def test_random_state_is_not_touched():
    """Dropout in training gives what it gave."""
    bert = ENTRIES["bert"].build("eager").train()
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    bert.config.attention_probs_dropout_prob = 0.2
    torch.manual_seed(3)
    expected = run(bert).last_hidden_state
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    with record(bert, EVERYTHING):
        assert torch.equal(run(bert).last_hidden_state, expected)
    assert torch.equal(torch.random.get_rng_state(), after)
