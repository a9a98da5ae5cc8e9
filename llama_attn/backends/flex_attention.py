"""PyTorch's FlexAttention, compiled block-sparse attention."""

from __future__ import annotations

from torch import Tensor
from transformers.integrations.flex_attention import flex_attention_forward as attend
from transformers.utils import is_torch_flex_attn_available

from llama_attn.backends._rules import AttentionCall, by_mask, by_mask_function, by_request, everything
from llama_attn.stats.visibility import Visibility

__all__ = ["ACCEPTS_MASKS_OF", "attend", "mask", "sees", "unavailable"]

mask = None
ACCEPTS_MASKS_OF = ("flex_attention",)


def sees(call: AttentionCall) -> Visibility:
    """Without a mask everything; a tensor is added to the scores; a block mask is asked pair by pair."""
    if call.mask is None:
        return everything(call)
    if isinstance(call.mask, Tensor):
        return by_mask(call)
    visibility = by_request(call)
    return by_mask_function(call, call.mask.mask_mod) if visibility is None else visibility


def unavailable() -> str | None:
    """It is part of torch, and is compiled when it first runs."""
    if not is_torch_flex_attn_available():
        return "this torch has no flex_attention: pip install 'torch>=2.6'"
    return None
