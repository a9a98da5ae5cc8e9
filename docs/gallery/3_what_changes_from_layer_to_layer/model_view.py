"""Model view.

One miniature map per head, layers from top to bottom, pooled exactly to at most 16 × 16 cells. Look for the layers
where the bright first column, the sink, begins and for heads that differ from their neighbours.
"""

from llama_attn.viz import plot_model_view

figure = plot_model_view(text)
