"""Our own backend: output and statistics in one walk, on the engine that suits the device."""

from __future__ import annotations

from llama_attn.backends._streaming import STREAMING_BACKENDS as ACCEPTS_MASKS_OF, attend_with, mask, sees

__all__ = ["ACCEPTS_MASKS_OF", "ENGINE", "attend", "mask", "sees", "unavailable"]

ENGINE = None
attend = attend_with(ENGINE)


def unavailable() -> str | None:
    """One of its engines always runs."""
    return None
