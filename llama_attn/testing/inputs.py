"""What attention meets, as random tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility

Padding = Literal["none", "left", "right"]
"""Where rows that are shorter are filled."""

SITUATIONS: tuple[dict[str, Any], ...] = (
    {"queries": 1},
    {"queries": 7, "heads": 4, "kv_heads": 4},
    {"queries": 63, "heads": 4, "kv_heads": 2},
    {"queries": 130, "heads": 9, "kv_heads": 3, "batch": 1},
    {"queries": 33, "heads": 4, "kv_heads": 1, "padding": "left"},
    {"queries": 33, "padding": "right"},
    {"queries": 1, "cached": 20},
    {"queries": 5, "cached": 12, "padding": "left"},
    {"queries": 17, "head_dim": 24},
)
"""What attention meets, as arguments of `make_inputs`: odd sizes, groups of 1, 2, 3 and 4 heads, padding on both sides, and a
cache that is already filled."""


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Tensors as they reach an attention function, and what they mean.

    Args:
        query: (batch, head, query, channel).
        key: (batch, kv_head, key, channel).
        value: (batch, kv_head, key, channel).
        attention_mask: (batch, key), 1 for real tokens; None without padding.
        cached: How many of the keys come from a cache.
        scaling: What scores are multiplied with.
    """

    query: Float[Tensor, "batch head query channel"]
    key: Float[Tensor, "batch kv_head key channel"]
    value: Float[Tensor, "batch kv_head key channel"]
    attention_mask: Int[Tensor, "batch key"] | None
    cached: int
    scaling: float

    @property
    def real_keys(self) -> Bool[Tensor, "batch key"]:
        """Whether each key is a real token."""
        if self.attention_mask is None:
            return torch.ones(self.key.shape[0], self.key.shape[2], dtype=torch.bool)
        return self.attention_mask.bool().cpu()

    @property
    def scoring(self) -> Scoring:
        """How their scores are made, in the form that llama_attn's engines take."""
        return Scoring(self.scaling)

    @property
    def visibility(self) -> Visibility:
        """The same in the form that llama_attn's engines take."""
        real = None if self.attention_mask is None else self.attention_mask.bool()
        return Visibility(self.query.shape[0], self.cached, self.key.shape[2], self.query.device, real=real)

    def reference(self, config: AttentionStatsConfig | None = None) -> Reference:
        """Attention over these inputs written out in float64 on the CPU."""
        real = self.real_keys
        positions = torch.arange(self.cached, self.key.shape[2])
        causal = torch.arange(self.key.shape[2]) <= positions[:, None]
        config = config or AttentionStatsConfig()
        rank = torch.where(real, real.long().cumsum(-1) - 1, config.sink_tokens)
        return Reference(
            query=self.query.double().cpu(),
            key=self.key.double().cpu(),
            value=self.value.double().cpu(),
            scaling=self.scaling,
            visible=(causal & real[:, None])[:, None],
            real_queries=real[:, self.cached :],
            rank=rank,
            query_positions=positions,
            config=config,
        )


def make_inputs(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 7,
    cached: int = 0,
    head_dim: int = 16,
    padding: Padding = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Random attention inputs whose scores are spread as widely as those of a trained model.

    Args:
        batch: Rows. With padding, the first row has it and the others do not.
        heads: Query heads.
        kv_heads: Key and value heads; must divide ``heads``.
        queries: Tokens of this call.
        cached: Tokens before them.
        head_dim: Channels per head.
        padding: On which side the first row is padded, by a third of its length.
        dtype: Of query, key and value.
        device: Where.
        seed: Of the random numbers.

    Raises:
        ValueError: ``kv_heads`` does not divide ``heads``, or ``padding`` is unknown.
    """
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
    if padding not in ("none", "left", "right"):
        raise ValueError(f'padding: expected "none", "left" or "right", got {padding!r}')
    generator = torch.Generator().manual_seed(seed)
    keys = cached + queries

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    mask = None
    if padding != "none":
        mask = torch.ones(batch, keys, dtype=torch.long)
        mask[0, slice(0, keys // 3) if padding == "left" else slice(keys - keys // 3, keys)] = 0
    return AttentionInputs(
        query=2 * draw(batch, heads, queries, head_dim),
        key=draw(batch, kv_heads, keys, head_dim),
        value=draw(batch, kv_heads, keys, head_dim),
        attention_mask=None if mask is None else mask.to(device),
        cached=cached,
        scaling=head_dim**-0.5,
    )
