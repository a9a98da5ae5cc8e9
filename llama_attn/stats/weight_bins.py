"""How many keys have a weight of which size, and how much of the attention they hold."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_attn.stats.block import Block
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Counts
from llama_attn.stats.maps import mean_over_all_queries
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import Statistic

# Bin b < 30 holds the weights in (2^−(b+1), 2^−b], the last one all that are smaller.
NUM_WEIGHT_BINS = 31
DIMS = ("layer", "batch", "head", "weight_bin")
# Keys whose weights are added one after the other; of a whole block, hundreds of roundings of a sum would add up.
PIECE = 64


def _bins(weights: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    # Of the number just below, the exponent is that of the bin, at powers of two as well.
    kind, mantissa, bias = (torch.int64, 52, 1022) if weights.dtype == torch.float64 else (torch.int32, 23, 126)
    exponents = weights.contiguous().view(kind).sub(1) >> mantissa
    return (bias - exponents).clamp_(0, NUM_WEIGHT_BINS - 1).long()


def _added(block: Block, numbers: Float[Tensor, "batch head row key"]) -> Float[Tensor, "batch head weight_bin"]:
    """Sums of ``numbers`` by the bin of the weight that they belong to."""
    missing = -numbers.shape[-1] % PIECE
    numbers, bins = (
        torch.nn.functional.pad(each, (0, missing)).unflatten(-1, (-1, PIECE))
        for each in (numbers, _bins(block.weights))
    )
    totals = numbers.new_zeros(*numbers.shape[:-1], NUM_WEIGHT_BINS).scatter_add_(-1, bins, numbers)
    return totals.sum((2, 3))


def _weight_mass(block: Block) -> Float[Tensor, "batch head weight_bin"]:
    return _added(block, block.weights)


def _weight_count(block: Block) -> Float[Tensor, "batch head weight_bin"]:
    # Of a row that is NaN nothing is counted as a number.
    return _added(block, torch.where(block.weights.isnan(), block.weights, 1))


def _mean_count(total: Tensor, counts: Counts, config: AttentionStatsConfig) -> Tensor:
    # Hidden keys have no weight and stand in the last bin: what is seen and not elsewhere belongs there.
    larger = total[..., :-1]
    seen = counts.visible_queries_per_head.sum(-1).expand(total.shape[1:3]).to(total.dtype)
    smallest = seen - larger.sum(-1)
    return mean_over_all_queries(torch.cat([larger, smallest[..., None]], dim=-1), counts, config)


def _textbook(reference: Reference, numbers: Tensor) -> Tensor:
    weights, queries = reference.weights, reference.real_queries.sum(-1)[:, None]
    seen = (reference.visible & reference.real_queries[:, None, :, None]).expand_as(weights)
    bins = []
    for b in range(NUM_WEIGHT_BINS):
        above = 2.0 ** -(b + 1) if b + 1 < NUM_WEIGHT_BINS else -1.0
        inside = (weights > above) & (weights <= 2.0**-b) & seen
        bins.append((numbers * inside).sum((-2, -1)) / queries)
    return torch.stack(bins, dim=-1)


STATISTICS = (
    Statistic(
        "weight_count", DIMS, "keys", "keys by the size of their weight, in bins that halve",
        stream=_weight_count, finish=_mean_count,
        textbook=lambda reference: _textbook(reference, torch.ones_like(reference.weights)),
        meaning="keys of each size of weight, per query",
    ),
    Statistic(
        "weight_mass", DIMS, "probability", "attention by the size of weights, in bins that halve",
        stream=_weight_mass, textbook=lambda reference: _textbook(reference, reference.weights),
        finish=mean_over_all_queries,
        meaning="attention mass of the keys of each size of weight",
    ),
)  # fmt: skip
