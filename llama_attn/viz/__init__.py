"""Pictures of the statistics. They take an `AttentionStats`, an ``xarray.Dataset`` or a saved file, never a model."""

from __future__ import annotations

from llama_attn.viz.activations import plot_massive_activations
from llama_attn.viz.attention import plot_attention_map
from llama_attn.viz.comparison import plot_comparison, plot_head_comparison
from llama_attn.viz.grids import plot_head_grid, plot_head_roles
from llama_attn.viz.html import report
from llama_attn.viz.multiples import plot_layer_heads, plot_model_view
from llama_attn.viz.norms import plot_hidden_norms, plot_kv_norms
from llama_attn.viz.profile import plot_distance_histogram, plot_layer_profile
from llama_attn.viz.seed import save_seed_figures
from llama_attn.viz.tokens import plot_token_strip

__all__ = [
    "plot_attention_map",
    "plot_comparison",
    "plot_distance_histogram",
    "plot_head_comparison",
    "plot_head_grid",
    "plot_head_roles",
    "plot_hidden_norms",
    "plot_kv_norms",
    "plot_layer_heads",
    "plot_layer_profile",
    "plot_massive_activations",
    "plot_model_view",
    "plot_token_strip",
    "report",
    "save_seed_figures",
]
