"""FlashAttention-2: CUDA kernels of the package ``flash-attn``."""

from __future__ import annotations

import importlib.util

from transformers.integrations.flash_attention import flash_attention_forward as attend
from transformers.utils import is_flash_attn_2_available

from llama_attn.backends._rules import AttentionCall, by_vector
from llama_attn.stats.visibility import Visibility

__all__ = ["ACCEPTS_MASKS_OF", "attend", "mask", "sees", "unavailable"]

mask = None
ACCEPTS_MASKS_OF = ("flash_attention_2", "flash_attention_3")


def sees(call: AttentionCall) -> Visibility:
    """Causal from the lower right, with a vector of real keys and the window that the call names."""
    return by_vector(call)


def unavailable() -> str | None:
    """It needs its package, or the same kernels through ``kernels``, and a CUDA device."""
    if is_flash_attn_2_available(kernels_fallback_ok=True):
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed: pip install flash-attn --no-build-isolation (needs CUDA)"
    return "flash-attn is installed, but it is too old or no CUDA device is visible"
