"""Budget.

`budget` is the table that `llama-attn budget` writes. Left, how much of the attention of the tokens that follow lies on the keys that a
policy kept; right, the loss of the model when it sees only these; below, the left one layer by layer. Curves that meet
the dashes cost nothing.
"""

from llama_attn.viz import plot_budget

figure = plot_budget(budget)
