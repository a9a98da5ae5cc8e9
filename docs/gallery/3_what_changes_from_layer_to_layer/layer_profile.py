"""Layer profile.

The line is the mean over heads, the dark band one standard deviation, the light one the smallest and largest head. Low
entropy is attention on few tokens; a wide band is a layer whose heads do different things.
"""

from llama_attn.viz import plot_layer_profile

figure = plot_layer_profile(text, statistic="entropy")
