"""Make transformers' AutoModel classes use this library, and undo it."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama import modeling_llama as upstream

from llama_attn.backends.registry import clear_tables, fill_tables
from llama_attn.modeling_llama import LlamaForCausalLM


class _Entry(LlamaForCausalLM):
    """What AutoModel finds for a ``LlamaConfig``: whatever is asked of it, it makes a `LlamaForCausalLM`.

    AutoModel prefers a class that was registered from outside to the code that a checkpoint brings, even with
    ``trust_remote_code=True``. To its own classes it prefers that code, so the entry says that it is one of them.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LlamaForCausalLM:
        return LlamaForCausalLM(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> LlamaForCausalLM:
        return LlamaForCausalLM._from_config(*args, **kwargs)


# Pipelines compare names.
_Entry.__name__ = _Entry.__qualname__ = LlamaForCausalLM.__name__
_Entry.__module__ = upstream.__name__


def register() -> None:
    """Register the backends with transformers, and `LlamaForCausalLM` for every ``llama`` checkpoint.

    A checkpoint with code of its own keeps its class where ``trust_remote_code=True`` asks for it.
    Importing the package does it. Doing it twice is the same as doing it once.
    """
    fill_tables()
    AutoModelForCausalLM.register(LlamaConfig, _Entry, exist_ok=True)


def unregister() -> None:
    """Give transformers its own class and tables back.

    Models that exist already keep their class; those on a backend of ours need `register` to run again.
    """
    clear_tables()
    if MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.get(LlamaConfig) is _Entry:
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[LlamaConfig]
