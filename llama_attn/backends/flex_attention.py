"""PyTorch's FlexAttention, compiled block-sparse attention."""

from __future__ import annotations

from transformers.integrations.flex_attention import flex_attention_forward as attend
from transformers.utils import is_torch_flex_attn_available

__all__ = ["ACCEPTS_MASKS_OF", "attend", "mask", "unavailable"]

mask = None
ACCEPTS_MASKS_OF = ("flex_attention",)


def unavailable() -> str | None:
    """It is part of torch, and is compiled when it first runs."""
    if not is_torch_flex_attn_available():
        return "this torch has no flex_attention: pip install 'torch>=2.6'"
    return None
