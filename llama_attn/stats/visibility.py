"""Who may see whom, in memory that grows with T.

Built once per forward and shared by all layers. Padding, packing and a cache are described by vectors; only a 4-D
mask that the user made himself is kept as the (queries × keys) tensor it already was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# A weight of exp(-1e4) is zero in every dtype, so a key behind such an additive mask is not seen.
UNSEEN_BIAS = -1e4
T = TypeVar("T")


class _Kept(Generic[T]):
    """A property that is computed once; without the lock of Python 3.11's own, which torch.compile cannot trace."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> T:
        if instance is None:
            return self  # type: ignore[return-value]
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys every query of one forward may see.

    Query i (its absolute position in the row, i.e. cache included) sees key j if j is real, both lie in the same
    packed sequence, j ≤ i unless attention is bidirectional, and the user's own mask does not forbid it.

    Args:
        batch: Number of rows.
        first_query: Position of the first measured query [token]; they end with the last key.
        num_keys: Number of keys, filled cache slots and this call's tokens.
        device: Where the vectors live.
        causal: Whether a query sees no later key.
        real: Whether a key is a real token, (batch, key); ``None`` if all are.
        sequence: Index of the packed sequence of every key, ascending, (batch, key); ``None`` if there is one.
        mask: The user's 4-D mask, (1 or batch, 1 or head, query, key): bool (True = seen) or additive.
        rows: Rows of the batch whose queries count as real; None for all.
        sees: Whether each query sees any key through the whole of the user's mask.
        stride: Distance of the measured queries [token].
    """

    batch: int
    first_query: int
    num_keys: int
    device: torch.device
    causal: bool = True
    real: Bool[Tensor, "batch key"] | None = None
    sequence: Int[Tensor, "batch key"] | None = None
    mask: Shaped[Tensor, "_ _ query key"] | None = None
    rows: Bool[Tensor, " batch"] | None = None
    sees: Bool[Tensor, "batch query"] | None = None
    stride: int = 1

    @classmethod
    def of_inputs(
        cls,
        *,
        batch: int,
        num_queries: int,
        offset: int,
        device: torch.device,
        attention_mask: Tensor | None = None,
        sequence: Int[Tensor, "batch key"] | None = None,
        causal: bool = True,
        static: bool = False,
    ) -> Visibility:
        """Describe one forward.

        Args:
            batch: Number of rows.
            num_queries: Tokens fed in this call.
            offset: Tokens already in the cache.
            device: Where to keep the vectors.
            attention_mask: (batch, offset + num_queries), non-zero for real tokens, or the user's 4-D mask.
            sequence: Packed sequence of every token, if the backend honours packing in this call.
            causal: False for ``is_causal=False``.
            static: Whether keys lie in a static cache, whose mask may be longer or shorter than its filled part.

        Raises:
            ValueError: A mask of the wrong shape.
        """
        num_keys = offset + num_queries
        if attention_mask is None:
            return cls(batch, offset, num_keys, device, causal, sequence=sequence)
        if attention_mask.ndim == 4:
            mask = attention_mask[..., :num_keys] if static else attention_mask
            if mask.shape[0] not in (1, batch) or mask.shape[-2:] != (num_queries, num_keys):
                raise ValueError(
                    f"attention_mask: expected (batch={batch}, heads or 1, queries={num_queries}, keys={num_keys}), "
                    f"got {tuple(attention_mask.shape)}"
                )
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(f"attention_mask: a 4-D mask must be bool or additive floats, got {mask.dtype}")
            whole = cls(batch, offset, num_keys, device, causal=False, mask=mask.to(device))
            # Taken from the whole mask, so that what is real does not depend on the heads and queries measured.
            seen, seen_by = whole._mask_counts
            return replace(whole, real=seen_by.amax(1) > 0, sees=seen > 0)
        too_short = attention_mask.shape[-1] < num_keys and not static
        too_long = attention_mask.shape[-1] > num_keys and not static
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or too_short or too_long:
            raise ValueError(
                f"attention_mask: expected (batch={batch}, keys={num_keys}), got {tuple(attention_mask.shape)}"
            )
        real = attention_mask[:, :num_keys].to(device=device, dtype=torch.bool)
        if real.shape[1] < num_keys:
            real = torch.nn.functional.pad(real, (0, num_keys - real.shape[1]))
        # A compiled graph does not look at values.
        all_real = not torch.compiler.is_compiling() and bool(real.all())
        return cls(batch, offset, num_keys, device, causal, real=None if all_real else real)

    def to(self, device: torch.device | str | int) -> Visibility:
        """The same, with its vectors on ``device``, which accelerate names in any of torch's ways."""
        device = torch.device(device)
        if device == self.device:
            return self
        names = ("real", "sequence", "mask", "rows", "sees")
        real, sequence, mask, rows, sees = (_to(getattr(self, name), device) for name in names)
        return replace(self, device=device, real=real, sequence=sequence, mask=mask, rows=rows, sees=sees)

    def measured(self, *, stride: int = 1, first: int = 0, rows: Bool[Tensor, " batch"] | None = None) -> Visibility:
        """The same, for some of the queries only.

        Args:
            stride: Measure the queries at multiples of it.
            first: Measure none before this position [token].
            rows: Rows of the batch whose queries count; None for all.
        """
        begin = -(-max(self.first_query, first) // stride) * stride
        mask = None if self.mask is None else self.mask[:, :, begin - self.first_query :: stride]
        sees = None if self.sees is None else self.sees[:, begin - self.first_query :: stride]
        return replace(self, first_query=begin, stride=stride, mask=mask, rows=rows, sees=sees)

    def of_heads(self, heads: Sequence[int]) -> Visibility:
        """The same, for some query heads only."""
        if self.mask is None or self.mask.shape[1] == 1:
            return self
        return replace(self, mask=self.mask[:, list(heads)])

    @property
    def num_queries(self) -> int:
        """Number of measured queries."""
        return max(0, -(-(self.num_keys - self.first_query) // self.stride))

    @property
    def queries(self) -> range:
        """Absolute positions of the measured queries [token]."""
        return range(self.first_query, max(self.first_query, self.num_keys), self.stride)

    @property
    def plain(self) -> bool:
        """Whether nothing but causality hides a key: no padding, no packing, no mask of the user's own."""
        return self.real is self.sequence is self.mask is None

    @_Kept
    def query_positions(self) -> Int[Tensor, " query"]:
        """Absolute positions of the measured queries [token]."""
        return self.first_query + self.stride * torch.arange(self.num_queries, device=self.device)

    def num_keys_of(self, rows: range) -> int:
        """How many keys, from the first on, the query rows ``rows`` could see."""
        return self.queries[rows[-1]] + 1 if self.causal else self.num_keys

    def hidden(self, rows: range) -> Iterator[tuple[Bool[Tensor, "_ _ row key"], int]]:
        """The parts of "may not see" for ``rows``: a mask that broadcasts over heads, and its first key.

        No part is wider than what it forbids, so plain causal input only has the triangle of the block itself.
        """
        width = self.num_keys_of(rows)
        if self.causal and (first := self.queries[rows[0]] + 1) < width:
            keys = torch.arange(first, width, device=self.device)
            positions = self.query_positions[rows.start : rows.stop]
            yield (keys > positions[:, None])[None, None], first
        if self.real is not None:
            yield ~self.real[:, None, None, :width], 0
        if self.sequence is not None:
            own = self.sequence[:, self.query_positions[rows.start : rows.stop]]
            yield (self.sequence[:, None, None, :width] != own[:, None, :, None]), 0
        if self.mask is not None:
            mask = self.mask[:, :, rows.start : rows.stop]
            yield (~mask if mask.dtype == torch.bool else mask <= UNSEEN_BIAS), 0

    def bias(self, rows: range) -> Float[Tensor, "_ _ row key"] | None:
        """What the user's own additive mask adds to the scores of ``rows``."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return None
        return self.mask[:, :, rows.start : rows.stop]

    def visible(self, rows: range) -> Bool[Tensor, "_ _ row key"]:
        """Which keys, from the first on, the query rows ``rows`` see; broadcasts over batch and heads."""
        visible = torch.ones(1, 1, len(rows), self.num_keys_of(rows), dtype=torch.bool, device=self.device)
        for hidden, first in self.hidden(rows):
            shape = torch.broadcast_shapes(visible[..., first:].shape, hidden.shape)
            visible = visible.expand(*shape[:3], -1).clone()
            visible[..., first:] &= ~hidden
        return visible

    # Vectors that the statistics need, each computed once per forward.

    @_Kept
    def real_keys(self) -> Bool[Tensor, "batch key"]:
        """Whether each key is a real token; behind a user's 4-D mask, whether some query sees it."""
        if self.real is not None:
            return self.real
        return torch.ones(self.batch, self.num_keys, dtype=torch.bool, device=self.device)

    @_Kept
    def real_queries(self) -> Bool[Tensor, "batch query"]:
        """Whether each measured query is a real token that sees at least one real key."""
        real = self.real_keys[:, self.query_positions] if self.sees is None else self.sees
        return real if self.rows is None else real & self.rows[:, None]

    @_Kept
    def rank(self) -> Int[Tensor, "batch key"]:
        """How many real keys of the same sequence come before each key."""
        before = self.real_keys.long().cumsum(-1) - self.real_keys.long()
        if self.sequence is None:
            return before
        starts = torch.ones_like(self.real_keys)
        starts[:, 1:] = self.sequence[:, 1:] != self.sequence[:, :-1]
        return before - torch.where(starts, before, 0).cummax(-1).values

    @_Kept
    def key_spans(self) -> tuple[Int[Tensor, "batch query"], Int[Tensor, "batch query"]]:
        """First key of each measured query, and the first behind its last: between them it sees all that are real.

        A user's mask is not a span, and is not looked at.
        """
        positions = self.query_positions.expand(self.batch, -1).contiguous()
        if self.sequence is None:
            first, stop = torch.zeros_like(positions), torch.full_like(positions, self.num_keys)
        else:
            sequence = self.sequence.contiguous()
            own = sequence.gather(1, positions)
            first, stop = torch.searchsorted(sequence, own), torch.searchsorted(sequence, own, right=True)
        return first.int(), (positions + 1 if self.causal else stop).int()

    @_Kept
    def query_spans(self) -> tuple[Int[Tensor, "batch key"], Int[Tensor, "batch key"]]:
        """First measured query that sees each key, and the first behind the last; both 0 for padding.

        Counted among the measured queries.
        """
        keys = torch.arange(self.num_keys, dtype=torch.int32, device=self.device).repeat(self.batch, 1)
        first_key, stop_key = self.key_spans
        first = torch.searchsorted(stop_key, keys, right=True, out_int32=True)
        stop = torch.searchsorted(first_key, keys, right=True, out_int32=True)
        return torch.where(self.real_keys, first, 0), torch.where(self.real_keys, stop, 0)

    @_Kept
    def visible_keys(self) -> Int[Tensor, "batch query"]:
        """How many real keys each measured query sees; 0 for padding."""
        seen = self._mask_counts[0] if self.mask is not None else _marked_between(self.real_keys, *self.key_spans)
        return torch.where(self.real_queries, seen, 0).int()

    @_Kept
    def visible_queries_per_head(self) -> Int[Tensor, "batch _ key"]:
        """How many measured real queries may see each key; one head unless the user's mask differs by head."""
        if self.mask is not None:
            return self._mask_counts[1].int()
        return _marked_between(self.real_queries, *self.query_spans).int()[:, None]

    @_Kept
    def visible_queries(self) -> Int[Tensor, "batch key"]:
        """How many measured real queries may see each key; the largest over heads; 0 for padding."""
        return self.visible_queries_per_head.amax(1)

    @_Kept
    def _mask_counts(self) -> tuple[Int[Tensor, "batch query"], Int[Tensor, "batch _ key"]]:
        """Keys seen by each query, most over heads, and queries that see each key, per head of the user's mask."""
        heads = 1 if self.mask is None else self.mask.shape[1]
        keys = torch.zeros(self.batch, self.num_queries, dtype=torch.long, device=self.device)
        queries = torch.zeros(self.batch, heads, self.num_keys, dtype=torch.long, device=self.device)
        for start in range(0, self.num_queries, 256):
            rows = slice(start, min(start + 256, self.num_queries))
            seen = self.visible(range(rows.start, rows.stop)).expand(-1, heads, -1, -1)
            keys[:, rows] = seen.sum(-1).amax(1)
            queries += seen.sum(-2)
        return keys, queries


def _marked_between(
    marks: Bool[Tensor, "batch place"], first: Int[Tensor, "batch span"], stop: Int[Tensor, "batch span"]
) -> Int[Tensor, "batch span"]:
    """How many marks lie at places from ``first`` to before ``stop``."""
    before = torch.nn.functional.pad(marks.long().cumsum(-1), (1, 0))
    return before.gather(1, stop.long()) - before.gather(1, first.long())


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
