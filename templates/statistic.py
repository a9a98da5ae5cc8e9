"""One number for each head and query: what the second most attended key gets."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_attn.stats.block import Block
from llama_attn.stats.reference import Reference
from llama_attn.stats.rows import QUERY_DIMS
from llama_attn.stats.table import Statistic


# What runs: some query rows, with all the keys that they may see; (batch, head, row).
def _second_weight(block: Block) -> Tensor:
    if block.num_keys < 2:
        return torch.zeros_like(block.row_sum)
    return block.weights.topk(2).values[..., 1]


# The definition, on whole matrices in float64, which the tests compare with; (batch, head, query).
def _second_weight_textbook(reference: Reference) -> Tensor:
    ordered = reference.weights.sort(-1, descending=True).values
    return ordered[..., 1] if ordered.shape[-1] > 1 else torch.zeros_like(ordered[..., 0])


STATISTICS = (
    Statistic(
        "second_weight", QUERY_DIMS, "probability", "the source of the definition",
        stream=_second_weight, textbook=_second_weight_textbook,
        meaning="second largest attention weight",
    ),
)  # fmt: skip
