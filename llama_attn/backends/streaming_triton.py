"""The streaming backend on the Triton engine, by name; never the default."""

from __future__ import annotations

from llama_attn.backends._streaming import STREAMING_BACKENDS as ACCEPTS_MASKS_OF, attend_with, mask, sees
from llama_attn.engines import triton as engine

__all__ = ["ACCEPTS_MASKS_OF", "ENGINE", "attend", "mask", "sees", "unavailable"]

ENGINE = "triton"
attend = attend_with(ENGINE)
unavailable = engine.unavailable
