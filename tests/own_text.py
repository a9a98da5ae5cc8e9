"""A row of a padded batch cut to its own text by hand, for comparison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_attn import AttentionStats


def own_text(stats: AttentionStats, row: int) -> AttentionStats:
    """All rows cut to where one has tokens, whose first is at 0; bins of maps may hold one token only.

    A row that is all padding stays.
    """
    real = np.flatnonzero(stats.visible_queries[row].numpy() > 0)
    if not len(real):
        return stats
    first, stop = int(real[0]), int(real[-1]) + 1
    cuts = dict.fromkeys(("query", "key", "query_bin", "key_bin"), slice(first, stop))
    cuts["distance_bin"] = slice((stop - first).bit_length())
    values = {}
    for name, tensor in stats.values.items():
        dims = stats.labels[name].dims
        assert all(tensor.shape[dims.index(dim)] == stats.num_keys for dim in cuts.keys() & {*dims} - {"distance_bin"})
        values[name] = tensor[tuple(cuts.get(dim, slice(None)) for dim in dims)]
    if "topk_position" in values:
        values["topk_position"] = values["topk_position"] - first * (values["topk_position"] >= 0).int()
    tokens = None if stats.tokens is None else [each[first:stop] for each in stats.tokens]
    return replace(stats, values=values, tokens=tokens, length=0)
