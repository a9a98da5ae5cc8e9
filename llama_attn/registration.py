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


# Where what upstream had is kept beside what stands in its place.
_ORIGINAL = "_llama_attn_original"


def register() -> None:
    """Register the backends with transformers, and `LlamaForCausalLM` for every ``llama`` checkpoint.

    A checkpoint with code of its own keeps its class where ``trust_remote_code=True`` asks for it.
    Importing the package does it. Doing it twice is the same as doing it once.
    """
    fill_tables()
    for owner, name, refusing in _REFUSALS:
        function = getattr(owner, name)
        if not hasattr(function, _ORIGINAL):
            replaced = refusing(function)
            setattr(replaced, _ORIGINAL, function)
            setattr(owner, name, replaced)
    AutoModelForCausalLM.register(LlamaConfig, _Entry, exist_ok=True)


def unregister() -> None:
    """Give transformers its own class and tables back.

    Models that exist already keep their class; those on a backend of ours need `register` to run again.
    """
    clear_tables()
    for owner, name, _ in _REFUSALS:
        setattr(owner, name, getattr(getattr(owner, name), _ORIGINAL, getattr(owner, name)))
    if MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.get(LlamaConfig) is _Entry:
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[LlamaConfig]


def _refusing_models(check: Callable[..., str]) -> Callable[..., str]:
    """Upstream's check of an attention implementation, which knows nothing of models that streaming cannot serve."""

    @functools.wraps(check)
    def refusing(model: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if is_streaming(attn_implementation):
            refuse_model(model.config.model_type)
        return check(model, attn_implementation, *args, **kwargs)

    return refusing


def _refusing_statistics(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's forward, which takes any argument and would drop a request for statistics without a word."""

    @functools.wraps(forward)
    def refusing(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attention_stats"):
            raise ValueError(
                f"output_attention_stats: {type(model).__module__}.{type(model).__qualname__} has no place for them; use "
                "llama_attn.LlamaForCausalLM, or `with llama_attn.record(model) as recording:` around any model"
            )
        return forward(model, *args, **kwargs)

    return refusing


_REFUSALS: tuple[tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]], ...] = (
    (PreTrainedModel, "_check_and_adjust_attn_implementation", _refusing_models),
    (upstream.LlamaModel, "forward", _refusing_statistics),
)
