"""Who may see whom, as a run of keys for every query: read by the engines, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# A weight of exp(-1e4) is zero in every dtype, so a key behind such an additive mask is not seen.
UNSEEN_BIAS = -1e4
T = TypeVar("T")


class Kept(Generic[T]):
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
class Spans:
    """Which keys every query of one call may see.

    Keys are counted by *slot*, 0 … ``num_keys`` − 1, and queries by the slot of their own key; slot s is the absolute
    position ``offset`` + s. Query i sees key j if j is real, both lie in the same packed sequence, j ≤ i unless
    attention is bidirectional, j lies in the span of i, and the mask does not forbid it.

    Args:
        batch: Number of rows.
        first_query: Slot of the first measured query [token].
        num_keys: Number of keys, filled cache slots and this call's tokens.
        device: Where the vectors live.
        causal: Whether a query sees no later key.
        real: Whether a key is a real token, (batch, key); ``None`` if all are.
        sequence: Index of the packed sequence of every key, ascending, (batch, key); ``None`` if there is one.
        mask: A 4-D mask, (1 or batch, 1 or head, query, key): bool (True = seen) or additive.
        rows: Rows of the batch whose queries count as real; None for all.
        sees: Whether each query sees any key through the whole of the mask.
        stride: Distance of the measured queries [token].
        stop_query: Slot behind the last query of the call; ``None`` if they end with the last key.
        first_key: Slot of the first key in the span of each measured query, such as a window or a chunk,
            (1 or batch, query), not decreasing along the queries; ``None`` if none is limited so.
        stop_key: Slot behind the last one, likewise.
        offset: Absolute position of slot 0 [token]; above 0 if a cache has dropped keys.
        dropped: Real keys before slot 0, (batch); ``None`` for ``offset`` in every row.
        aligned: False if queries and keys have no positions in common, as in cross-attention: no query has a key of
            its own, and distances mean nothing.

    Raises:
        ValueError: Vectors or extents that do not fit one another.
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
    stop_query: int | None = None
    first_key: Int[Tensor, "_ query"] | None = None
    stop_key: Int[Tensor, "_ query"] | None = None
    offset: int = 0
    dropped: Int[Tensor, " batch"] | None = None
    aligned: bool = True

    def __post_init__(self) -> None:
        # A compiled graph does not know every extent.
        if not torch.compiler.is_compiling():
            check_extents(self)

    @property
    def length(self) -> int:
        """Tokens that bins of maps and of distances are laid out for: all that slots stand for, from position 0 on."""
        return self.offset + (self.num_keys if self.aligned else max(self.num_keys, self._stop))

    @property
    def _stop(self) -> int:
        """Slot behind the last query of the call."""
        return self.num_keys if self.stop_query is None else self.stop_query

    @property
    def num_queries(self) -> int:
        """Number of measured queries."""
        return max(0, -(-(self._stop - self.first_query) // self.stride))

    @property
    def queries(self) -> range:
        """Slots of the measured queries [token]."""
        return range(self.first_query, max(self.first_query, self._stop), self.stride)

    @property
    def plain(self) -> bool:
        """Whether nothing but causality hides a key and no key is missing: all that there are, from position 0 on."""
        hides = self.real is self.sequence is self.mask is self.sees is self.first_key is self.stop_key is None
        return hides and self.stop_query in (None, self.num_keys) and self.offset == 0 and self.dropped is None

    @property
    def has_spans(self) -> bool:
        """Whether more than causality bounds the keys of a query: packing, a window or a chunk."""
        return not (self.sequence is self.first_key is self.stop_key is None)

    @Kept
    def query_slots(self) -> Int[Tensor, " query"]:
        """Slots of the measured queries."""
        places = torch.arange(self.num_queries, device=self.device)
        return self.first_query + (places if self.stride == 1 else self.stride * places)

    def span_of(self, rows: range) -> tuple[int, int]:
        """The smallest run of keys that holds all that the query rows ``rows`` could see: its first, and behind it.

        One key, which is hidden, where they could see none.
        """
        first, _, _, stop = self._edges_of(rows)
        return first, stop

    @Kept
    def widest_span(self) -> int:
        """Most keys that one measured query could see, in any row of the batch."""
        if not self.has_spans:
            return self.num_keys
        return max((stop - first for first, _, _, stop in zip(*self._edges, strict=True)), default=0)

    def _edges_of(self, rows: range) -> tuple[int, int, int, int]:
        """The smallest and the largest first key of ``rows``, and the smallest and the largest stop."""
        if self.has_spans and torch.compiler.is_compiling():
            # A graph that is being compiled cannot look at values.
            return 0, self.num_keys, 0, self.num_keys
        if self.has_spans:
            first, last_first, first_stop, stop = self._edges
            begin, end = first[rows[0]], stop[rows[-1]]
            if begin == end:
                begin, end = min(begin, self.num_keys - 1), min(begin, self.num_keys - 1) + 1
            return begin, last_first[rows[-1]], first_stop[rows[0]], end
        if self.causal:
            return 0, 0, self.queries[rows[0]] + 1, self.queries[rows[-1]] + 1
        return 0, 0, self.num_keys, self.num_keys

    def hidden(self, rows: range) -> Iterator[tuple[Bool[Tensor, "_ _ row key"], int]]:
        """The parts of "may not see" for ``rows``: a mask that broadcasts over heads, and the slot of its first key.

        They lie within the span of ``rows``. None is wider than what it forbids, so plain causal input only has the
        triangle of the block itself.
        """
        first, last_first, first_stop, stop = self._edges_of(rows)
        part = slice(rows.start, rows.stop)
        if first < last_first:
            keys = torch.arange(first, last_first, device=self.device)
            yield (keys < self._spans[0][:, None, part, None]), first
        if first_stop < stop:
            keys = torch.arange(first_stop, stop, device=self.device)
            stops = self._spans[1][:, None, part, None] if self.has_spans else self.query_slots[part, None] + 1
            yield (keys >= stops).view(-1, 1, len(rows), len(keys)), first_stop
        if self.real is not None:
            yield ~self.real[:, None, None, first:stop], first
        if self.mask is not None:
            mask = self.mask[:, :, part, first:stop]
            yield (~mask if mask.dtype == torch.bool else mask <= UNSEEN_BIAS), first

    def bias(self, rows: range) -> Float[Tensor, "_ _ row key"] | None:
        """What an additive mask adds to the scores of ``rows``, for the keys of their span."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return None
        first, stop = self.span_of(rows)
        return self.mask[:, :, rows.start : rows.stop, first:stop]

    def visible(self, rows: range) -> Bool[Tensor, "_ _ row key"]:
        """Which keys of their span the query rows ``rows`` see; broadcasts over batch and heads."""
        start, stop = self.span_of(rows)
        visible = torch.ones(1, 1, len(rows), stop - start, dtype=torch.bool, device=self.device)
        for hidden, first in self.hidden(rows):
            columns = slice(first - start, first - start + hidden.shape[-1])
            shape = torch.broadcast_shapes(visible[..., columns].shape, hidden.shape)
            visible = visible.expand(*shape[:3], -1).clone()
            visible[..., columns] &= ~hidden
        return visible

    @Kept
    def _spans(self) -> tuple[Int[Tensor, "_ query"], Int[Tensor, "_ query"]]:
        """The span of each measured query, in one row if it is the same in all rows of the batch."""
        positions = self.query_slots[None]
        first, stop = torch.zeros_like(positions), torch.full_like(positions, self.num_keys)
        if self.sequence is not None:
            sequence = self.sequence.contiguous()
            own = sequence.gather(1, positions.expand(self.batch, -1))
            first, stop = torch.searchsorted(sequence, own), torch.searchsorted(sequence, own, right=True)
        if self.causal:
            stop = torch.minimum(stop, positions + 1)
        if self.first_key is not None:
            first = torch.maximum(first, self.first_key)
        if self.stop_key is not None:
            stop = torch.minimum(stop, self.stop_key).clamp(min=0)
        return torch.minimum(first, stop), stop

    @Kept
    def _edges(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Least and largest first key of each query over the batch, and least and largest stop: numbers to cut with."""
        first, stop = self._spans
        edges: list[list[int]] = torch.stack([first.amin(0), first.amax(0), stop.amin(0), stop.amax(0)]).tolist()
        return edges[0], edges[1], edges[2], edges[3]

    @property
    def key_spans(self) -> tuple[Int[Tensor, "batch query"], Int[Tensor, "batch query"]]:
        """First key of each measured query, and the first behind its last: between them it sees all that are real.

        A mask is not a span, and is not looked at.
        """
        return self._key_spans

    @Kept
    def _key_spans(self) -> tuple[Int[Tensor, "batch query"], Int[Tensor, "batch query"]]:
        first, stop = (span.expand(self.batch, -1).int().contiguous() for span in self._spans)
        return first, stop


VECTORS = ("real", "sequence", "mask", "rows", "sees", "first_key", "stop_key", "dropped")


def check_extents(spans: Spans) -> None:
    """Whether the vectors of ``spans`` have the types and extents that they must have.

    Raises:
        ValueError: The message names the one that has not.
    """
    keys, batch = spans.num_keys, spans.batch
    if min(batch, spans.first_query, keys, spans.offset) < 0 or spans.stride < 1:
        raise ValueError(
            "batch, first_query, num_keys, offset, stride: expected none below 0 and a stride from 1 up, got "
            f"{(batch, spans.first_query, keys, spans.offset, spans.stride)}"
        )
    if not spans.aligned and (spans.causal or spans.sequence is not None):
        raise ValueError("aligned: queries without positions can be neither causal nor packed")
    if spans.aligned and spans.stop_query is not None and spans.stop_query > keys:
        raise ValueError(f"stop_query: expected no more than num_keys={keys}, got {spans.stop_query}")
    queries = spans.num_queries
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "real": ((batch, keys),),
        "sequence": ((batch, keys),),
        "rows": ((batch,),),
        "sees": ((batch, queries),),
        "first_key": ((1, queries), (batch, queries)),
        "stop_key": ((1, queries), (batch, queries)),
        "dropped": ((batch,),),
    }
    for name, expected in shapes.items():
        vector = getattr(spans, name)
        if vector is None:
            continue
        if tuple(vector.shape) not in expected:
            raise ValueError(f"{name}: expected shape {' or '.join(map(str, expected))}, got {tuple(vector.shape)}")
        flags = name in ("real", "rows", "sees")
        if flags != (vector.dtype == torch.bool) or vector.is_floating_point():
            raise ValueError(f"{name}: expected {'bool' if flags else 'integers'}, got {vector.dtype}")
    mask = spans.mask
    if mask is not None and (mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (queries, keys)):
        raise ValueError(f"mask: expected (1 or {batch}, heads, {queries}, {keys}), got {tuple(mask.shape)}")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask: expected bool or additive floats, got {mask.dtype}")
