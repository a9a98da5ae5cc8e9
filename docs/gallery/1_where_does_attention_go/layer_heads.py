"""Layer heads.

The maps of all heads of one layer in the same colours, which follow the square root so that weak attention stays
visible. Compare shapes: columns are sinks, diagonals are positional heads, scattered cells are heads that follow the
content.
"""

from llama_attn.viz import plot_layer_heads

figure = plot_layer_heads(text, layer=17)
