"""Hidden norms.

The length of the state of each token that enters the layer; the axis is logarithmic where one token towers over the
others. A spike is a token with massive activations.
"""

from llama_attn.viz import plot_hidden_norms

figure = plot_hidden_norms(text, layer=15)
