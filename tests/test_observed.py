"""What is measured is what the model really does: situations in which a re-enacted Llama was measured wrongly, or died."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from any_oracle import capture, materialise
from conftest import CACHE, PEFT_LOSES_CACHE, tiny_config, tiny_model
from transformers import (
    AutoModel,
    DynamicCache,
    LlamaForCausalLM as StockLlama,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llama import modeling_llama as upstream

from llama_attn import AttentionStatsConfig, record
from llama_attn.engines import native
from llama_attn.testing import relative_error

ENGINES = ["torch", pytest.param("native", marks=pytest.mark.skipif(bool(native.unavailable()), reason="not built"))]
EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
# Written from the scores alone.
BY_SCORES = {
    "entropy": lambda made: -torch.xlogy(made.weights, made.weights).sum(-1),
    "logsumexp": lambda made: made.scores.logsumexp(-1),
    "max_logit": lambda made: made.scores.amax(-1),
    "max_weight": lambda made: made.weights.amax(-1),
    "effective_keys": lambda made: 1 / made.weights.square().sum(-1),
}


def stock_of(model):
    """transformers' own class with the same weights, on the same backend or, for streaming, on sdpa."""
    config = copy.deepcopy(model.config)
    backend = config._attn_implementation
    backend = "sdpa" if backend.startswith("streaming") else backend
    stock = StockLlama._from_config(config, attn_implementation=backend).to(model.dtype).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def expected_of(captured):
    """(layer, batch, head, query) of every statistic of `BY_SCORES`."""
    made = [materialise(call) for call in captured.calls]
    return {name: torch.stack([form(layer) for layer in made]) for name, form in BY_SCORES.items()}


def assert_expected(stats, captured, bound=1e-10):
    for name, value in expected_of(captured).items():
        assert relative_error(stats[name], value) <= bound, name


# Caches.


def compressed(model, ids, budgets):
    """A cache whose layers hold the last ``budgets`` tokens each."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    for layer, budget in zip(cache.layers, budgets, strict=True):
        layer.keys, layer.values = layer.keys[:, :, -budget:].clone(), layer.values[:, :, -budget:].clone()
    return cache


@pytest.mark.parametrize("budgets", [(20, 14, 8), (8, 14, 20)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_whose_layers_hold_different_lengths(engine, budgets, ids):
    model = tiny_model(dtype=torch.float64)
    token, stock = ids[:, -1:], stock_of(model)
    with capture(stock) as captured, torch.no_grad():
        logits = stock(token, **{CACHE: compressed(stock, ids[:, :24], budgets)}).logits
    captured.calls = captured.calls[3:]
    assert [call.key.shape[2] for call in captured.calls] == [budget + 1 for budget in budgets]
    config = AttentionStatsConfig(statistics=tuple(BY_SCORES), engine=engine)
    for backend in ("sdpa", f"streaming_{engine}"):
        model.set_attn_implementation(backend)
        cache = compressed(model, ids[:, :24], budgets)
        with torch.no_grad():
            off = model(token, **{CACHE: copy.deepcopy(cache)}).logits
            outputs = model(token, output_attention_stats=config, **{CACHE: copy.deepcopy(cache)})
            with record(model, config) as recording:
                model(token, **{CACHE: cache})
        assert torch.equal(outputs.logits, off)
        assert relative_error(off, logits) < 1e-10
        assert_expected(outputs.attention_stats, captured)
        assert_expected(recording.stats, captured)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming", "streaming_torch"])
def test_a_window_in_the_configuration(backend, ids):
    """Upstream's Llama hides nothing by it, but its cache drops keys."""
    model = tiny_model(backend, torch.float64, sliding_window=16)
    stock = stock_of(model)
    ids = ids[:, :21]
    config = AttentionStatsConfig(statistics=tuple(BY_SCORES))
    with torch.no_grad():
        with capture(stock) as captured:
            logits = stock(ids).logits
        outputs = model(ids, output_attention_stats=config)
    assert relative_error(outputs.logits, logits) < 1e-10
    assert_expected(outputs.attention_stats, captured)
    plain = stock.generate(ids, **GREEDY)
    generated = model.generate(ids, return_dict_in_generate=True, output_attention_stats=config, **GREEDY)
    assert generated.sequences.tolist() == plain.tolist()
    with capture(stock) as captured:
        stock.generate(ids, **GREEDY)
    for step in range(4):
        made = [materialise(call) for call in captured.calls[3 * step : 3 * step + 3]]
        rows = slice(0, 21) if step == 0 else slice(20 + step, 21 + step)
        for name, form in BY_SCORES.items():
            value = torch.stack([form(layer) for layer in made])
            assert relative_error(generated.attention_stats[name][..., rows], value) < 1e-10, (name, step)


