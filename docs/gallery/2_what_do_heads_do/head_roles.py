"""Head roles.

The colour is what a head does while the random sequence is read for the second time, the number its score in
hundredths. Induction heads (green) need previous-token heads (dark orange) in some earlier layer.
"""

from llama_attn.viz import plot_head_roles

# The second copy of the sequence begins with token 65.
figure = plot_head_roles(repeated, query_slice=slice(65, None))
