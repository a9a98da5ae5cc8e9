"""Ablation.

How much worse the next token is predicted without each head: red heads are missed, blue ones were in the way of this
text. `ablation` is the table that `llama-attn ablate` writes, here of six layers and the first 40 tokens; on so short a
text small changes mean little.
"""

from llama_attn.viz import plot_ablation

figure = plot_ablation(ablation)
