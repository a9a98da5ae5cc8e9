"""Distance histogram.

Bars show how much attention goes how far, in bins that double, and sum to 1; thin lines are the single heads. Dashes
are what a head would show that attends equally to all that it sees. Weight above them on the left is local attention,
weight on the right global or on the sink.
"""

from llama_attn.viz import plot_distance_histogram

figure = plot_distance_histogram(text, layer=11)
