"""Output classes: transformers' own, with one field more."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llama_attn.stats.container import AttentionStats


@dataclass
class BaseModelOutputWithAttentionStats(BaseModelOutputWithPast):
    """What `LlamaModel` returns with ``output_attention_stats``."""

    attention_stats: AttentionStats | None = None


@dataclass
class CausalLMOutputWithAttentionStats(CausalLMOutputWithPast):
    """What `LlamaForCausalLM` returns with ``output_attention_stats``."""

    attention_stats: AttentionStats | None = None


@dataclass
class GenerateOutputWithAttentionStats(GenerateDecoderOnlyOutput):
    """What ``generate`` returns with ``output_attention_stats``."""

    attention_stats: AttentionStats | None = None


@dataclass
class GenerateBeamOutputWithAttentionStats(GenerateBeamDecoderOnlyOutput):
    """What ``generate`` returns from beam search with ``output_attention_stats``."""

    attention_stats: AttentionStats | None = None
