"""Who saw whom, summed up: what sums over queries are divided by, and where there is nothing to show.

It holds what is left of a `Visibility` when the forward is over, and can be put together from several forwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from llama_attn.stats.visibility import Visibility

Direction = Literal["causal", "bidirectional", "cross"]
"""What queries may see: keys up to themselves, all keys, or those of another text."""
VECTORS = ("visible_keys", "visible_queries_per_head")


@dataclass(frozen=True, eq=False)
class Counts:
    """Measured queries and keys of one layer, and how many of the one saw how many of the other.

    ``finish(total, counts, config)`` of a statistic is given them; ``total`` has an axis of layers in front. Queries and keys are
    counted by *slot*, as those of a `Block`.

    Args:
        first_query: Slot of the first measured query.
        stride: Distance of the measured queries [token].
        offset: Position of slot 0, the first key, in the row [token].
        visible_keys: Real keys that each query sees, (batch, query).
        visible_queries_per_head: Real queries that see each key, (batch, head or 1, key): what a sum over queries,
            (layer, batch, head, key), is divided by.
        length: Positions that bins of maps and of distances are laid out for.
        direction: Which way attention goes.
        real: Which measured queries, (batch, query), and keys, (batch, key), are real tokens; None if all are, and every
            key is seen, so that nothing has to be marked.
    """

    first_query: int
    stride: int
    offset: int
    visible_keys: Int[Tensor, "batch query"]
    visible_queries_per_head: Int[Tensor, "batch _ key"]
    length: int
    direction: Direction = "causal"
    real: tuple[Bool[Tensor, "batch query"], Bool[Tensor, "batch key"]] | None = None

    @classmethod
    def of(cls, visibility: Visibility) -> Counts:
        """What is left of who sees whom."""
        return cls(
            first_query=visibility.first_query,
            stride=visibility.stride,
            offset=visibility.offset,
            visible_keys=visibility.visible_keys,
            visible_queries_per_head=visibility.visible_queries_per_head,
            length=visibility.length,
            direction="cross" if not visibility.aligned else "causal" if visibility.causal else "bidirectional",
            # Every step of decoding counts anew.
            real=None if visibility.whole else (visibility.real_queries, visibility.real_keys),
        )

    @property
    def real_queries(self) -> Bool[Tensor, "batch query"]:
        """Whether each measured query is a real token."""
        return torch.ones_like(self.visible_keys, dtype=torch.bool) if self.real is None else self.real[0]

    @property
    def real_keys(self) -> Bool[Tensor, "batch key"]:
        """Whether each key is a real token."""
        seen = self.visible_queries_per_head[:, 0]
        return torch.ones_like(seen, dtype=torch.bool) if self.real is None else self.real[1]

    @property
    def num_queries(self) -> int:
        """Number of measured queries."""
        return self.visible_keys.shape[1]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.visible_keys.shape[0]

    @property
    def num_keys(self) -> int:
        """Length of the key axis."""
        return self.visible_queries_per_head.shape[2]

    @property
    def stop_key(self) -> int:
        """Position behind the last key [token]."""
        return self.offset + self.num_keys

    @property
    def first_position(self) -> int:
        """Position of the first measured query [token]."""
        return self.offset + self.first_query

    @property
    def query_slots(self) -> Int[Tensor, " query"]:
        """Slots of the measured queries."""
        return self.first_query + self.stride * torch.arange(self.num_queries, device=self.visible_keys.device)

    @property
    def visible_queries(self) -> Int[Tensor, "batch key"]:
        """Real queries that see each key, most over heads, (batch, key), which has no axis of heads to divide by."""
        seen = self.visible_queries_per_head
        return seen[:, 0] if seen.shape[1] == 1 else seen.amax(1)

    def of_heads(self, heads: list[int]) -> Counts:
        """The same for some heads only."""
        if self.visible_queries_per_head.shape[1] == 1:
            return self
        return replace(self, visible_queries_per_head=self.visible_queries_per_head[:, heads])

    def to(self, device: torch.device) -> Counts:
        """The same on ``device``."""
        if self.visible_keys.device == device:
            return self
        real = None if self.real is None else (self.real[0].to(device), self.real[1].to(device))
        return replace(self, real=real, **{name: getattr(self, name).to(device) for name in VECTORS})

    def equals(self, other: Counts) -> bool:
        """Whether both say the same, so that one of them is enough."""
        if self is other:
            return True
        places = (self.first_query, self.stride, self.offset, self.direction)
        return places == (other.first_query, other.stride, other.offset, other.direction) and all(
            torch.equal(getattr(self, name), getattr(other, name).to(self.visible_keys.device))
            for name in (*VECTORS, "real_queries", "real_keys")
        )

    def followed_by(self, other: Counts) -> Counts:
        """Both forwards as one: queries follow one another, the keys of the later one are new or the same.

        Args:
            other: Of the forward that came next, on the same rows.
        """
        cross = self.direction == "cross"
        front = 0 if cross else other.offset - self.offset
        grown = 0 if cross else other.stop_key - self.stop_key
        # More queries over the same keys of another sequence move on by their number.
        direction = self.direction if self.direction == other.direction else "bidirectional"
        real = None
        if self.real is not None or other.real is not None:
            queries = torch.cat([self.real_queries, other.real_queries], dim=1)
            # Of a mask that somebody made, those that some query sees: a later one may be the first.
            real = queries, pad(self.real_keys, (0, grown)) | pad(other.real_keys, (front, 0))
        return replace(
            self,
            visible_keys=torch.cat([self.visible_keys, other.visible_keys], dim=1),
            visible_queries_per_head=pad(self.visible_queries_per_head, (0, grown))
            + pad(other.visible_queries_per_head, (front, 0)),
            length=max(self.length, other.length),
            direction=direction,
            real=real,
        )
