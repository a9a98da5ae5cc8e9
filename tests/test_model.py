"""Promises 1 and 2: a drop-in for transformers' class, and observing changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import CACHE, tiny_config, tiny_model
from oracle import stock_of
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama as upstream

import llama_attn
from llama_attn import AttentionStatsConfig, LlamaForCausalLM, LlamaModel, modeling_llama
from llama_attn.observe.outputs import BaseModelOutputWithAttentionStats, CausalLMOutputWithAttentionStats

EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_off_is_bit_identical_to_stock(backend, ids, left_padding):
    model = tiny_model(backend)
    ours, theirs = (run(m, input_ids=ids, attention_mask=left_padding, labels=ids) for m in (model, stock_of(model)))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.past_key_values.layers[1].keys, theirs.past_key_values.layers[1].keys)
    assert type(ours) is CausalLMOutputWithPast


# Compiling flex_attention makes torch 2.13 and transformers 5.23 warn about themselves.
FLEX = pytest.param("flex_attention", marks=pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.mark.parametrize("backend", ["eager", "sdpa", FLEX, "streaming"])
@pytest.mark.parametrize("config", [True, EVERYTHING, AttentionStatsConfig(heads=(1,), query_stride=5)], ids=repr)
def test_on_is_bit_identical_to_off(backend, config, ids, left_padding):
    model = tiny_model(backend)
    off = run(model, input_ids=ids, attention_mask=left_padding)
    on = run(model, input_ids=ids, attention_mask=left_padding, output_attention_stats=config)
    assert torch.equal(on.logits, off.logits)
    assert type(off) is CausalLMOutputWithPast
    assert type(on) is CausalLMOutputWithAttentionStats


def test_streaming_gives_the_logits_of_sdpa(ids, left_padding):
    model = tiny_model("sdpa", torch.float64)
    expected = run(model, input_ids=ids, attention_mask=left_padding).logits
    model.set_attn_implementation("streaming")
    actual = run(model, input_ids=ids, attention_mask=left_padding).logits
    torch.testing.assert_close(actual[left_padding.bool()], expected[left_padding.bool()], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_same_seed_same_weights(tied):
    config = tiny_config(tie_word_embeddings=tied)
    models = []
    for cls in (upstream.LlamaForCausalLM, LlamaForCausalLM):
        torch.manual_seed(3)
        models.append(cls(copy.deepcopy(config)))
    theirs, ours = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_every_part_is_a_subclass_and_is_used():
    model = tiny_model()
    for name in ("LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer", "LlamaAttention"):
        assert issubclass(getattr(modeling_llama, name), getattr(upstream, name))
        assert getattr(modeling_llama, name) is not getattr(upstream, name)
    assert type(model.model) is LlamaModel
    assert {type(layer) for layer in model.model.layers} == {modeling_llama.LlamaDecoderLayer}
    assert {type(layer.self_attn) for layer in model.model.layers} == {modeling_llama.LlamaAttention}
    layer = modeling_llama.LlamaDecoderLayer(tiny_config(), 0)
    assert type(layer.self_attn) is modeling_llama.LlamaAttention
    for name in ("LlamaRotaryEmbedding", "LlamaMLP", "LlamaRMSNorm"):
        assert getattr(modeling_llama, name) is getattr(upstream, name)
    for name in ("_no_split_modules", "_tp_plan", "_pp_plan", "_tied_weights_keys", "_supports_sdpa"):
        assert getattr(model, name) == getattr(stock_of(model), name), name
    assert model.base_model_tp_plan if hasattr(model, "base_model_tp_plan") else model.config.base_model_tp_plan


def test_checkpoints_go_both_ways(tmp_path, ids):
    model = tiny_model(dtype=torch.float64)
    model.save_pretrained(tmp_path / "ours")
    theirs = upstream.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(run(theirs, input_ids=ids).logits, run(model, input_ids=ids).logits)
    assert AutoConfig.from_pretrained(tmp_path / "ours").architectures == ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="streaming")
    assert ours.config._attn_implementation == "streaming"
    torch.testing.assert_close(run(ours, input_ids=ids).logits, run(model, input_ids=ids).logits)


def test_auto_model_gives_our_class_until_unregistered(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    try:
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
        llama_attn.unregister()
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is upstream.LlamaForCausalLM
        with pytest.raises(ValueError, match="streaming"):
            upstream.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="streaming")
        llama_attn.unregister()
    finally:
        llama_attn.register()
    llama_attn.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="streaming")
    assert type(model) is LlamaForCausalLM


def test_unregistering_leaves_another_librarys_class_alone():
    class Other(upstream.LlamaForCausalLM):
        pass

    try:
        AutoModelForCausalLM.register(upstream.LlamaConfig, Other, exist_ok=True)
        llama_attn.unregister()
        assert type(AutoModelForCausalLM.from_config(tiny_config())) is Other
    finally:
        llama_attn.register()


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_the_base_model_takes_the_argument_too(backend, ids, left_padding):
    model = tiny_model(backend)
    inputs = {"input_ids": ids, "attention_mask": left_padding}
    base = run(model.model, **inputs, output_attention_stats=True)
    assert type(base) is BaseModelOutputWithAttentionStats
    assert torch.equal(base.last_hidden_state, run(model.model, **inputs).last_hidden_state)
    whole = run(model, **inputs, output_attention_stats=True).attention_stats
    torch.testing.assert_close(base.attention_stats["entropy"], whole["entropy"], equal_nan=True)
    assert type(run(model.model, **inputs)) is BaseModelOutputWithPast


def test_return_dict_false_puts_the_statistics_last(ids):
    model = tiny_model()
    output = run(model, input_ids=ids, output_attention_stats=True, return_dict=False)
    assert isinstance(output, tuple)
    assert isinstance(output[-1], llama_attn.AttentionStats)
    base = run(model.model, input_ids=ids, output_attention_stats=True, return_dict=False)
    assert isinstance(base[-1], llama_attn.AttentionStats)


def test_upstreams_own_outputs_stay(ids):
    model = tiny_model("eager")
    output = run(model, input_ids=ids, output_attentions=True, output_hidden_states=True, output_attention_stats=True)
    assert len(output.hidden_states) == 4
    weights = torch.stack(output.attentions)
    torch.testing.assert_close(output.attention_stats["max_weight"], weights.amax(-1))


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("first", [20, 36, 1])
def test_continuing_from_a_cache_gives_the_rows_of_one_forward(backend, first, ids, left_padding):
    model = tiny_model(backend, torch.float64)
    whole = run(model, input_ids=ids, attention_mask=left_padding, output_attention_stats=EVERYTHING).attention_stats
    cache = run(model, input_ids=ids[:, :first], attention_mask=left_padding[:, :first]).past_key_values
    positions = torch.arange(first, 37)[None].expand(2, -1)
    rest = run(
        model, input_ids=ids[:, first:], attention_mask=left_padding, **{CACHE: cache},
        position_ids=positions, output_attention_stats=EVERYTHING,
    ).attention_stats  # fmt: skip
    assert rest.queries == range(first, 37)
    for name in ("entropy", "sink_mass", "local_mass", "mean_distance", "max_logit", "topk_weight"):
        torch.testing.assert_close(rest[name], whole[name][:, :, :, first:], equal_nan=True, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rest["key_norm"], whole["key_norm"], equal_nan=True)
    total = rest["received_total"].nansum(-1)
    real = left_padding[:, first:].sum(-1).double()
    torch.testing.assert_close(total, real[None, :, None].expand_as(total))


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_a_mask_of_the_users_own_behind_a_cache(backend, ids):
    """With a stride that does not start at the first query: the rows of the mask and of the queries keep together."""
    model = tiny_model(backend, torch.float64)
    config = AttentionStatsConfig(statistics="all", norms=True, query_stride=4)
    mask = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, :, range(37), range(37)] = True
    mask[:, :, :22, 22:] = False  # the cache is filled before they come
    mask[0, :, 28] = False  # a measured query that sees nothing
    whole = run(model, input_ids=ids, attention_mask=mask, output_attention_stats=config).attention_stats
    cache = run(model, input_ids=ids[:, :22], attention_mask=mask[:, :, :22, :22]).past_key_values
    rest = run(
        model, input_ids=ids[:, 22:], attention_mask=mask[:, :, 22:], **{CACHE: cache},
        position_ids=torch.arange(22, 37)[None].expand(2, -1), output_attention_stats=config,
    ).attention_stats  # fmt: skip
    assert rest.queries == range(24, 37, 4)
    compared = [name for name in rest.names if "query" in rest.labels[name].dims]
    for name in compared:
        axis = rest.labels[name].dims.index("query")
        expected = whole[name].narrow(axis, 6, 4)
        torch.testing.assert_close(rest[name], expected, equal_nan=True, rtol=1e-9, atol=1e-9, msg=name)
    assert len(compared) == 18
    assert torch.equal(rest.visible_keys, whole.visible_keys[:, 6:])


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("kind", [None, 30, 37, 64, "4-D"])
def test_a_static_cache(kind, backend, ids, left_padding):
    """Its 64 slots reach beyond the 37 tokens, and so may a mask; tokens beyond a shorter mask are padding."""
    model = tiny_model(backend, torch.float64)
    length, mask = kind if isinstance(kind, int) else 37, None if kind is None else left_padding
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, max(0, length - 37)), value=1)[:, :length]
    same = None if mask is None else torch.nn.functional.pad(mask, (0, max(0, 37 - length)))[:, :37]
    if kind == "4-D":
        same = torch.ones(2, 1, 37, 37, dtype=torch.bool).tril() & left_padding.bool()[:, None, None]
        same |= torch.eye(37, dtype=torch.bool)
        mask = torch.nn.functional.pad(same, (0, 27))
    expected = run(model, input_ids=ids, attention_mask=same, output_attention_stats=EVERYTHING)
    cache = StaticCache(config=model.config, max_cache_len=64)
    actual = run(model, input_ids=ids, attention_mask=mask, **{CACHE: cache}, output_attention_stats=EVERYTHING)
    for name, value in expected.attention_stats.values.items():
        torch.testing.assert_close(actual.attention_stats[name], value, equal_nan=True, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_a_left_padded_batch_equals_each_prompt_alone(backend):
    model = tiny_model(backend, torch.float64)
    long = torch.randint(3, 97, (1, 23), generator=torch.Generator().manual_seed(5))
    short = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(6))
    batch = torch.cat([long, torch.nn.functional.pad(short, (14, 0))])
    mask = torch.ones_like(batch)
    mask[1, :14] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = run(
        model, input_ids=batch, attention_mask=mask, position_ids=positions, output_attention_stats=EVERYTHING
    ).attention_stats
    for row, alone_ids, start in ((0, long, 0), (1, short, 14)):
        alone = run(model, input_ids=alone_ids, output_attention_stats=EVERYTHING).attention_stats
        compared = 0
        for name in alone.names:
            dims = alone.labels[name].dims
            if not {"query", "key"} & set(dims):
                # Pooled, or of all tokens of the batch together.
                continue
            expected, actual = (
                alone[name].select(dims.index("batch"), 0),
                together[name].select(dims.index("batch"), row),
            )
            axis = next(i for i, dim in enumerate(d for d in dims if d != "batch") if dim in ("query", "key"))
            actual = actual.narrow(axis, start, alone_ids.shape[1])
            if name == "topk_position":
                actual = torch.where(actual >= 0, actual - start, actual)
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-9, atol=1e-9, msg=name)
            compared += 1
        assert compared == 27


@pytest.mark.smollm2
def test_left_padding_on_smollm2(smollm2):
    model, tokenizer = smollm2
    model.set_attn_implementation("streaming")
    texts = ["The capital of France is Paris, and the capital of", "Once upon a time"]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = run(model.double(), **batch, position_ids=positions, output_attention_stats=True).attention_stats
    assert not batch["attention_mask"].all()
    for row, text in enumerate(texts):
        alone = run(model, **tokenizer(text, return_tensors="pt"), output_attention_stats=True).attention_stats
        for name in alone.names:
            actual = together[name][:, row, :, -alone.num_keys :]
            torch.testing.assert_close(actual, alone[name][:, 0], rtol=1e-8, atol=1e-8, msg=name)


def test_pinned_classes(ids, left_padding):
    model = tiny_model("sdpa")
    expected = run(model, input_ids=ids, attention_mask=left_padding, output_attention_stats=True)
    for layer in model.model.layers:
        layer.self_attn.__class__ = modeling_llama.LlamaSdpaAttention
    assert torch.equal(run(model, input_ids=ids, attention_mask=left_padding).logits, expected.logits)
    # eager's additive mask is one that sdpa reads, so the pin may ignore the configuration
    model.config._attn_implementation_internal = "eager"
    pinned = run(model, input_ids=ids, attention_mask=left_padding, output_attention_stats=True)
    torch.testing.assert_close(pinned.logits[left_padding.bool()], expected.logits[left_padding.bool()])
    torch.testing.assert_close(
        pinned.attention_stats["entropy"], expected.attention_stats["entropy"], equal_nan=True, rtol=1e-4, atol=1e-4
    )
    model.set_attn_implementation("streaming")
    with pytest.raises(ValueError, match="pinned to 'sdpa' cannot read a mask made for 'streaming'"):
        run(model, input_ids=ids, attention_mask=left_padding)


def test_pinned_to_a_backend_that_is_not_here(ids):
    model = tiny_model("sdpa")
    attention = modeling_llama.LlamaFlashAttention2(tiny_config(), 0)
    assert attention.pinned_backend == "flash_attention_2"
    for layer in model.model.layers:
        layer.self_attn.__class__ = modeling_llama.LlamaFlashAttention2
    with pytest.raises(ImportError, match="pip install flash-attn --no-build-isolation"):
        run(model, input_ids=ids)


def test_llama_3_8b_has_the_stock_keys():
    config = tiny_config(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        ours, theirs = LlamaForCausalLM(config), upstream.LlamaForCausalLM(copy.deepcopy(config))
    shapes = {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert {name: weight.shape for name, weight in ours.state_dict().items()} == shapes
    assert sum(p.numel() for p in ours.parameters()) == 8_030_261_248


def test_a_sharded_bf16_checkpoint_of_that_shape_with_device_map(tmp_path):
    model = tiny_model(
        num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, hidden_size=256, intermediate_size=896,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.dtype == torch.bfloat16
    ids = torch.randint(3, 97, (1, 19))
    stats = run(loaded, input_ids=ids, output_attention_stats=EVERYTHING).attention_stats
    assert stats["entropy"].shape == (4, 1, 32, 19)
    assert stats["entropy"].dtype == torch.float32
    assert all(not stats[name].isnan().any() for name in ("entropy", "received", "key_norm", "hidden_norm"))


def test_the_stock_code_path_runs_off_and_on(ids, monkeypatch):
    """Upstream's attention forward is what runs, on and off, with the same arguments."""
    model = tiny_model("sdpa")
    called = []
    forward = upstream.LlamaAttention.forward
    monkeypatch.setattr(upstream.LlamaAttention, "forward", lambda *a, **k: called.append(set(k)) or forward(*a, **k))
    run(model, input_ids=ids)
    off = list(called)
    called.clear()
    run(model, input_ids=ids, output_attention_stats=EVERYTHING)
    assert len(off) == 3
    assert called == off


