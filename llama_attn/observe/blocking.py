"""Hide keys from attention, before the call is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from llama_attn.backends._rules import AttentionCall
from llama_attn.backends.registry import Backend, rule_of
from llama_attn.observe.forward import Stack
from llama_attn.observe.intervening import Intervening
from llama_attn.observe.kept_keys import KeptKeys
from llama_attn.stats.parallel import HeadShard
from llama_attn.stats.visibility import Visibility

# Queries that are looked at together.
ROWS = 256
SHOWN = 8


class Blocking(Intervening):
    """What `block_keys` gives: in its ``with`` block the tokens are hidden, behind it they are seen as before."""

    name = "block_keys"

    def __init__(self, module: nn.Module, keys: Any, first_query: int | None, stack: str | None) -> None:
        super().__init__(module, stack)
        if first_query is not None and (type(first_query) is not int or first_query < 0):
            raise ValueError(f"first_query: expected None or a position from 0 up, got {first_query!r}")
        self._keys, self._first_query = KeptKeys.of(keys), first_query
        if first_query is None and (row := self._keys.row_without_any()) is not None:
            raise ValueError(
                f"keys: expected a mask that leaves every row some keys, got none in row {row}; with first_query every "
                "later token still sees itself"
            )
        # Masks of the forward that runs, by what they were made of.
        self._made: list[tuple[Visibility, Any, tuple[Visibility, Any]]] = []
        self.refuse_early()

    def check(self, stack: Stack) -> None:
        """Refuse a mask of other layers.

        Raises:
            ValueError: It has more layers than there are, or fewer without saying which.
        """
        self._keys.check(stack.num_layers, len(stack.layers) == 1)

    def _new_forward(self) -> None:
        super()._new_forward()
        self._made.clear()

    def __enter__(self) -> Self:
        # Whether a call had any of the keys, which its device knows; True where nobody can look, as in a compiled graph.
        self._hides: bool | Tensor = False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._made.clear()
        super().__exit__(*error)

    def _check_that_it_ran(self) -> None:
        super()._check_that_it_ran()
        if self._keys.hide_some and not bool(self._hides):
            behind = "" if self._first_query is None else f", or no query at {self._first_query} or behind it"
            raise ValueError(
                f"block_keys: nothing was hidden, as no call had keys at the positions that were asked for{behind}"
            )

    def change_call(self, call: AttentionCall, name: str, layer: int) -> AttentionCall:
        """The call with fewer keys to see; the same call where none is blocked.

        Raises:
            ValueError: A query would see nothing, the mask is of other rows or heads, or the backend takes no mask.
        """
        sight, backend = self.sight(call, name), rule_of(name)
        same = self._keys.layers is None and not torch.compiler.is_compiling()
        for known, mask, (blocked, made) in self._made if same else ():
            if known is sight and mask is call.mask:
                return replace(call, sight=blocked, mask=made)
        kept = self._kept(call, sight, layer)
        if torch.compiler.is_compiling():
            self._hides = True
        if kept is None:
            return call
        if self._hides is not True:
            self._hides = ~kept.all() | self._hides
        blocked = _without(sight, kept)
        if self._first_query is None or not sight.aligned:
            _check_that_all_see(sight, blocked, layer)
        made = call.mask if backend.is_streaming else _matrix(call, backend, name, blocked, kept)
        if same:
            self._made.append((sight, call.mask, (blocked, made)))
        return replace(call, sight=blocked, mask=made)

    def _kept(self, call: AttentionCall, sight: Visibility, layer: int) -> Bool[Tensor, "_ _ _ key"] | None:
        """Which keys the queries may still see, with 1 for axes that do not matter; None if all.

        Raises:
            ValueError: The mask is of other rows or heads, or asks for positions that queries do not have.
        """
        if not sight.aligned and (self._first_query is not None or "query" in self._keys.axes):
            raise ValueError(
                "block_keys: the queries of this call have no positions among its keys (cross-attention); expected keys "
                "without first_query and without an axis of queries"
            )
        queries = sight.offset + sight.query_slots
        first = self._first_query
        # Numbers, so that nothing waits for a device.
        if first is not None and sight.offset + sight.queries.stop <= first:
            return None
        keys = sight.offset + torch.arange(sight.num_keys, device=sight.device)
        shard = HeadShard.of_attention(call.module)
        part = (0, 1) if shard is None else (shard.rank, shard.size)
        shape = call.query.shape[0], call.query.shape[1], call.key.shape[1]
        kept = self._keys.seen(layer, queries, keys, shape, part)
        if kept is None or first is None:
            return kept
        own = keys == queries[:, None]
        return kept | own | (queries < first)[:, None]


def _without(sight: Visibility, kept: Tensor) -> Visibility:
    """The same, without the keys that are blocked."""
    mask = kept.expand(-1, -1, sight.num_queries, -1)
    if sight.mask is not None:
        mask = _joined(sight.mask, mask)
    return replace(sight, mask=mask)


def _joined(mask: Tensor, kept: Tensor) -> Tensor:
    """A mask, bool or added to the scores, that hides what is not kept as well."""
    return mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, torch.finfo(mask.dtype).min)


def _matrix(call: AttentionCall, backend: Backend, name: str, blocked: Visibility, kept: Tensor) -> Tensor:
    """The 4-D mask that an attention function is given, of the kind that it reads.

    Raises:
        ValueError: It reads none.
    """
    is_matrix = isinstance(call.mask, Tensor) and call.mask.ndim == 4
    if not is_matrix and (call.mask is not None or not {"sdpa", "eager"} & set(backend.accepts_masks_of)):
        raise ValueError(
            f"block_keys: expected an attention implementation that takes a 4-D mask, got {name!r}, which reads masks of "
            'another kind; use "sdpa", "eager" or "streaming"'
        )
    empty = call.num_slots - blocked.num_keys
    if is_matrix:
        # What it says of slots that are not filled stays.
        return _joined(call.mask, torch.nn.functional.pad(kept, (0, empty), value=True))
    rows = range(blocked.num_queries)
    first, stop = blocked.span_of(rows)
    seen = torch.nn.functional.pad(blocked.visible(rows), (first, call.num_slots - stop), value=False)
    if backend.name != "eager":
        return seen
    lowest = torch.finfo(call.query.dtype).min
    return torch.zeros(seen.shape, dtype=call.query.dtype, device=seen.device).masked_fill(~seen, lowest)


def _check_that_all_see(sight: Visibility, blocked: Visibility, layer: int) -> None:
    """Refuse to leave a query nothing that saw something.

    Raises:
        ValueError: It names the query, and the keys that it saw.
    """
    for start in range(0, sight.num_queries, ROWS):
        rows = range(start, min(start + ROWS, sight.num_queries))
        before, after = sight.visible(rows), blocked.visible(rows)
        lost = before.any(-1) & ~after.any(-1) & sight.real_queries[:, None, rows.start : rows.stop]
        if not bool(lost.any()):
            continue
        row, head, query = (int(index) for index in lost.nonzero()[0])
        first, _ = sight.span_of(rows)
        every = before.expand(sight.batch, lost.shape[1], -1, -1)[row, head, query].nonzero()[:, 0]
        keys = (every + first + sight.offset).tolist()
        named = ", ".join(map(str, keys[:SHOWN])) + (", …" if len(keys) > SHOWN else "")
        position = sight.offset + sight.queries[rows.start + query]
        raise ValueError(
            f"keys: expected every query to be left a key, got none for query {position} of row {row} in layer {layer}; "
            f"without blocking it sees the keys {named}: leave it one, or give first_query, from which on each token "
            "still sees itself"
        )
