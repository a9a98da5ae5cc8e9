"""PyTorch's ``scaled_dot_product_attention``, the default of transformers."""

from __future__ import annotations

from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend

__all__ = ["ACCEPTS_MASKS_OF", "attend", "mask", "unavailable"]

mask = None
# It adds the float masks of eager; with eager the causal mask is never left out.
ACCEPTS_MASKS_OF = ("sdpa", "eager")


def unavailable() -> str | None:
    """It needs nothing but torch."""
    return None
