"""Sources.

How much of the attention goes to each segment while each token of the answer is written. Compare the mean with uniform
attention: long documents get much of it just by being long, and the tokens just written get far more than their number
explains.
"""

from llama_attn.viz import plot_sources

figure = plot_sources(answer)
