"""Some layers, heads, rows and queries of a run: what of its statistics holds for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llama_attn.stats.integers import as_integer
from llama_attn.stats.labels import SEGMENT_LABELS
from llama_attn.stats.runs import runs_of, sum_of_runs
from llama_attn.stats.table import statistics_table

if TYPE_CHECKING:
    from llama_attn.stats.container import AttentionStats

Chosen = Sequence[int] | int | None


def part_of(
    stats: AttentionStats, layers: Chosen, heads: Chosen, batch: Chosen, queries: Chosen | slice
) -> AttentionStats:
    """What `AttentionStats.select` returns, with its arguments and errors."""
    chosen_layers, at_layer = _positions("layers", layers, stats.layers)
    chosen_heads, at_head = _positions("heads", heads, stats.heads)
    chosen_rows, at_row = _positions("batch", batch, range(stats.batch))
    if isinstance(queries, slice):
        queries = _inside(queries, stats.queries)
    chosen_queries, at_query = _positions("queries", queries, stats.queries)
    if queries is not None:
        # As in the row, each once.
        at_query = sorted(set(at_query))
    if at_query != list(range(len(stats.queries))):
        chosen_queries = tuple(stats.queries[at] for at in at_query)
        stats = _of_queries(stats, chosen_queries, at_query)
    index = {"layer": at_layer, "hidden_layer": [*at_layer, len(stats.layers)], "head": at_head, "batch": at_row}
    values = {name: _indexed(tensor, stats.labels[name].dims, index) for name, tensor in stats.values.items()}
    tokens = None if stats.tokens is None else [stats.tokens[row] for row in chosen_rows]
    paths = tuple(stats.paths[at] for at in at_layer) if stats.paths else ()
    return replace(stats, values=values, layers=chosen_layers, heads=chosen_heads, tokens=tokens, paths=paths)


def _of_queries(stats: AttentionStats, chosen: tuple[int, ...], at: list[int]) -> AttentionStats:
    """Some queries, without what is summed up over all of them."""
    table = statistics_table()
    # Norms of keys are no sums over queries; of a key statistic of another process nobody knows.
    of_keys = {name for name, statistic in table.items() if statistic.is_norm and "key" in statistic.dims}
    rows = [place for place, row in enumerate(stats.rows) if row in chosen]
    dims = {name: stats.labels[name].dims for name in stats.names}
    kept = [n for n in stats.names if "query" in dims[n] or n in of_keys or ("row" in dims[n] and rows)]
    if not kept:
        raise ValueError(f"queries: {list(stats.names)} are of all queries together, and of no single one")
    index = {"query": at, "row": rows}
    values = {name: _indexed(stats[name], stats.labels[name].dims, index) for name in (*kept, "visible_keys")}
    values["visible_queries"] = _visible_queries(stats, at)
    values |= {name: stats[name] for name in SEGMENT_LABELS if name in stats}
    return replace(
        stats, values=values, labels={name: stats.labels[name] for name in values}, selected_queries=chosen,
        rows=tuple(stats.rows[place] for place in rows),
    )  # fmt: skip


def _visible_queries(stats: AttentionStats, at: list[int]) -> Tensor:
    """How many of the queries at some places see each key, (…, batch, key), which the counts of all of them tell."""
    counts = [stats.visible_keys.cpu().numpy(), stats.visible_queries.cpu().numpy()]
    layers = max(len(count) if count.ndim == 3 else 1 for count in counts)
    keys_of, queries_of = (np.broadcast_to(count, (layers, *count.shape[-2:])) for count in counts)
    queries, keys = np.array(stats.queries, np.int64), np.array(stats.keys, np.int64)
    total = np.zeros_like(queries_of)
    for place in np.ndindex(total.shape[:2]):
        runs = runs_of(queries, keys, keys_of[place], queries_of[place], stats.direction)
        if runs is None:
            raise ValueError(
                "queries: behind a mask of your own, nobody can tell which keys some of the queries see; "
                "take them from the tensors, or measure with `query_stride`"
            )
        mine = np.isin(runs.places, at)
        seen = np.flatnonzero(queries_of[place])
        total[place][seen] = sum_of_runs(mine.astype(total.dtype), runs.first, runs.stop, len(seen))
    return torch.from_numpy(total.reshape(counts[1].shape)).to(stats.visible_queries.device)


def _indexed(tensor: Tensor, dims: Sequence[str], index: dict[str, list[int]]) -> Tensor:
    for axis, dim in enumerate(dims):
        if dim in index and index[dim] != list(range(tensor.shape[axis])):
            tensor = tensor.index_select(axis, torch.tensor(index[dim], dtype=torch.long, device=tensor.device))
    return tensor


def _inside(chosen: slice, queries: Sequence[int]) -> Sequence[int]:
    """The measured queries that lie in a slice of positions."""
    try:
        start, stop, step = (None if e is None else as_integer(e) for e in (chosen.start, chosen.stop, chosen.step))
    except TypeError:
        start, stop, step = -1, None, None
    if min(start or 0, stop or 0) < 0 or (step is not None and step < 1):
        raise ValueError(f"queries: expected a slice of positions from 0 up, got {chosen!r}")
    end = max(queries, default=0) + 1
    inside = range(start or 0, end if stop is None else stop, step or 1)
    found = [position for position in queries if position in inside]
    if not found:
        raise ValueError(f"queries: none of {_said(queries)} lies in {chosen!r}")
    return found


def _said(available: Sequence[int]) -> str:
    """Few numbers as they are, many by the first and the last."""
    if len(available) <= 50:
        return str(list(available))
    return f"the {len(available)} from {available[0]} to {available[-1]}"


def _positions(axis: str, chosen: Chosen, available: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """The chosen indices and where they stand on their axis."""
    if chosen is None:
        return tuple(available), list(range(len(available)))
    try:
        # A tensor or array without axes can be iterated by its type, but not in fact.
        indices = tuple(
            map(as_integer, chosen if getattr(chosen, "ndim", 1) and isinstance(chosen, Iterable) else (chosen,))
        )
    except TypeError:
        indices = ()
    places = {index: at for at, index in reversed(list(enumerate(available)))}
    if not indices or any(index not in places for index in indices):
        raise ValueError(f"{axis}: expected some of {_said(available)}, got {chosen!r}")
    return indices, [places[index] for index in indices]
