"""Token strip.

Statistics along the text, token by token: what each token receives, what it gives to the sink, and the norms of its
states. Marks are sinks. The first token stands out three times: it receives most, its state is huge, its key and value
are small.
"""

from llama_attn.viz import plot_token_strip

figure = plot_token_strip(text, layer=15)
