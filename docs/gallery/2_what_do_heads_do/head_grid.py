"""Head grid.

One number per head: any statistic, averaged over the tokens; of `segment_mass`, `segment="user"`. Here bright heads
spend most of their attention on the first token.
"""

from llama_attn.viz import plot_head_grid

figure = plot_head_grid(text, statistic="sink_mass")
