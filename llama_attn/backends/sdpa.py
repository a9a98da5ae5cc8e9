"""PyTorch's ``scaled_dot_product_attention``, the default of transformers."""

from __future__ import annotations

from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend

from llama_attn.backends._rules import AttentionCall, by_mask, without_mask
from llama_attn.stats.visibility import Visibility

__all__ = ["ACCEPTS_MASKS_OF", "IGNORES", "attend", "mask", "sees", "unavailable"]

mask = None
# It adds the float masks of eager; with eager the causal mask is never left out.
ACCEPTS_MASKS_OF = ("sdpa", "eager")
# It is given learned sinks, and knows nothing of them; soft-caps it refuses itself.
IGNORES = ("s_aux", "sinks")


def sees(call: AttentionCall) -> Visibility:
    """Without a mask, PyTorch's rule; else the mask, be it bool or added to the scores."""
    return without_mask(call) if call.mask is None else by_mask(call)


def unavailable() -> str | None:
    """It needs nothing but torch."""
    return None
