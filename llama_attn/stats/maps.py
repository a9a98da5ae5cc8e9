"""Statistics of whole maps: weights and scores pooled to bins, and the histogram of distances.

Bins are aligned to absolute positions and their width is a power of two, so that a map that has grown can be merged
from neighbours exactly.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llama_attn.stats.block import HIDDEN_SCORE, Block
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Counts
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import Statistic

MAP_DIMS = ("layer", "batch", "head", "query_bin", "key_bin")


def num_distance_bins(length: int) -> int:
    """Bins [2^b − 1, 2^(b+1) − 1) that cover the distances 0 … length − 1."""
    bins = 1
    while 2**bins - 1 < length:
        bins += 1
    return bins


def _pooled(block: Block, values: Shaped[Tensor, "*batch row key"]) -> Float[Tensor, "*batch query_bin key_bin"]:
    """Sum ``values`` over the pairs of each cell of the map."""
    visibility = block.visibility
    width = block.config.bin_width(visibility.length)
    bins = -(-visibility.length // width)
    first_bin, before = divmod(visibility.offset + block.first_key, width)
    padding = -(before + values.shape[-1]) % width
    columns = torch.nn.functional.pad(values, (before, padding)).unflatten(-1, (-1, width)).sum(-1)
    pooled = columns.new_zeros(*columns.shape[:-2], bins, bins)
    rows = (visibility.offset + block.query_slots) // width
    pooled[..., first_bin : first_bin + columns.shape[-1]].index_add_(-2, rows, columns)
    return pooled


def _weights_map(block: Block) -> Float[Tensor, "batch head query_bin key_bin"]:
    return _pooled(block, block.weights)


def _mean_over_queries(total: Tensor, counts: Counts, config: AttentionStatsConfig) -> Tensor:
    width = config.bin_width(counts.length)
    queries = total.new_zeros(counts.batch, total.shape[-2])
    bins = (counts.offset + counts.query_slots) // width
    queries.index_add_(-1, bins, counts.real_queries.to(total.dtype))
    return total / queries[:, None, :, None]


def _logits_map(block: Block) -> Float[Tensor, "batch head 2 query_bin key_bin"]:
    # The sum and the number of pairs, so that blocks and steps of generation can be added.
    visible = block.visible.expand_as(block.centred)
    scores = torch.where(visible, block.logits, 0)
    # A bias may hide a key that is visible.
    scores = scores.masked_fill(scores < HIDDEN_SCORE / 2, -torch.inf)
    return torch.stack([_pooled(block, scores), _pooled(block, visible.to(scores.dtype))], dim=2)


def _mean_over_pairs(total: Tensor, counts: Counts, config: AttentionStatsConfig) -> Tensor:
    # A sum over no pairs is 0 / 0 = NaN: the cell has no data.
    return total.select(-3, 0) / total.select(-3, 1)


def _map_edges(reference: Reference) -> tuple[list[slice], list[slice]]:
    width = 1
    while -(-reference.num_positions // width) > reference.config.map_size:
        width *= 2
    bins, offset = range(0, reference.num_positions, width), reference.offset
    rows = [torch.nonzero((offset + reference.query_slots) // width == b // width).flatten() for b in bins]
    query_bins = [slice(int(r[0]), int(r[-1]) + 1) if len(r) else slice(0, 0) for r in rows]
    return query_bins, [slice(max(0, b - offset), max(0, b + width - offset)) for b in bins]


def _sums_of_cells(values: Tensor, query_bins: list[slice], key_bins: list[slice]) -> Tensor:
    columns = torch.stack([values[..., keys].sum(-1) for keys in key_bins], dim=-1)
    return torch.stack([columns[..., rows, :].sum(-2) for rows in query_bins], dim=-2)


def _weights_map_textbook(reference: Reference) -> Tensor:
    query_bins, key_bins = _map_edges(reference)
    real = reference.real_queries.double()
    masses = _sums_of_cells(reference.weights * real[:, None, :, None], query_bins, key_bins)
    queries = torch.stack([real[:, rows].sum(-1) for rows in query_bins], dim=-1)
    return masses / queries[:, None, :, None]


def _logits_map_textbook(reference: Reference) -> Tensor:
    bins = _map_edges(reference)
    seen = (reference.visible & reference.real_queries[:, None, :, None]).expand_as(reference.scores)
    return _sums_of_cells(torch.where(seen, reference.scores, 0), *bins) / _sums_of_cells(seen, *bins)


def _distance_histogram(block: Block) -> Float[Tensor, "batch head distance_bin"]:
    # Written with each row shifted by its own position, the block's diagonals become columns: one copy and one
    # sum, no index per pair.
    weights, num_rows, num_keys = block.weights, len(block.rows), block.num_keys
    stride = block.visibility.queries.step
    length = num_keys + num_rows * stride
    sheared = weights.new_zeros(*weights.shape[:2], num_rows, length)
    steps = (*sheared.stride()[:2], length - stride, 1)
    sheared.as_strided(weights.shape, steps, (num_rows - 1) * stride).copy_(weights)
    last_query = block.visibility.queries[block.rows[-1]]
    distance = (last_query - block.first_key - torch.arange(length, device=weights.device)).abs()
    bins = num_distance_bins(block.visibility.length)
    edges = 2 ** torch.arange(1, bins, device=weights.device) - 1
    which = torch.bucketize(distance, edges, right=True)
    return weights.new_zeros(*weights.shape[:2], bins).index_add_(-1, which, sheared.sum(-2))


def mean_over_all_queries(total: Tensor, counts: Counts, config: AttentionStatsConfig) -> Tensor:
    """A sum over real queries, (layer, batch, head, bin), per query."""
    return total / counts.real_queries.sum(-1)[:, None, None]


def _distance_histogram_textbook(reference: Reference) -> Tensor:
    real = reference.real_queries.double()
    masses = []
    for low in (2**b - 1 for b in range(reference.num_positions.bit_length())):
        inside = (reference.distance >= low) & (reference.distance < 2 * low + 1)
        masses.append(((reference.weights * inside).sum(-1) * real[:, None]).sum(-1) / real.sum(-1)[:, None])
    return torch.stack(masses, dim=-1)


STATISTICS = (
    Statistic(
        "weights_map", MAP_DIMS, "probability", "Clark et al., arXiv 1906.04341 (attention maps), pooled",
        stream=_weights_map, textbook=_weights_map_textbook, finish=_mean_over_queries,
        meaning="attention weight of a bin of queries on a bin of keys",
    ),
    Statistic(
        "logits_map", MAP_DIMS, "logit", "Sun et al., arXiv 2402.17762 (scores before the softmax), pooled",
        stream=_logits_map, textbook=_logits_map_textbook, finish=_mean_over_pairs, parts=(2,),
        meaning="mean scaled score of a bin of queries and a bin of keys",
    ),
    Statistic(
        "distance_histogram", ("layer", "batch", "head", "distance_bin"), "probability",
        "Vig & Belinkov (2019), arXiv 1906.04284, in bins that double",
        stream=_distance_histogram, textbook=_distance_histogram_textbook, finish=mean_over_all_queries,
        of_distance=True,
        meaning="attention mass by distance",
    ),
)  # fmt: skip
