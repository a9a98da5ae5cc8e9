"""Exact statistics of every attention head of a Llama, at long context, on any attention backend.

Importing registers the backends with transformers and makes ``AutoModelForCausalLM`` return this library's
`LlamaForCausalLM` for every ``llama`` checkpoint; `unregister` undoes it.
"""

from __future__ import annotations

from llama_attn.backends.registry import available_backends, register_backend
from llama_attn.modeling_llama import LlamaForCausalLM, LlamaModel
from llama_attn.observe.interventions import ablate_heads, block_keys
from llama_attn.observe.recording import record
from llama_attn.registration import register, unregister
from llama_attn.stats.chat import chat_segments
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.images import image_segments
from llama_attn.stats.table import Statistic, register_statistic

__version__ = "0.1.0"

__all__ = [
    "AttentionStats",
    "AttentionStatsConfig",
    "LlamaForCausalLM",
    "LlamaModel",
    "Statistic",
    "ablate_heads",
    "available_backends",
    "block_keys",
    "chat_segments",
    "image_segments",
    "record",
    "register",
    "register_backend",
    "register_statistic",
    "unregister",
]

register()
