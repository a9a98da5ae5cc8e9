"""Head comparison.

In which heads a statistic differs between two runs, averaged over the tokens that both texts have. It works for texts
of different length too, since tokens are aligned.
"""

from llama_attn.viz import plot_head_comparison

figure = plot_head_comparison(beginning, other, statistic="sink_mass")
