"""Questions asked of the statistics: xarray in, xarray or pandas out."""

from __future__ import annotations

from llama_attn.analysis.activations import massive_activations
from llama_attn.analysis.compare import compare
from llama_attn.analysis.coverage import coverage
from llama_attn.analysis.dataset import as_dataset, require
from llama_attn.analysis.heads import classify_heads
from llama_attn.analysis.keep_mask import keep_mask
from llama_attn.analysis.layers import head_means, layer_evolution
from llama_attn.analysis.locality import locality
from llama_attn.analysis.received import received_norm
from llama_attn.analysis.retrieval import lookback_ratio, retrieval_heads, streaming_heads
from llama_attn.analysis.sinks import sink_positions, sink_rate
from llama_attn.analysis.sources import sources
from llama_attn.analysis.summary import summarize_layers

__all__ = [
    "as_dataset",
    "classify_heads",
    "compare",
    "coverage",
    "head_means",
    "keep_mask",
    "layer_evolution",
    "locality",
    "lookback_ratio",
    "massive_activations",
    "received_norm",
    "require",
    "retrieval_heads",
    "sink_positions",
    "sink_rate",
    "sources",
    "streaming_heads",
    "summarize_layers",
]
