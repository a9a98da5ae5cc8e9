"""Attention written out in float64: what the textbook forms of the statistics are computed from.

It holds (queries × keys) matrices, so it is for tests and for small examples, never for the forward of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_attn.stats.parameters import Parameters


@dataclass(frozen=True, eq=False)
class Reference:
    """Everything that a definition in the literature refers to, materialised.

    Queries and keys are counted by *slot*, as those of a `Block`: 0 for the first key, padding included; its position in the
    row is ``offset`` more. Here ``key`` begins at slot 0.

    Args:
        query: Queries after RoPE, (batch, head, query, channel).
        key: Keys after RoPE and cache, (batch, kv_head, key, channel).
        value: Values, (batch, kv_head, key, value_channel).
        scaling: What scores are multiplied with, 1 / √channel in a Llama.
        visible: Whether each query may see each key, (batch, 1 or head, query, key).
        real_queries: Whether each query is a real token that sees something, (batch, query).
        rank: Real keys of the same sequence before each key; no less than ``sink_tokens`` for keys that are
            padding, (batch, key).
        query_slots: Slot of every query, (query).
        config: Parameters of the statistics.
        bidirectional: Whether distances count to both sides.
        bias: What is added to the scores, by a position bias or an additive mask, broadcastable to
            (batch, head, query, key).
        softcap: Largest score before the bias [logit]; ``None`` for no limit.
        sinks: Score of one more outcome without a key, (head) [logit].
        offset: Position of slot 0 in the row [token]; above 0 where a cache has dropped keys.
        length: Tokens that maps and distances are laid out for; ``None`` for ``offset`` and the keys.
        segments: Segment of every key, −1 for none, (batch, key).
        tokens: Token id of every key, (batch, key).
        token_before: Token id in front of the first key, (batch,), where a cache has dropped it; −1 for padding.
        keep: Which keys are kept, (batch, 1 or kv_head, key).
        hidden: Residual stream that enters the layer, (batch, query, hidden).
        output_weight: Weight of ``o_proj``, (hidden, head · channel).
    """

    query: Float[Tensor, "batch head query channel"]
    key: Float[Tensor, "batch kv_head key channel"]
    value: Float[Tensor, "batch kv_head key value_channel"] | None
    scaling: float
    visible: Bool[Tensor, "batch _ query key"]
    real_queries: Bool[Tensor, "batch query"]
    rank: Int[Tensor, "batch key"]
    query_slots: Int[Tensor, " query"]
    config: Parameters
    bidirectional: bool = False
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    offset: int = 0
    length: int | None = None
    segments: Int[Tensor, "batch key"] | None = None
    tokens: Int[Tensor, "batch key"] | None = None
    token_before: Int[Tensor, " batch"] | None = None
    keep: Bool[Tensor, "batch _ key"] | None = None
    hidden: Float[Tensor, "batch query hidden"] | None = None
    output_weight: Float[Tensor, "hidden channels"] | None = None

    @property
    def num_keys(self) -> int:
        """Length of the key axis."""
        return self.key.shape[2]

    @property
    def num_positions(self) -> int:
        """Tokens that maps and distances are laid out for."""
        return self.offset + self.num_keys if self.length is None else self.length

    @cached_property
    def scores(self) -> Float[Tensor, "batch head query key"]:
        """Scores in float64, −inf where a query may not see a key."""
        groups = self.query.shape[1] // self.key.shape[1]
        key = repeat(self.key.double(), "b h k d -> b (h g) k d", g=groups)
        scores = torch.einsum("bhqd,bhkd->bhqk", self.query.double(), key) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias.double()
        return scores.masked_fill(~self.visible, -torch.inf)

    @property
    def sink_scores(self) -> Float[Tensor, "batch head query 1"]:
        """The score of each query's learned sink in float64; −inf without sinks."""
        sinks = torch.full((self.query.shape[1],), -torch.inf) if self.sinks is None else self.sinks
        return sinks.double()[:, None, None].expand(*self.query.shape[:3], 1)

    @cached_property
    def outcomes(self) -> Float[Tensor, "batch head query outcome"]:
        """Shares of all keys, then of the learned sink, in float64; a query that sees nothing has none."""
        return torch.cat([self.scores, self.sink_scores], dim=-1).softmax(-1).nan_to_num(0.0)

    @property
    def weights(self) -> Float[Tensor, "batch head query key"]:
        """Attention weights in float64."""
        return self.outcomes[..., :-1]

    @property
    def sink_weight(self) -> Float[Tensor, "batch head query"]:
        """Share of the learned sink in float64."""
        return self.outcomes[..., -1]

    @cached_property
    def output(self) -> Float[Tensor, "batch head query value_channel"]:
        """What attention returns before ``o_proj``, in float64."""
        if self.value is None:
            raise ValueError("value: the reference has no values")
        value = repeat(self.value.double(), "b h k d -> b (h g) k d", g=self.query.shape[1] // self.key.shape[1])
        return self.weights @ value

    @cached_property
    def distance(self) -> Int[Tensor, "query key"]:
        """How far each key lies behind each query [token]; |i − j| if queries may see later keys."""
        signed = self.query_slots[:, None] - torch.arange(self.num_keys)
        return signed.abs() if self.bidirectional else signed
