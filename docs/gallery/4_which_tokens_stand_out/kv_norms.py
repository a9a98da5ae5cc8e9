"""KV norms.

Solid lines are the mean over heads of the norms, dashed lines the norm of the mean over heads, which is smaller where
heads point in different directions. Tokens with small keys and values are sinks or easy to drop from a cache.
"""

from llama_attn.viz import plot_kv_norms

figure = plot_kv_norms(text, layer=15)
