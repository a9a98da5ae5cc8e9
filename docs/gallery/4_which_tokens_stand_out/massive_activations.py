"""Massive activations.

Left, the largest number of each token's state, layer by layer, marked where it is a massive activation; right, the
largest and the median of each layer, and the bound that a massive activation exceeds. Massive activations appear within
one layer, stay on the same token, here nearly all in one channel, and vanish before the output.
"""

from llama_attn.viz import plot_massive_activations

figure = plot_massive_activations(text)
