"""Attention with the weights written out: quadratic memory, and the only one with ``output_attentions=True``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward as attend

from llama_attn.backends._rules import AttentionCall, by_mask, everything
from llama_attn.stats.visibility import Visibility

__all__ = ["ACCEPTS_MASKS_OF", "attend", "mask", "sees", "unavailable"]

mask = None
ACCEPTS_MASKS_OF = ("eager",)


def sees(call: AttentionCall) -> Visibility:
    """Without a mask everything; else the mask, which is added to the scores.

    Raises:
        ValueError: A bool mask, which hides nothing when it is added.
    """
    if call.mask is None:
        return everything(call)
    if isinstance(call.mask, Tensor) and call.mask.dtype == torch.bool:
        raise ValueError(
            "attention_mask: eager attention adds a 4-D mask to the scores, so that a bool one masks nothing; "
            "give it as floats, 0 where a key may be seen and torch.finfo(dtype).min where not"
        )
    return by_mask(call)


def unavailable() -> str | None:
    """It needs nothing but torch."""
    return None
