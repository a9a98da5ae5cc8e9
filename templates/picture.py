"""Sink growth.

How much of the attention of each token goes to the first tokens. A line that stays high however long the text grows is a
layer that rests on its sink; one that falls is a layer that spreads.
"""

from llama_attn.viz import plot_sink_growth

figure = plot_sink_growth(text, layer=1)
