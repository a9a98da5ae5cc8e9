"""One line per layer: how strong the sink is, where it is, and the largest activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.activations import massive_activations, needed
from llama_attn.analysis.dataset import as_dataset, check_measured, real_tokens, require
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.row import row_alone
from llama_attn.analysis.sinks import sink_positions
from llama_attn.analysis.uniform import measured_with, uniform_attention

if TYPE_CHECKING:
    import pandas

    from llama_attn.analysis.dataset import Source


def summarize_layers(source: Source, *, batch: int = 0) -> pandas.DataFrame:
    """The sink and the largest activation of every measured layer.

    Args:
        source: Statistics with ``sink_mass`` and ``received``, and what `massive_activations` needs.
        batch: Row of the batch; positions are counted from its first token.

    Returns:
        A frame indexed by layer. ``sink_mass`` is the mean over heads and over the queries that see the sink and
        more; ``sink_position`` the key that takes the largest ``share`` of all attention on average over heads, seen
        by so many ``queries``, with its ``received`` and ``boost`` over uniform attention; ``activation`` the largest
        magnitude in the residual stream that enters the layer, with its position, channel and ratio to the median as
        in `massive_activations`.

    Raises:
        ValueError: A statistic is missing, or the row of the batch.

    Source: Gu et al., arXiv 2410.10781 (sinks); Sun et al., arXiv 2402.17762 (massive activations).
    """
    import pandas
    import xarray

    dataset = as_dataset(source)
    require(dataset, "sink_mass", "received", *needed(dataset))
    check_measured(dataset, "batch", batch)
    if not real_tokens(dataset, "query").sel(batch=batch).any():
        raise ValueError(f"batch: row {batch} is all padding")
    dataset = row_alone(dataset, batch)
    activations = massive_activations(dataset).isel(batch=0)
    sinks = sink_positions(dataset).isel(batch=0)
    row = dataset.isel(batch=0)
    uniform = uniform_attention(dataset).sink_mass.isel(batch=0)
    sees_sink = (row.visible_keys > measured_with(dataset, "sink_tokens")) & (uniform != 0)
    mass = row.sink_mass.where(sees_sink).mean(["head", "query"])
    taken = xarray.Dataset(
        {
            "share": sinks.share.mean("head"),
            "queries": sinks.queries,
            "received": row.received.mean("head"),
            "boost": sinks.boost.mean("head"),
        }
    )
    lines = []
    for layer in row.layer.values:
        here = taken.sel(layer=layer)
        strongest = here.isel(key=int(here.share.fillna(-np.inf).argmax("key")))
        entering = activations.sel(hidden_layer=layer)
        peak = entering.isel(query=int(entering.magnitude.fillna(-np.inf).argmax("query")))
        lines.append(
            {
                "layer": int(layer),
                "sink_mass": float(mass.sel(layer=layer)),
                "sink_position": int(strongest["key"]),
                "share": float(strongest.share),
                "queries": int(strongest.queries),
                "received": float(strongest.received),
                "boost": float(strongest.boost),
                "activation": float(peak.magnitude),
                "activation_position": int(peak["query"]),
                "activation_channel": int(peak.channel),
                "activation_over_median": float(peak.ratio),
            }
        )
    frame = pandas.DataFrame(lines).set_index("layer")
    frame.attrs["part"] = measured_part(dataset)
    return frame
