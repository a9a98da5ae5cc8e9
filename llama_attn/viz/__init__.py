"""Pictures of the statistics. They take an `AttentionStats`, an ``xarray.Dataset`` or a saved file, never a model."""

from __future__ import annotations

from llama_attn.viz.attention import plot_attention_map
from llama_attn.viz.norms import plot_hidden_norms, plot_kv_norms
from llama_attn.viz.seed import save_seed_figures

__all__ = ["plot_attention_map", "plot_hidden_norms", "plot_kv_norms", "save_seed_figures"]
