"""One line per layer: how strong the sink is, where it is, and the largest activation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.dataset import as_dataset, require

if TYPE_CHECKING:
    import pandas
    import xarray

    from llama_attn.analysis.dataset import Source

# The last keys are seen by so few queries that their mean says little.
FEWEST_QUERIES = 4


def sink_tokens(dataset: xarray.Dataset) -> int:
    """How many first tokens ``sink_mass`` was measured for."""
    return int(json.loads(dataset.attrs["config"])["sink_tokens"])


def summarize_layers(source: Source, *, batch: int = 0) -> pandas.DataFrame:
    """The sink and the largest activation of every measured layer.

    Args:
        source: Statistics with ``sink_mass``, ``received``, ``hidden_max``, ``hidden_max_channel`` and
            ``hidden_median``.
        batch: Row of the batch.

    Returns:
        A frame indexed by layer. ``sink_mass`` is the mean over heads and over the queries that see more than
        the sink itself; ``sink_position`` the key that receives most on average over heads, among keys seen by
        at least four queries (or by the most there are); ``activation`` the largest magnitude in the residual stream that enters the
        layer, with its position, channel and ratio to the median magnitude of that token.

    Raises:
        ValueError: A statistic is missing, or the row of the batch.

    Source: Gu et al., arXiv 2410.10781 (sinks); Sun et al., arXiv 2402.17762 (massive activations).
    """
    import pandas

    dataset = as_dataset(source)
    require(dataset, "sink_mass", "received", "hidden_max", "hidden_max_channel", "hidden_median")
    if batch not in dataset.batch.values or not (dataset.visible_keys.sel(batch=batch) > 0).any():
        raise ValueError(
            f"batch: {batch} was not measured or is all padding; there are {dataset.batch.values.tolist()}"
        )
    row = dataset.sel(batch=batch)
    sees_more = row.visible_keys > sink_tokens(dataset)
    mass = row.sink_mass.where(sees_more).mean(["head", "query"])
    fewest = min(FEWEST_QUERIES, int(row.visible_queries.max()))
    received = row.received.mean("head").where(row.visible_queries >= fewest)
    received = received.fillna(-np.inf)
    activation = row.hidden_max.fillna(-np.inf)
    lines = []
    for layer in row.layer.values:
        sink = int(received.sel(layer=layer).argmax("key"))
        entering = activation.sel(hidden_layer=layer)
        query = int(entering.argmax("query"))
        at = {"hidden_layer": layer, "query": row["query"].values[query]}
        lines.append(
            {
                "layer": int(layer),
                "sink_mass": float(mass.sel(layer=layer)),
                "sink_position": sink,
                "received": float(received.sel(layer=layer)[sink]),
                "activation": float(entering[query]),
                "activation_position": int(at["query"]),
                "activation_channel": int(row.hidden_max_channel.sel(at)),
                "activation_over_median": float(entering[query] / row.hidden_median.sel(at)),
            }
        )
    return pandas.DataFrame(lines).set_index("layer")
