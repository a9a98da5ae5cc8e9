"""Comparison.

The second map minus the first: red where the second run attends more, blue where the first does. White is no
difference, and both ends of the scale are equally far from it.
"""

from llama_attn.viz import plot_comparison

figure = plot_comparison(beginning, other, layer=12, head=2)