def test_layers_that_go_between_two_forwards(ids):
    """What was found out of a model's layers is found out anew once they are others."""
    model = tiny_model("streaming")
    asked = {"input_ids": ids, "output_attention_stats": True}
    before = run(model, **asked).attention_stats
    inside = run(model.model, **asked).attention_stats
    assert (before.paths[0], inside.paths[0]) == ("model.layers.0.self_attn", "layers.0.self_attn")
    del model.model.layers[0]
    after = run(model, **asked).attention_stats
    assert after.layers == before.layers[:-1]
    assert after.num_layers == before.num_layers - 1
    assert after.paths == before.paths[:-1]


def test_a_decoder_whose_call_does_not_come_to_it(ids):
    """Hooks of accelerate put a forward of their own around a module's; it is observed from outside."""
    model = tiny_model("sdpa")
    expected = run(model, input_ids=ids, output_attention_stats=True).attention_stats
    forward, asked = model.model.forward, []
    model.model.forward = lambda *args, **kwargs: (asked.append(set(kwargs)), forward(*args, **kwargs))[1]
    found = run(model, input_ids=ids, output_attention_stats=True).attention_stats
    assert all("output_attention_stats" not in names for names in asked)
    assert found.names == expected.names
    assert all(torch.equal(found[name], expected[name]) for name in found.names)
