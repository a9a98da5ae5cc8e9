"""Rows.

The text shaded by the attention of one token, here of the answer, on average over layers and heads and without the
first token, which would take all the colour. `answer` is a run of `generate` over three documents and a question, with
`segments` and `rows="generated"`; the query has a frame. Of a long text the attended places are written, and what lies
between is counted.
"""

from llama_attn.viz import plot_rows

# A token of the answer.
figure = plot_rows(answer, row=197, sink=False)
