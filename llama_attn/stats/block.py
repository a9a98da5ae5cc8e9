"""A block of query rows against all the keys they may see: what the streaming form of a statistic is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.table import Needed, Statistic
from llama_attn.stats.visibility import Visibility

HIDDEN_SCORE = -1e15
"""The score of a key that may not be seen [logit]. Finite, so that its zero weight times a score, or its square, is zero and
not NaN; so low that no real score comes near it. It is no number to compute with: ask `Block.visible`."""


class NotGivenError(ValueError):
    """A block was asked for something that it has only for statistics that need it.

    Args:
        need: What they need.
    """

    def __init__(self, need: Needed) -> None:
        super().__init__(f"`{need}` is not there")
        self.need = need

    def by(self, statistic: Statistic) -> ValueError:
        """The same, said of the statistic that asked."""
        mend = ""
        if self.need not in statistic.needed:
            all_of_them = ", ".join(f'"{need}"' for need in (*statistic.needed, self.need))
            mend = f"; say so with Statistic(…, needs={f'({all_of_them})' if statistic.needed else all_of_them})"
        return ValueError(f"{statistic.name!r} needs `{self.need}`, which is not there{mend}")


@dataclass(frozen=True, eq=False)
class Wanted:
    """What an engine is asked to measure in one forward; the same for every layer, but for the keys that are kept.

    Args:
        statistics: Entries of the table that are measured on attention weights.
        config: Their parameters.
        segments: Segment of every key, −1 for none, (batch, key).
        num_segments: How many segments there are.
        tokens: Token id of every key, (batch, key).
        token_before: Token id in front of the first key, (batch,), where a cache has dropped it; −1 for padding.
        keep: Which keys are kept, (batch, 1 or kv_head, key).
        rows: Which of the measured queries `row_weights` is of, in order; None for all.
        layers: How many layers measure the same, so that an engine may lay their numbers side by side.
    """

    statistics: Sequence[Statistic]
    config: AttentionStatsConfig
    segments: Int[Tensor, "batch key"] | None = None
    num_segments: int = 0
    tokens: Int[Tensor, "batch key"] | None = None
    token_before: Int[Tensor, " batch"] | None = None
    keep: Bool[Tensor, "batch _ key"] | None = None
    rows: Sequence[int] | None = None
    layers: int = 1


@dataclass(frozen=True, eq=False)
class Block:
    """Scores and weights of some query rows, all heads, for the run of keys that they could see.

    Queries and keys are counted by *slot*: 0 for the first key of the call, padding included. Its position in the row is
    ``visibility.offset`` more, which is above 0 where a cache has dropped keys. The first key of a block need not be slot 0:
    tensors with an axis ``key`` begin at ``first_key``.

    Args:
        centred: Scores less their row maximum [logit], about `HIDDEN_SCORE` for hidden keys, (batch, head, row, key).
        exponentials: exp of the above, zero for hidden keys, (batch, head, row, key).
        row_max: Largest score of each row [logit], (batch, head, row).
        row_sum: Sum of the exponentials of each row, (batch, head, row).
        logsumexp: ln of the sum of all exponentiated scores, the learned sink's among them [logit],
            (batch, head, row).
        scale: What turns exponentials into weights: the share of the keys / row_sum, and 0 for rows that are padding
            or see nothing, (batch, head, row).
        rows: Which of the measured queries these are, counted from 0; their slots are ``query_slots``.
        first_key: Slot of the first key.
        visibility: Who may see whom.
        wanted: What is measured, and its parameters.
        sink_odds: ln of the learned sink's weight over that of all keys, (batch, head, row); ``None`` without sinks.
    """

    centred: Float[Tensor, "batch head row key"]
    exponentials: Float[Tensor, "batch head row key"]
    row_max: Float[Tensor, "batch head row"]
    row_sum: Float[Tensor, "batch head row"]
    logsumexp: Float[Tensor, "batch head row"]
    scale: Float[Tensor, "batch head row"]
    rows: range
    first_key: int
    visibility: Visibility
    wanted: Wanted
    sink_odds: Float[Tensor, "batch head row"] | None = None

    @property
    def config(self) -> AttentionStatsConfig:
        """Parameters of the statistics."""
        return self.wanted.config

    @property
    def num_keys(self) -> int:
        """Number of keys in this block."""
        return self.exponentials.shape[-1]

    @property
    def keys(self) -> slice:
        """Slots of the keys in this block."""
        return slice(self.first_key, self.first_key + self.num_keys)

    @property
    def key_slots(self) -> Int[Tensor, " key"]:
        """Slot of each key in this block."""
        return torch.arange(self.keys.start, self.keys.stop, device=self.exponentials.device)

    @cached_property
    def weights(self) -> Float[Tensor, "batch head row key"]:
        """Attention weights [probability]; zero for hidden keys and in padding rows."""
        return self.exponentials * self.scale[..., None]

    @cached_property
    def logits(self) -> Float[Tensor, "batch head row key"]:
        """Scores [logit]; where a key is hidden they mean nothing: use `visible`."""
        return self.centred + self.row_max[..., None]

    @cached_property
    def visible(self) -> Bool[Tensor, "_ _ row key"]:
        """Whether a real query sees a key; broadcasts over batch and heads."""
        return self.visibility.visible(self.rows) & self.real_rows[:, None, :, None]

    @property
    def real_rows(self) -> Bool[Tensor, "batch row"]:
        """Whether each row is a real query."""
        return self.visibility.real_queries[:, self.rows.start : self.rows.stop]

    @property
    def query_slots(self) -> Int[Tensor, " row"]:
        """Slot of each row."""
        return self.visibility.query_slots[self.rows.start : self.rows.stop]

    def distance(self, first: int, stop: int) -> Int[Tensor, "row key"]:
        """How far slots ``first`` … ``stop`` − 1 lie behind each query [token]; |i − j| if it may see later keys.

        Those of the block are ``block.keys.start`` to ``block.keys.stop``.
        """
        keys = torch.arange(first, stop, device=self.exponentials.device)
        signed = self.query_slots[:, None] - keys
        return signed if self.visibility.causal else signed.abs()

    @cached_property
    def topk(self) -> tuple[Float[Tensor, "batch head row rank"], Int[Tensor, "batch head row rank"]]:
        """The ``top_k`` largest centred scores and their slots, ties to the lower one; missing ones are −inf."""
        k = min(self.config.top_k, self.num_keys)
        values, keys = self.centred.topk(k)
        # torch.topk breaks ties as it likes. Ties inside the k are put in order; where a tie reaches beyond the
        # k, the block is sorted instead.
        last = values[..., -1:]
        if bool(((self.centred == last).sum(-1) > (values == last).sum(-1)).any()):
            values, keys = self.centred.sort(dim=-1, descending=True, stable=True)
            values, keys = values[..., :k], keys[..., :k]
        else:
            keys, order = keys.sort(dim=-1)
            values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
            keys = keys.gather(-1, order)
        seen = values > HIDDEN_SCORE / 2
        values = values.masked_fill(~seen, -torch.inf)
        missing = self.config.top_k - k
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        return values, torch.nn.functional.pad(keys + self.first_key, (0, missing))

    def tokens_at(self, slots: slice | Int[Tensor, " slot"]) -> Int[Tensor, "batch slot"]:
        """Token ids at ``slots``, for statistics with ``needs="tokens"``."""
        if self.wanted.tokens is None:
            raise NotGivenError("tokens")
        return self.wanted.tokens[:, slots]

    @cached_property
    def tokens(self) -> Int[Tensor, "batch key"]:
        """Token id of every key of this block, for statistics with ``needs="tokens"``."""
        return self.tokens_at(self.keys)

    @cached_property
    def row_tokens(self) -> Int[Tensor, "batch row"]:
        """Token id of every row of this block, for statistics with ``needs="tokens"``."""
        return self.tokens_at(self.query_slots)

    @property
    def segments(self) -> Int[Tensor, "batch key"]:
        """Segment of every key of this block, −1 for none, for statistics with ``needs="segments"``."""
        if self.wanted.segments is None:
            raise NotGivenError("segments")
        return self.wanted.segments[:, self.keys]

    @property
    def keep(self) -> Bool[Tensor, "batch _ key"]:
        """Which keys of this block are kept, (batch, 1 or kv_head, key), for statistics with ``needs="keep"``.

        Raises:
            ValueError: The mask is of another number of keys.
        """
        keep, num_keys = self.wanted.keep, self.visibility.num_keys
        if keep is None:
            raise NotGivenError("keep")
        if keep.shape[-1] != num_keys:
            raise ValueError(f"keep: expected {num_keys} keys, got {keep.shape[-1]}")
        return keep[:, :, self.keys]

    def mass(self, pairs: Bool[Tensor, "_ row key"]) -> Float[Tensor, "batch head row"]:
        """Σ_j A_ij over the marked pairs, the same for every head."""
        return (self.exponentials * pairs[:, None]).sum(-1) * self.scale

    def mean(self, numbers: Float[Tensor, "*batch key"]) -> Float[Tensor, "batch head row"]:
        """Σ_j A_ij c_j for a number c_j of each key of this block, (key) or (batch, key)."""
        if numbers.ndim == 2:
            numbers = numbers[:, None, :, None]
            return torch.matmul(self.exponentials, numbers).squeeze(-1) * self.scale
        return torch.mv(self.exponentials.flatten(0, 2), numbers).view_as(self.scale) * self.scale

    def received(self) -> Float[Tensor, "batch head key"]:
        """Σ_i A_ij over the rows of this block."""
        batch, heads = self.scale.shape[:2]
        received = torch.bmm(self.scale.flatten(0, 1)[:, None], self.exponentials.flatten(0, 1))
        return received.view(batch, heads, -1)
