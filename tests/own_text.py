"""A row of a padded batch cut to its own text by hand, for comparison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_attn import AttentionStats


def own_text(stats: AttentionStats, row: int) -> AttentionStats:
    """All rows cut to where one has tokens, whose first is at 0; bins of maps may hold one token only.

    A row that is all padding stays.
    """
    if not real_tokens(stats, row).any():
        return stats
    first, stop = own_ends(stats, row)
    rows = [at for at, row in enumerate(stats.rows) if first <= row < stop]
    cuts: dict[str, slice | list[int]] = dict.fromkeys(("query", "key", "query_bin", "key_bin"), slice(first, stop))
    cuts["row"] = rows
    cuts["distance_bin"] = slice((stop - first).bit_length())
    values = {}
    for name, tensor in stats.values.items():
        dims = stats.labels[name].dims
        assert all(
            tensor.shape[dims.index(dim)] == stats.num_keys for dim in cuts.keys() & {*dims} - {"distance_bin", "row"}
        )
        values[name] = tensor[tuple(cuts.get(dim, slice(None)) for dim in dims)]
    if "topk_position" in values:
        values["topk_position"] = values["topk_position"] - first * (values["topk_position"] >= 0).int()
    tokens = None if stats.tokens is None else [each[first:stop] for each in stats.tokens]
    positions = tuple(stats.rows[at] - first for at in rows)
    return replace(stats, values=values, tokens=tokens, length=0, rows=positions)


def own_ends(stats: AttentionStats, row: int) -> tuple[int, int]:
    """Position of the first token of the row and the one behind its last; of padding alone, those of all."""
    real = np.flatnonzero(real_tokens(stats, row))
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, stats.num_keys)


def real_tokens(stats: AttentionStats, row: int) -> np.ndarray:
    """Which keys of the row some query of some layer sees."""
    seen = stats.visible_queries[..., row, :].numpy() > 0
    return seen.reshape(-1, stats.num_keys).any(0)
