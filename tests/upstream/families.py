"""The models that the suite runs on: classes of transformers, and what makes them tiny."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# The tiny model of upstream's own tester for causal language models.
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Shorter than the prompts of seven tokens, so that caches drop keys and masks hide them.
WINDOW = 5


@dataclass(frozen=True)
class Family:
    """One model type.

    Args:
        config: Name of its configuration in transformers.
        base: Name of the model without a head.
        causal_lm: Name of the language model.
        heads: Names of the other models, sequence classification first.
        options: Configuration beyond `TINY`.
    """

    config: str
    base: str
    causal_lm: str
    heads: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def _heads(prefix: str, *tasks: str) -> tuple[str, ...]:
    return tuple(f"{prefix}For{task}" for task in tasks)


_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")

FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaModel", "LlamaForCausalLM", _heads("Llama", *_TASKS), {"hidden_act": "gelu"}),
    "qwen3": Family("Qwen3Config", "Qwen3Model", "Qwen3ForCausalLM", _heads("Qwen3", *_TASKS), {"head_dim": 16}),
    "mistral": Family(
        "MistralConfig",
        "MistralModel",
        "MistralForCausalLM",
        _heads("Mistral", *_TASKS),
        {"sliding_window": WINDOW},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3TextModel",
        "Gemma3ForCausalLM",
        _heads("Gemma3Text", "SequenceClassification"),
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssModel",
        "GptOssForCausalLM",
        _heads("GptOss", "SequenceClassification", "TokenClassification"),
        {
            "head_dim": 16,
            # The kernel of its experts needs a multiple of sixteen bytes.
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
        },
    ),
}
