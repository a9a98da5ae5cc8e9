"""Attention with the weights written out: quadratic memory, and the only one with ``output_attentions=True``."""

from __future__ import annotations

from transformers.models.llama.modeling_llama import eager_attention_forward as attend

__all__ = ["ACCEPTS_MASKS_OF", "attend", "mask", "unavailable"]

mask = None
ACCEPTS_MASKS_OF = ("eager",)


def unavailable() -> str | None:
    """It needs nothing but torch."""
    return None
