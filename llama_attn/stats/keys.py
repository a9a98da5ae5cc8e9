"""Statistics of one key: how much attention it receives."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_attn.stats.block import Block
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Counts
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import Statistic

KEY_DIMS = ("layer", "batch", "head", "key")


def _per_visible_query(total: Tensor, counts: Counts, config: AttentionStatsConfig) -> Tensor:
    if counts.real is None and counts.num_queries == 1:
        # Each key is seen by the one query, of which decoding makes many.
        return total
    return total / counts.visible_queries_per_head


def _received_textbook(reference: Reference) -> Tensor:
    seen_by = (reference.visible & reference.real_queries[:, None, :, None]).sum(-2)
    return _received_total_textbook(reference) / seen_by


def _received_total_textbook(reference: Reference) -> Tensor:
    return torch.where(reference.real_queries[:, None, :, None], reference.weights, 0).sum(-2)


STATISTICS = (
    Statistic(
        "received", KEY_DIMS, "probability", "Gu et al., arXiv 2410.10781 (importance of a key, α)",
        stream=Block.received, textbook=_received_textbook, finish=_per_visible_query, default=True,
        meaning="mean attention weight a key receives from the queries that see it",
    ),
    Statistic(
        "received_total", KEY_DIMS, "attention", "Zhang et al., arXiv 2306.14048 (H2O, accumulated attention)",
        stream=Block.received, textbook=_received_total_textbook,
        meaning="attention weight a key receives from all queries",
    ),
)  # fmt: skip
