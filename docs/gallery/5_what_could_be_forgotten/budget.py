"""Budget.

`budget` is the table that `llama-attn budget` writes. Left, how much of the attention of the tokens that follow lies on
the keys that a policy kept: means of the layers, and bars from the layer that has least to the one that has most, the
policies beside each other at each budget. Right, the loss of the model when it sees only these keys; below, the left one
layer by layer. Curves that meet the dashes cost nothing.
"""

from llama_attn.viz import plot_budget

figure = plot_budget(budget)
