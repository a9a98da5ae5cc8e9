"""Coverage.

How many keys per query hold half of the attention, and nearly all of it: the band between exact bounds, which often is
as thin as the line. Dashes are uniform attention over the same keys; a line far below them is a layer whose attention
is sparse.
"""

from llama_attn.viz import plot_coverage

figure = plot_coverage(text)
