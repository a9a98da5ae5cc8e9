"""Statistics together with what else people do to a Llama: adapters, offloading, pipelines, GGUF files."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model
from oracle import stock_of
from transformers import pipeline

from llama_attn import AttentionStats, AttentionStatsConfig, LlamaForCausalLM
from llama_attn.demo import demo_checkpoint
from llama_attn.testing import relative_error

EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)


def measure(model, config=EVERYTHING, **inputs) -> AttentionStats:
    with torch.no_grad():
        return model(**inputs, output_attention_stats=config).attention_stats


def assert_same(actual: AttentionStats, expected: AttentionStats, bound=1e-10):
    assert actual.names == expected.names
    for name in expected.values:
        assert relative_error(actual[name], expected[name]) <= bound, name


@pytest.fixture
def inputs(ids, left_padding):
    return {"input_ids": ids, "attention_mask": left_padding}


# peft 0.21 reads a property that transformers 5.23 has renamed.
lora = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def with_lora(model):
    """Adapters on every projection of the attention that change what it does, unlike fresh ones."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return adapted.eval()


@lora
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_lora_is_measured_like_the_merged_model(backend, inputs):
    adapted = with_lora(tiny_model(backend, torch.float64))
    bare = tiny_model(backend, torch.float64)
    stats = measure(adapted, **inputs)
    settings = {"return_dict_in_generate": True, "max_new_tokens": 5, "do_sample": False}
    generated = adapted.generate(**inputs, **settings, output_attention_stats=EVERYTHING)
    with torch.no_grad():
        off = adapted.generate(**inputs, **settings)
    assert torch.equal(generated.sequences, off.sequences)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert_same(stats, measure(merged, **inputs))
    assert_same(
        generated.attention_stats,
        merged.generate(**inputs, **settings, output_attention_stats=EVERYTHING).attention_stats,
    )
    # Without o_proj's adapter its values would come out otherwise, all else being equal in the first layer.
    merged.model.layers[0].self_attn.o_proj.weight = bare.model.layers[0].self_attn.o_proj.weight
    bare_output = measure(merged, **inputs)
    assert relative_error(bare_output["value_norm"][0], stats["value_norm"][0]) <= 1e-10
    assert relative_error(bare_output["value_output_norm"][0], stats["value_output_norm"][0]) > 1e-3


@lora
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_lora_gradients_are_bit_identical(backend, inputs):
    adapted = with_lora(tiny_model(backend)).train()
    gradients = []
    for config in (None, EVERYTHING):
        adapted.zero_grad()
        torch.manual_seed(0)
        adapted(**inputs, labels=inputs["input_ids"], output_attention_stats=config).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad})
    off, on = gradients
    assert len(off) == 3 * 4 * 2
    for name, gradient in off.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(on[name], gradient), name


def offloaded(how, checkpoint, directory):
    if how == "cpu_offload":
        import accelerate

        model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
        return accelerate.cpu_offload(model, execution_device="cpu")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "cpu" if layer == 0 else "disk" for layer in range(3)}
    return LlamaForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float64, device_map=places, offload_folder=directory / "offloaded"
    )


@pytest.mark.parametrize("how", ["cpu_offload", "disk"])
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_offloaded_weights(how, backend, tmp_path, inputs):
    model = tiny_model(backend, torch.float64)
    model.save_pretrained(tmp_path / "model")
    away = offloaded(how, tmp_path / "model", tmp_path)
    away.set_attn_implementation(backend)
    # Nothing is tested if the weights are here.
    assert away.model.layers[2].self_attn.o_proj.weight.is_meta
    assert_same(measure(away, **inputs), measure(model, **inputs))
    settings = {"return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False}
    actual, expected = (m.generate(**inputs, **settings, output_attention_stats=EVERYTHING) for m in (away, model))
    assert torch.equal(actual.sequences, expected.sequences)
    assert_same(actual.attention_stats, expected.attention_stats)


@pytest.mark.smollm2
def test_text_generation_pipeline(smollm2):
    model, tokenizer = smollm2
    texts = [
        pipeline("text-generation", model=m, tokenizer=tokenizer, device="cpu")(
            "The capital of France is", max_new_tokens=8, do_sample=False
        )
        for m in (model, stock_of(model))
    ]
    assert texts[0] == texts[1]
    assert "Paris" in texts[0][0]["generated_text"]


@pytest.mark.smollm2
def test_loaded_from_gguf(smollm2):
    reference, tokenizer = smollm2
    checkpoint = demo_checkpoint()
    loaded = LlamaForCausalLM.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file, dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    inputs = dict(tokenizer("The capital of France is", return_tensors="pt"))
    config = AttentionStatsConfig(statistics="all", norms=True, layers=(0, 15, 29))
    assert_same(measure(loaded, config, **inputs), measure(reference, config, **inputs))
    outputs = loaded.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_attention_stats=config
    )
    assert "Paris" in tokenizer.decode(outputs.sequences[0])
    assert outputs.attention_stats["entropy"].shape[-1] == outputs.sequences.shape[1] - 1
