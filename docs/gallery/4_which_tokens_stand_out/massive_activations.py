"""Massive activations.

Left, the largest number of each token's state, layer by layer, marked where it is a massive activation; right, the
largest and the median of each layer with the bound between. Massive activations appear within one layer, stay on the
same token and channels, and vanish before the output.
"""

from llama_attn.viz import plot_massive_activations

figure = plot_massive_activations(text)