# Patched transformers.


def _rotate(q, k, cos, sin, *args, **kwargs):
    """Positions that count half."""
    return q * 1.5, k * 0.5 + q[:, : k.shape[1]] * 0.1


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Of the first keys alone."""
    weights = (query @ key.repeat_interleave(3, 1).mT * scaling).softmax(-1)
    return (weights @ value.repeat_interleave(3, 1)).transpose(1, 2).contiguous(), weights


def _forward(original):
    def forward(self, hidden_states, *args, **kwargs):
        output, weights = original(self, hidden_states * 1.7, *args, **kwargs)
        return output + hidden_states, weights

    return forward


@pytest.mark.parametrize("what", ["apply_rotary_pos_emb", "LlamaAttention.forward", "eager_attention_forward"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
def test_patched_upstream(what, backend, monkeypatch, ids):
    """As Liger, StreamingLLM and LongLoRA do: statistics change nothing, and are of what runs."""
    model = tiny_model(backend, torch.float64)
    with torch.no_grad():
        unpatched = model(ids).logits
    if what == "LlamaAttention.forward":
        monkeypatch.setattr(upstream.LlamaAttention, "forward", _forward(upstream.LlamaAttention.forward))
    else:
        monkeypatch.setattr(upstream, what, _rotate if what == "apply_rotary_pos_emb" else _attention)
    with torch.no_grad():
        off = model(ids).logits
        on = model(ids, output_attention_stats=EVERYTHING)
        with record(model, EVERYTHING) as recording:
            recorded = model(ids).logits
    assert torch.equal(on.logits, off)
    assert torch.equal(recorded, off)
    assert torch.equal(recording.stats["entropy"], on.attention_stats["entropy"])
    if what != "eager_attention_forward":
        assert relative_error(off, unpatched) > 0.1
        stock = stock_of(model)
        with capture(stock) as captured, torch.no_grad():
            stock(ids)
        assert_expected(on.attention_stats, captured)


# Output projections.


def with_lora(model, dropout):
    torch.manual_seed(2)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=2, lora_dropout=dropout)
    wrapper = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return wrapper.train()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("by", ["record", "forward"])
def test_lora_dropout_on_the_output_projection(by, ids):
    model = tiny_model()
    wrapper = with_lora(model, 0.3)
    fired = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda *args: fired.append(1))

    def step(measured):
        fired.clear()
        wrapper.zero_grad()
        torch.manual_seed(5)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        stats = None
        if measured and by == "record":
            with record(wrapper, EVERYTHING) as recording:
                loss = wrapper(**inputs).loss
            stats = recording.stats
        else:
            outputs = wrapper(**inputs, **({"output_attention_stats": EVERYTHING} if measured else {}))
            loss, stats = outputs.loss, getattr(outputs, "attention_stats", None)
        loss.backward()
        found = [p.grad.clone() for p in wrapper.parameters() if p.grad is not None]
        return loss.item(), found, torch.random.get_rng_state(), len(fired), stats

    off, on = step(False), step(True)
    assert on[0] == off[0]
    assert all(torch.equal(a, b) for a, b in zip(on[1], off[1], strict=True))
    assert torch.equal(on[2], off[2])
    assert on[3] == off[3] == 3
    # The dropout is no part of the weight.
    wrapper.eval()
    with record(wrapper.merge_and_unload(), EVERYTHING) as recording, torch.no_grad():
        model(ids)
    assert relative_error(on[4]["value_output_norm"][0], recording.stats["value_output_norm"][0]) < 1e-5


class Refusing(torch.Tensor):
    """A quantised weight as libraries make them: it multiplies, and that is all."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                states, weight, *bias = args
                return torch.nn.functional.linear(states, weight.as_subclass(torch.Tensor) * 2, *bias)
        if getattr(function, "__name__", "") in ("view", "reshape", "contiguous", "T", "transpose", "to"):
            raise NotImplementedError(f"{function.__name__} of a quantised weight")
        return super().__torch_function__(function, types, args, kwargs or {})


