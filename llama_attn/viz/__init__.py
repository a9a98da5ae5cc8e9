"""Pictures of the statistics. They take an `AttentionStats`, an ``xarray.Dataset`` or a saved file, never a model."""

from __future__ import annotations

from llama_attn.viz.corpus.page import corpus_report
from llama_attn.viz.corpus.plain import corpus_json
from llama_attn.viz.figures.ablation import plot_ablation
from llama_attn.viz.figures.activations import plot_massive_activations
from llama_attn.viz.figures.attention import plot_attention_map
from llama_attn.viz.figures.budget import plot_budget
from llama_attn.viz.figures.comparison import plot_comparison, plot_head_comparison
from llama_attn.viz.figures.coverage import plot_coverage
from llama_attn.viz.figures.grids import plot_head_grid, plot_head_roles
from llama_attn.viz.figures.image_rows import plot_image_rows
from llama_attn.viz.figures.multiples import plot_layer_heads, plot_model_view
from llama_attn.viz.figures.norms import plot_hidden_norms, plot_kv_norms
from llama_attn.viz.figures.profile import plot_distance_histogram, plot_layer_profile
from llama_attn.viz.figures.rows import plot_rows
from llama_attn.viz.figures.seed import save_seed_figures
from llama_attn.viz.figures.sources import plot_sources
from llama_attn.viz.figures.tokens import plot_token_strip
from llama_attn.viz.report.html import report

__all__ = [
    "corpus_json",
    "corpus_report",
    "plot_ablation",
    "plot_attention_map",
    "plot_budget",
    "plot_comparison",
    "plot_coverage",
    "plot_distance_histogram",
    "plot_head_comparison",
    "plot_head_grid",
    "plot_head_roles",
    "plot_hidden_norms",
    "plot_image_rows",
    "plot_kv_norms",
    "plot_layer_heads",
    "plot_layer_profile",
    "plot_massive_activations",
    "plot_model_view",
    "plot_rows",
    "plot_sources",
    "plot_token_strip",
    "report",
    "save_seed_figures",
]
