"""The streaming backend on the C++ engine, by name."""

from __future__ import annotations

from llama_attn.backends._streaming import STREAMING_BACKENDS as ACCEPTS_MASKS_OF, attend_with, mask, sees
from llama_attn.engines import native as engine

__all__ = ["ACCEPTS_MASKS_OF", "ENGINE", "attend", "mask", "sees", "unavailable"]

ENGINE = "native"
attend = attend_with(ENGINE)
unavailable = engine.unavailable