class Packed(torch.nn.Module):
    """A quantised layer without a weight; it takes what a layer takes, and refuses a tensor that is not its own."""

    def __init__(self, layer, picky=False):
        super().__init__()
        self.register_buffer("packed", layer.weight.detach().half())
        self.picky = picky

    def forward(self, states):
        if self.picky and states.ndim != 3:
            raise RuntimeError("expected batch, token, channel")
        return states @ self.packed.to(states).T


def test_a_weight_that_refuses_to_be_viewed(ids):
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(2)
        expected = model(ids, output_attention_stats=EVERYTHING)
        for layer in model.model.layers:
            held = layer.self_attn.o_proj.weight.detach() / 2
            layer.self_attn.o_proj.weight = torch.nn.Parameter(held.as_subclass(Refusing), requires_grad=False)
        actual = model(ids, output_attention_stats=EVERYTHING)
    assert relative_error(actual.logits, expected.logits) < 1e-5
    for name in ("value_output_norm", "entropy"):
        assert relative_error(actual.attention_stats[name], expected.attention_stats[name]) < 1e-5


@pytest.mark.parametrize("picky", [False, True])
def test_a_layer_without_a_weight(picky, ids):
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj = Packed(layer.self_attn.o_proj, picky)
    named = AttentionStatsConfig(statistics=("entropy", "value_output_norm"))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids, output_attention_stats=True).logits, expected)
        everything = model(ids, output_attention_stats=EVERYTHING)
        assert torch.equal(everything.logits, expected)
        if picky:
            assert "value_output_norm" not in everything.attention_stats.names
            with pytest.raises(ValueError, match=r"value_output_norm.*Packed.*expected batch, token, channel"):
                model(ids, output_attention_stats=named)
            return
        stats = model(ids, output_attention_stats=named).attention_stats
    plain = tiny_model()
    for layer in plain.model.layers:
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data.half().float()
    with torch.no_grad():
        wanted = plain(ids, output_attention_stats=named).attention_stats
    assert relative_error(stats["value_output_norm"], wanted["value_output_norm"]) < 1e-5


