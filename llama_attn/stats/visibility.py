"""Who may see whom, in memory that grows with T.

Built once per forward and shared by all layers that see the same. Padding, packing, windows and a cache are described
by vectors; only a 4-D mask that somebody else made is kept as the (queries × keys) tensor it already was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from llama_attn.stats.spans import VECTORS, Kept, Spans


@dataclass(frozen=True, eq=False)
class Visibility(Spans):
    """Which keys every query of one call may see, and what statistics need to know of it.

    The streaming form of a statistic may ask it, of all keys and all measured queries of the call, of which ``block.keys`` and
    ``block.rows`` are those of its block:

    - ``real_keys``, (batch, key), and ``real_queries``, (batch, query): whether each is a real token.
    - ``visible_keys``, (batch, query), and ``visible_queries_per_head``, (batch, head or 1, key): how many real ones each sees,
      and is seen by.
    - ``rank``, (batch, key): how many real keys of the same sequence come before each.
    - ``num_keys``, and ``offset``: the position of slot 0 [token].
    - ``causal``: whether a query sees no later key; ``aligned``: False in cross-attention.
    """

    @classmethod
    def of_mask(
        cls,
        mask: Shaped[Tensor, "_ _ query key"],
        *,
        batch: int,
        device: torch.device,
        first_query: int | None = None,
        offset: int = 0,
        dropped: Int[Tensor, " batch"] | None = None,
        aligned: bool = True,
    ) -> Visibility:
        """Describe a call by its mask alone: a key is real if some query sees it, and a query if it sees some key.

        The row is one sequence, and distances count to both sides.

        Args:
            mask: (1 or batch, 1 or head, query, key): bool (True = seen) or additive.
            batch: Number of rows.
            device: Where to keep it.
            first_query: Slot of the first query; ``None`` if the last query is the last key.
            offset: Absolute position of slot 0.
            dropped: Real keys before slot 0; ``None`` for ``offset`` in every row.
            aligned: Whether queries and keys have positions in common.

        Raises:
            ValueError: A mask of the wrong shape or type.
        """
        if mask.ndim != 4 or mask.shape[0] not in (1, batch):
            raise ValueError(
                f"attention_mask: expected ({batch} or 1, heads or 1, queries, keys), got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"attention_mask: a 4-D mask must be bool or additive floats, got {mask.dtype}")
        num_queries, num_keys = mask.shape[-2:]
        if first_query is None:
            first_query = num_keys - num_queries if aligned else 0
        whole = cls(
            batch, first_query, num_keys, device, causal=False, mask=mask.to(device),
            stop_query=first_query + num_queries, offset=offset, dropped=dropped, aligned=aligned,
        )  # fmt: skip
        # Taken from the whole mask, so that what is real does not depend on the heads and queries measured.
        seen, seen_by = whole._mask_counts
        return replace(whole, real=seen_by.amax(1) > 0, sees=seen > 0)

    def to(self, device: torch.device | str | int) -> Visibility:
        """The same, with its vectors on ``device``, which accelerate names in any of torch's ways."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved: dict[str, Any] = {name: getattr(self, name) for name in VECTORS}
        moved = {name: None if vector is None else vector.to(device) for name, vector in moved.items()}
        return replace(self, device=device, **moved)

    def measured(
        self, *, stride: int = 1, first: int = 0, stop: int | None = None, rows: Bool[Tensor, " batch"] | None = None
    ) -> Visibility:
        """The same, for some of the queries only.

        Args:
            stride: Measure the queries at multiples of it, counted by absolute position.
            first: Measure none before this absolute position [token].
            stop: Measure none from this absolute position on [token]; None for all.
            rows: Rows of the batch whose queries count; None for all.
        """
        begin = -(-max(self.first_query + self.offset, first) // stride) * stride - self.offset
        skipped, end = begin - self.first_query, None
        stop_query = self.stop_query
        if stop is not None:
            stop_query = stop - self.offset
            end = stop_query - self.first_query
        chosen = slice(skipped, end, stride)
        mask = None if self.mask is None else self.mask[:, :, chosen]
        sees, first_key, stop_key = (
            None if vector is None else vector[:, chosen] for vector in (self.sees, self.first_key, self.stop_key)
        )
        return replace(
            self, first_query=begin, stride=stride, mask=mask, rows=rows, sees=sees, first_key=first_key,
            stop_key=stop_key, stop_query=stop_query,
        )  # fmt: skip

    def of_heads(self, heads: Sequence[int]) -> Visibility:
        """The same, for some query heads only."""
        if self.mask is None or self.mask.shape[1] == 1:
            return self
        return replace(self, mask=self.mask[:, list(heads)])

    # Vectors that the statistics need, each computed once per forward.

    @Kept
    def real_keys(self) -> Bool[Tensor, "batch key"]:
        """Whether each key is a real token; behind a user's 4-D mask, whether some query sees it."""
        if self.real is not None:
            return self.real
        return torch.ones(self.batch, self.num_keys, dtype=torch.bool, device=self.device)

    @Kept
    def real_queries(self) -> Bool[Tensor, "batch query"]:
        """Whether each measured query is a real token that sees at least one real key."""
        limited = self.mask is not None or self.first_key is not None or self.stop_key is not None or not self.aligned
        # Where nothing else hides keys a real token sees itself.
        return self._own & (self._seen > 0) if limited and self.sees is None else self._own

    @Kept
    def _own(self) -> Bool[Tensor, "batch query"]:
        """Whether each measured query is a real token."""
        if self.sees is not None:
            real = self.sees
        elif self.aligned and self.real is not None:
            real = self.real_keys[:, self.query_slots]
        else:
            real = torch.ones(self.batch, self.num_queries, dtype=torch.bool, device=self.device)
        return real if self.rows is None else real & self.rows[:, None]

    @Kept
    def _seen(self) -> Int[Tensor, "batch query"]:
        """How many real keys each measured query sees, whether it is real or not; the most over heads."""
        return self._mask_counts[0] if self.mask is not None else _marked_between(self.real_keys, *self.key_spans)

    @Kept
    def rank(self) -> Int[Tensor, "batch key"]:
        """How many real keys of the same sequence come before each key, those that a cache has dropped among them."""
        before = self.real_keys.long().cumsum(-1) - self.real_keys.long()
        if self.offset or self.dropped is not None:
            before = before + (self.offset if self.dropped is None else self.dropped[:, None])
        if self.sequence is None:
            return before
        # What was dropped belongs to the first sequence.
        starts = torch.zeros_like(self.real_keys)
        starts[:, 1:] = self.sequence[:, 1:] != self.sequence[:, :-1]
        return before - torch.where(starts, before, 0).cummax(-1).values

    @Kept
    def query_spans(self) -> tuple[Int[Tensor, "batch key"], Int[Tensor, "batch key"]]:
        """First measured query that sees each key, and the first behind the last; both 0 for padding.

        Counted among the measured queries.
        """
        keys = torch.arange(self.num_keys, dtype=torch.int32, device=self.device).repeat(self.batch, 1)
        first_key, stop_key = self.key_spans
        first = torch.searchsorted(stop_key, keys, right=True, out_int32=True)
        stop = torch.searchsorted(first_key, keys, right=True, out_int32=True)
        return torch.where(self.real_keys, first, 0), torch.where(self.real_keys, stop, 0)

    @property
    def whole(self) -> bool:
        """Whether every query is measured, every token is real, and nothing but causality hides a key."""
        return self.plain and self.rows is None and self.stride == 1

    @Kept
    def visible_keys(self) -> Int[Tensor, "batch query"]:
        """How many real keys each measured query sees; 0 for padding."""
        if self.whole and self.causal:
            # Every step of decoding counts anew, and each operation of torch takes longer there than what it does.
            first, stop = self.first_query + 1, self.num_keys + 1
            if stop - first == 1:
                return torch.full((self.batch, 1), first, dtype=torch.int32, device=self.device)
            seen = torch.arange(first, stop, dtype=torch.int32, device=self.device)
            return seen.expand(self.batch, -1).contiguous()
        return torch.where(self.real_queries, self._seen, 0).int()

    @Kept
    def visible_queries_per_head(self) -> Int[Tensor, "batch _ key"]:
        """How many measured real queries may see each key; one head unless the user's mask differs by head."""
        if self.mask is not None:
            return self._mask_counts[1].int()
        if self.whole and self.causal:
            shape, count = (self.batch, 1, self.num_keys), self.num_queries
            seen = torch.full(shape, count, dtype=torch.int32, device=self.device)
            if count > 1:
                seen[..., self.first_query :] = torch.arange(count, 0, -1, dtype=torch.int32, device=self.device)
            return seen
        return _marked_between(self.real_queries, *self.query_spans).int()[:, None]

    @Kept
    def visible_queries(self) -> Int[Tensor, "batch key"]:
        """How many measured real queries may see each key; the largest over heads; 0 for padding."""
        return self.visible_queries_per_head.amax(1)

    @Kept
    def _mask_counts(self) -> tuple[Int[Tensor, "batch query"], Int[Tensor, "batch _ key"]]:
        """Keys seen by each query, most over heads, and real queries that see each key, per head of the mask."""
        heads = 1 if self.mask is None else self.mask.shape[1]
        keys = torch.zeros(self.batch, self.num_queries, dtype=torch.long, device=self.device)
        queries = torch.zeros(self.batch, heads, self.num_keys, dtype=torch.long, device=self.device)
        for start in range(0, self.num_queries, 256):
            rows = range(start, min(start + 256, self.num_queries))
            part, (first, stop) = slice(rows.start, rows.stop), self.span_of(rows)
            seen = self.visible(rows).expand(self.batch, heads, -1, -1)
            keys[:, part] = seen.sum(-1).amax(1)
            queries[..., first:stop] += (seen & self._own[:, None, part, None]).sum(-2)
        return keys, queries


def _marked_between(
    marks: Bool[Tensor, "batch place"], first: Int[Tensor, "batch span"], stop: Int[Tensor, "batch span"]
) -> Int[Tensor, "batch span"]:
    """How many marks lie at places from ``first`` to before ``stop``."""
    before = torch.nn.functional.pad(marks.long().cumsum(-1), (1, 0))
    return before.gather(1, stop.long()) - before.gather(1, first.long())
