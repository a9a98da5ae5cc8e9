"""Image rows.

A picture of the prompt, under the attention that one token pays to each of its tokens; the title says how much all of
them get. `segments` are what `image_segments` says of the prompt, and `rows=(-1,)` has the weights of its last token
measured. The model here is a tiny random Gemma 3, one of which a head prefers what is bright; see
[Any model](any_model.md#images-in-prompts).
"""

from llama_attn.viz import plot_image_rows

figure = plot_image_rows(pictured.stats, pictured.image, pictured.segments, head=0)
