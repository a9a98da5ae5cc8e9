"""Make transformers' AutoModel classes use this library, and undo it."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llama_attn.backends.registry import clear_tables, fill_tables
from llama_attn.modeling_llama import LlamaForCausalLM


def register() -> None:
    """Register the backends with transformers, and `LlamaForCausalLM` for every ``llama`` checkpoint.

    Importing the package does it. Doing it twice is the same as doing it once.
    """
    fill_tables()
    AutoModelForCausalLM.register(LlamaConfig, LlamaForCausalLM, exist_ok=True)


def unregister() -> None:
    """Give transformers its own class and tables back.

    Models that exist already keep their class; those on a backend of ours need `register` to run again.
    """
    clear_tables()
    if MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.get(LlamaConfig) is LlamaForCausalLM:
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[LlamaConfig]