@pytest.mark.filterwarnings("ignore")  # torch wants another library for it
def test_dynamic_int8(ids):
    model = tiny_model()
    if (
        "x86" not in torch.backends.quantized.supported_engines
        and "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        pytest.skip("no quantised engine here")
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected = model(ids).logits
        for config in (True, EVERYTHING):
            assert torch.equal(model(ids, output_attention_stats=config).logits, expected)
            with record(model, config) as recording:
                assert torch.equal(model(ids).logits, expected)
            assert recording.stats["entropy"].isfinite().all()


# Layers.


@pytest.mark.parametrize("kept", [(0, 1, 4, 5), (3, 0, 1)])
@pytest.mark.parametrize("by", ["record", "forward"])
def test_layers_that_were_removed_or_reordered(by, kept, ids):
    model = tiny_model(dtype=torch.float64, num_hidden_layers=6)
    model.model.layers = torch.nn.ModuleList([model.model.layers[at] for at in kept])
    model.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        outputs = model(ids, use_cache=False, output_hidden_states=True)
        if by == "record":
            with record(model, EVERYTHING) as recording:
                model(ids, use_cache=False)
            stats = recording.stats
        else:
            stats = model(ids, use_cache=False, output_attention_stats=EVERYTHING).attention_stats
    assert stats.layers == tuple(range(len(kept)))
    with capture(model) as captured, torch.no_grad():
        model(ids, use_cache=False)
    assert_expected(stats, captured)
    # What goes into every layer; upstream's last is behind the final norm.
    norms = torch.stack([states.norm(dim=-1) for states in outputs.hidden_states[:-1]])
    assert relative_error(stats["hidden_norm"][:-1], norms) < 1e-5
    last = []
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    states = last[0] if isinstance(last[0], torch.Tensor) else last[0][0]
    assert relative_error(stats["hidden_norm"][-1], states.norm(dim=-1)) < 1e-5


def prune(layer, heads, size=8):
    """Keep the first ``heads`` query heads of every group of three."""
    attention = layer.self_attn
    rows = torch.cat([torch.arange(size) + size * (3 * group + head) for group in range(2) for head in range(heads)])
    for name, dim in (("q_proj", 0), ("o_proj", 1)):
        old = getattr(attention, name)
        new = torch.nn.Linear(len(rows) if dim else old.in_features, old.out_features if dim else len(rows), bias=False)
        new.weight.data = old.weight.data.index_select(dim, rows).clone()
        setattr(attention, name, new)
    attention.num_key_value_groups = heads


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("by", ["record", "forward"])
def test_layers_with_fewer_heads(by, backend, ids):
    model = tiny_model(backend)
    prune(model.model.layers[1], 2)
    with torch.no_grad():
        off = model(ids).logits
        if by == "record":
            with record(model, EVERYTHING) as recording:
                assert torch.equal(model(ids).logits, off)
            stats = recording.stats
        else:
            outputs = model(ids, output_attention_stats=EVERYTHING)
            assert torch.equal(outputs.logits, off)
            stats = outputs.attention_stats
    model.set_attn_implementation("sdpa")
    with capture(model) as captured, torch.no_grad():
        model(ids)
    for layer, heads in enumerate((6, 4, 6)):
        made = materialise(captured.calls[layer])
        for name, form in BY_SCORES.items():
            assert relative_error(stats[name][layer, :, :heads], form(made)) < 1e-5, (name, layer)
    assert stats["entropy"][1, :, 4:].isnan().all()
    assert stats["hidden_norm"].isfinite().all()


@pytest.mark.parametrize("backend", ["streaming", "streaming_torch"])
def test_heads_that_are_no_multiple_of_kv_heads(backend, ids):
    model = tiny_model(backend, num_key_value_heads=6)
    attention = model.model.layers[0].self_attn
    for name in ("k_proj", "v_proj"):
        layer = getattr(attention, name)
        layer.weight.data = layer.weight.data[:32].clone()
    with pytest.raises(ValueError, match="head"), torch.no_grad():
        model(ids)


# Models around ours.


@pytest.mark.parametrize(
    "cls", [LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering]
)
def test_classes_that_hold_our_model(cls, ids):
    wrapper = cls(tiny_config()).eval()
    ours = tiny_model().model
    setattr(wrapper, wrapper.base_model_prefix, ours)
    for call in (wrapper, wrapper.forward):
        with pytest.raises(ValueError, match=rf"output_attention_stats: {cls.__name__}.*record\(model\)"):
            call(ids, output_attention_stats=True)
    with torch.no_grad():
        expected = ours(ids, output_attention_stats=True).attention_stats
        with record(wrapper) as recording:
            wrapper(ids)
    assert torch.equal(recording.stats["entropy"], expected["entropy"])


def test_an_auto_model(tmp_path, ids):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).eval()
    with record(model) as recording, torch.no_grad():
        model(ids)
        expected = tiny_model()(ids, output_attention_stats=True).attention_stats
    assert relative_error(recording.stats["entropy"], expected["entropy"]) < 1e-5


def test_llava_with_our_model_inside(ids):
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = LlavaConfig(text_config=tiny_config(), vision_config=vision, image_token_index=96)
    wrapper = LlavaForConditionalGeneration(config).eval()
    wrapper.model.language_model = tiny_model().model
    ids = ids.clamp(max=90)
    with pytest.raises(ValueError, match=r"output_attention_stats: Llava.*record\(model\)"):
        wrapper(input_ids=ids, output_attention_stats=True)
    with record(wrapper) as recording, torch.no_grad():
        wrapper(input_ids=ids)
    assert recording.stats.stack == "model.language_model.layers.#.self_attn"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
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
def test_generate_of_peft(settings, ids):
    torch.manual_seed(4)
    wrapper = peft.get_peft_model(tiny_model(), settings).eval()
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    expected = wrapper.generate(**arguments)
    outputs = wrapper.generate(**arguments, return_dict_in_generate=True, output_attention_stats=True)
    assert torch.equal(outputs.sequences, expected)
    with record(wrapper) as recording:
        wrapper.generate(**arguments)
    stats = outputs.attention_stats
    steps = 3 * (1 + 3 * PEFT_LOSES_CACHE)
    assert stats["received"].shape[-1] == 3 + 37 + steps
    assert stats.names == recording.stats.names
    for name in stats.names:
        assert relative_error(stats[name], recording.stats[name]) <= 1e-6, name
