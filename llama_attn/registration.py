"""Make transformers' AutoModel classes use this library, and undo it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama import modeling_llama as upstream

from llama_attn.backends._streaming import refuse_model
from llama_attn.backends.registry import clear_tables, fill_tables, is_streaming
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


# Where every model of transformers asks whether an attention implementation suits it.
_CHECK = "_check_and_adjust_attn_implementation"


def register() -> None:
    """Register the backends with transformers, and `LlamaForCausalLM` for every ``llama`` checkpoint.

    A checkpoint with code of its own keeps its class where ``trust_remote_code=True`` asks for it.
    Importing the package does it. Doing it twice is the same as doing it once.
    """
    fill_tables()
    check = getattr(PreTrainedModel, _CHECK)
    if not hasattr(check, "__wrapped__"):
        setattr(PreTrainedModel, _CHECK, _refusing(check))
    AutoModelForCausalLM.register(LlamaConfig, _Entry, exist_ok=True)


def unregister() -> None:
    """Give transformers its own class and tables back.

    Models that exist already keep their class; those on a backend of ours need `register` to run again.
    """
    clear_tables()
    check = getattr(PreTrainedModel, _CHECK)
    setattr(PreTrainedModel, _CHECK, getattr(check, "__wrapped__", check))
    if MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.get(LlamaConfig) is _Entry:
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[LlamaConfig]


def _refusing(check: Callable[..., str]) -> Callable[..., str]:
    """Upstream's check, which knows nothing of models that the streaming backends cannot serve."""

    @functools.wraps(check)
    def refusing(model: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if is_streaming(attn_implementation):
            refuse_model(model.config.model_type)
        return check(model, attn_implementation, *args, **kwargs)

    return refusing
