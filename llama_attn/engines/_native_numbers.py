"""Where the native engine writes what it measures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from weakref import ref

import torch

from llama_attn.engines._library import OFFSETS, Call, point
from llama_attn.stats.extents import Extents
from llama_attn.stats.records import Layout, Raw, Tables
from llama_attn.stats.table import Statistic

# Names are also those of the fields of the C++ call.
PER_QUERY = frozenset(
    {
        "entropy", "logsumexp", "max_logit", "max_weight", "effective_keys", "sink_mass", "local_mass", "mean_distance",
        "learned_sink_mass", "kept_mass",
    }
)  # fmt: skip
RECEIVED = frozenset({"received", "received_total"})
BINNED = ("weight_count", "weight_mass")


class Numbers:
    """Where the statistics of a call and of those like it go: a row of two tables for each layer, while they are few.

    Args:
        call: Is told of what it writes.
        layout: Where each statistic lies in a row.
        dtype: Of the numbers.
        layers: How many layers there will be.
    """

    def __init__(self, call: Call, layout: Layout, dtype: torch.dtype, layers: int) -> None:
        self._layout, self._dtype = layout, dtype
        written = {"rows": (0, 0, (len(layout.names), *layout.shape))} if layout.names else {}
        for name, (begin, shape) in layout.others.items():
            written["received" if name in RECEIVED else name] = 1, begin, shape
        for name, (_, _, shape) in written.items():
            call.put(name, torch.empty(shape, dtype=dtype))
        # What is empty has no address, and gets none.
        self._written = [
            (OFFSETS[name], which, begin) for name, (which, begin, shape) in written.items() if 0 not in shape
        ]
        self._rows, self._next = layers if layout.is_small else 1, itertools.count()
        # Alive as long as somebody holds a row: who keeps a visibility does not keep them.
        self._shared: Callable[[], Tables | None] = _nothing
        self._places: list[tuple[int, int, int]] = []

    def of_next(self, call: Call) -> Raw:
        """Where the numbers of the next layer will be; ``call`` is told."""
        row, tables, places = next(self._next), self._shared(), self._places
        if tables is None or row >= self._rows:
            tables = Tables(*(torch.empty(1 if row else self._rows, n, dtype=self._dtype) for n in self._layout.widths))
            places = [self._place(tables, *written) for written in self._written]
            if not row:
                self._shared, self._places = ref(tables), places
            row = 0
        for at, first, step in places:
            point(call, at, first + row * step)
        return Raw(tables, row, self._layout)

    @staticmethod
    def _place(tables: Tables, at: int, which: int, begin: int) -> tuple[int, int, int]:
        """Which field of a call says where some numbers are, where these are in row 0, and from one row to the next [byte]."""
        table = tables.both[which]
        size = table.element_size()
        return at, table.data_ptr() + begin * size, table.stride(0) * size


def _nothing() -> None:
    return None


def laid_out(statistics: Sequence[Statistic], extents: Extents) -> Layout:
    """Where statistics lie that have such axes."""
    others: dict[str, tuple[int, tuple[int, ...]]] = {}
    begin, received = 0, None
    for statistic in statistics:
        name = statistic.name
        if name in RECEIVED and received is not None:
            others[name] = received
        elif name not in PER_QUERY:
            others[name] = begin, (shape := extents.shape(statistic))
            begin += math.prod(shape)
        if name in RECEIVED:
            received = others[name]
    per_query = tuple(statistic.name for statistic in statistics if statistic.name in PER_QUERY)
    return Layout(per_query, (extents.batch, extents.heads, extents.queries), others)
