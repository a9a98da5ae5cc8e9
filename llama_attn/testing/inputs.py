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
    {"queries": 17, "head_dim": 24, "scaling": 0.5},
)
"""What attention meets, as arguments of `make_inputs`: odd sizes, groups of 1, 2, 3 and 4 heads, padding on both sides, a
cache that is already filled, and a scaling other than 1 / √channel."""

Feature = Literal["softcap", "sinks", "bidirectional", "window"]
"""What some models ask of attention and a Llama does not: scores that a soft-cap bounds (Gemma 2), learned sinks (gpt-oss),
both directions (BERT), a sliding window (Mistral)."""

FEATURES: dict[Feature, tuple[dict[str, Any], ...]] = {
    "softcap": (
        {"queries": 33, "padding": "left", "softcap": 2.0},
        {"queries": 5, "cached": 12, "softcap": 2.0},
    ),
    "sinks": (
        {"queries": 33, "padding": "left", "sinks": True},
        {"queries": 1, "cached": 20, "sinks": True},
    ),
    "bidirectional": (
        {"queries": 33, "bidirectional": True},
        {"queries": 23, "padding": "right", "bidirectional": True},
    ),
    "window": (
        {"queries": 33, "padding": "left", "window": 7},
        {"queries": 6, "cached": 15, "window": 7},
        {"queries": 1, "cached": 20, "window": 7},
    ),
}
"""The situations that go with each `Feature`, all of them with grouped heads."""


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
        bidirectional: Whether queries see later keys too.
        window: How many keys back a query sees, its own included [token]; None for all.
        softcap: Largest score before the softmax [logit]; None for no limit.
        sinks: Score of one more outcome without a key, (head) [logit]; None without.
    """

    query: Float[Tensor, "batch head query channel"]
    key: Float[Tensor, "batch kv_head key channel"]
    value: Float[Tensor, "batch kv_head key channel"]
    attention_mask: Int[Tensor, "batch key"] | None
    cached: int
    scaling: float
    bidirectional: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None

    @property
    def real_keys(self) -> Bool[Tensor, "batch key"]:
        """Whether each key is a real token."""
        if self.attention_mask is None:
            return torch.ones(self.key.shape[0], self.key.shape[2], dtype=torch.bool)
        return self.attention_mask.bool().cpu()

    @property
    def scoring(self) -> Scoring:
        """How their scores are made, in the form that llama_attn's engines take."""
        return Scoring(self.scaling, softcap=self.softcap, sinks=self.sinks)

    @property
    def visibility(self) -> Visibility:
        """Who sees whom, in the form that llama_attn's engines take."""
        device = self.query.device
        real = None if self.attention_mask is None else self.attention_mask.bool()
        first = None
        if self.window is not None:
            positions = torch.arange(self.cached, self.key.shape[2], device=device)
            first = (positions - self.window + 1).clamp(min=0)[None]
        return Visibility(
            self.query.shape[0], self.cached, self.key.shape[2], device,
            causal=not self.bidirectional, real=real, first_key=first,
        )  # fmt: skip

    def reference(self, config: AttentionStatsConfig | None = None) -> Reference:
        """Attention over these inputs written out in float64 on the CPU."""
        real, keys = self.real_keys, torch.arange(self.key.shape[2])
        positions = keys[self.cached :]
        visible = real[:, None].expand(-1, len(positions), -1)
        if not self.bidirectional:
            visible = visible & (keys <= positions[:, None])
        if self.window is not None:
            visible = visible & (keys > positions[:, None] - self.window)
        config = config or AttentionStatsConfig()
        return Reference(
            query=self.query.double().cpu(),
            key=self.key.double().cpu(),
            value=self.value.double().cpu(),
            scaling=self.scaling,
            visible=visible[:, None],
            real_queries=real[:, self.cached :],
            rank=torch.where(real, real.long().cumsum(-1) - 1, config.sink_tokens),
            query_slots=positions,
            config=config,
            bidirectional=self.bidirectional,
            softcap=self.softcap,
            sinks=None if self.sinks is None else self.sinks.cpu(),
        )


def make_inputs(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 7,
    cached: int = 0,
    head_dim: int = 16,
    scaling: float | None = None,
    padding: Padding = "none",
    bidirectional: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
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
        scaling: What scores are multiplied with; None for 1 / √``head_dim``.
        padding: On which side the first row is padded, by a third of its length.
        bidirectional: Whether queries see later keys too.
        window: How many keys back a query sees, its own included [token]; None for all.
        softcap: Largest score before the softmax [logit]; None for no limit.
        sinks: Whether each head has a learned sink, which takes a good part of its weight.
        dtype: Of query, key, value and sinks.
        device: Where.
        seed: Of the random numbers.

    Raises:
        ValueError: ``kv_heads`` does not divide ``heads``, ``padding`` is unknown, or ``window`` or ``softcap`` is not above 0.
    """
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
    if padding not in ("none", "left", "right"):
        raise ValueError(f'padding: expected "none", "left" or "right", got {padding!r}')
    for name, limit in (("window", window), ("softcap", softcap)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name}: expected None or a number above 0, got {limit!r}")
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
        scaling=head_dim**-0.5 if scaling is None else scaling,
        bidirectional=bidirectional,
        window=window,
        softcap=softcap,
        sinks=3 + draw(heads) if sinks else None,
    )
