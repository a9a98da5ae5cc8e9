"""The models that are timed: ours and transformers' own, with the same weights."""

from __future__ import annotations

import copy
from functools import cache

import torch
from check import CHECK, once
from fresh_process import VOCABULARY
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, MistralForCausalLM
from transformers.models.llama import modeling_llama as upstream

from llama_attn import LlamaForCausalLM
from llama_attn.demo import demo_checkpoint


def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in float32; in check mode two layers of its shape with random weights, since reading it takes seconds."""
    return two_layers() if CHECK else read_smollm2()


@cache
def read_smollm2() -> LlamaForCausalLM:
    """SmolLM2 itself."""
    checkpoint = demo_checkpoint()
    loaded = LlamaForCausalLM.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file, dtype=torch.float32)
    # Loaded from GGUF it may be neither cast nor saved, so its weights are put into a model that may.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return with_weights_of(loaded, LlamaForCausalLM, "sdpa", config)


def two_layers() -> LlamaForCausalLM:
    """Of SmolLM2's shape with a small vocabulary, random weights, and attention that is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, initializer_range=0.06,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config).eval()


@cache
def tokens() -> torch.Tensor:
    """Token ids of a long text, (1, length); in check mode random ones."""
    if CHECK:
        return torch.randint(VOCABULARY, (1, 8192), generator=torch.Generator().manual_seed(0))
    checkpoint = demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file)
    sentences = (f"In chapter {n} the pirates sail on and find island number {n * 7 % 31}. " for n in range(2000))
    return torch.tensor([tokenizer("".join(sentences))["input_ids"]])


def text(length: int, device: str = "cpu") -> torch.Tensor:
    """Its first tokens, (1, length)."""
    return tokens()[:, :length].to(device)


def llama_3_8b(num_layers: int) -> LlamaForCausalLM:
    """Layers of Llama-3-8B's shape with random weights and a small vocabulary, in float32; an eighth as wide in check mode."""
    parts = 8 if CHECK else 1
    config = LlamaConfig(
        vocab_size=1024, hidden_size=4096 // parts, intermediate_size=14336 // parts, num_hidden_layers=num_layers,
        num_attention_heads=32 // parts, num_key_value_heads=8 // parts, head_dim=128,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config).eval()


def mistral(window: int, backend: str) -> MistralForCausalLM:
    """Four layers of Mistral's proportions at a quarter of its width, with random weights, in float32; one in check mode."""
    config = MistralConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=3584, num_hidden_layers=once(4), num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, sliding_window=window, max_position_embeddings=32_768,
    )  # fmt: skip
    return MistralForCausalLM._from_config(config, attn_implementation=backend).eval()


def stock(model: LlamaForCausalLM, backend: str = "sdpa") -> upstream.LlamaForCausalLM:
    """Transformers' own class with the same weights, which are not copied."""
    return with_weights_of(model, upstream.LlamaForCausalLM, backend)


def ours(model: LlamaForCausalLM, backend: str) -> LlamaForCausalLM:
    """The model on another backend, its weights not copied."""
    return with_weights_of(model, LlamaForCausalLM, backend)


def with_weights_of(model, kind, backend, config=None):
    """A model of the class ``kind`` that shares its weights with ``model``."""
    config = copy.deepcopy(config or model.config)
    config._attn_implementation_internal = backend
    other = kind._from_config(config, attn_implementation=backend, dtype=model.dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other.to(model.device).eval()
