"""Attention map.

Each row is a query and shows where its attention goes, so a row sums to 1. A bright line below the diagonal is a head
that looks at the token before; a bright first column is an attention sink. Colours follow the square root of the
weight, `scale=` takes `"linear"` and `"log"` too.
"""

from llama_attn.viz import plot_attention_map

figure = plot_attention_map(beginning, layer=16, head=0)
