"""Who attends to whom: every query's own list of most attended keys where there is room, means over bins elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Shaped

from llama_attn.analysis import require
from llama_attn.analysis.answer import GENERATED
from llama_attn.analysis.dataset import direction_of, real_tokens
from llama_attn.viz.report.embedding import Embedded, Level, Part, embed, embed_rounded
from llama_attn.viz.report.pooling import pool_top_keys, widths

if TYPE_CHECKING:
    import xarray

    Positions = int | slice | Iterable[int | slice]
    """Query positions [token]."""

TOP_KEYS = ("topk_weight", "topk_position")
# As coarse as lists of keys may become [bins, ranks], and so many stay single where not even these fit.
FEWEST_BINS, FEWEST_RANKS, FEWEST_LISTS = 64, 4, 16
# For each query that keeps its own list, so many bins are pooled.
BINS_PER_LIST = 2
# The last queries of the prompt, from which an answer begins, keep their own lists before other queries do.
LAST_OF_PROMPT = 16
# The page can do without the details of one statistic in one head sooner than without who attends to whom.
WORTH = 32


def asked_queries(row: xarray.Dataset, exact: Positions | None) -> Int[np.ndarray, " asked"]:
    """Where the positions that a user names stand on the query axis, in the order in which they were named.

    Args:
        row: One row of the batch.
        exact: Positions of the row [token], negative ones from its end; slices name what was measured of them.

    Raises:
        ValueError: No integers or slices, no measured query, or no lists of keys were measured.
    """
    if exact is None:
        return np.array([], dtype=int)
    require(row, *TOP_KEYS)
    queries, length = row["query"].values, int(row["key"].values[-1]) + 1
    place = {int(position): at for at, position in enumerate(queries)}
    asked: list[int] = []
    for each in exact if isinstance(exact, Iterable) and not isinstance(exact, str) else [exact]:
        try:
            if isinstance(each, bool):
                raise TypeError
            positions = range(length)[each] if isinstance(each, slice) else [operator.index(each)]
        except TypeError:
            raise ValueError(f"exact: expected positions such as 6231, -1 or slice(-32, None), got {exact!r}") from None
        of_row = [position + length if position < 0 else position for position in positions]
        found = [place[position] for position in of_row if position in place]
        if not found:
            raise ValueError(
                f"exact: {each!r} is no measured query; there are {len(queries):,}, from {queries[0]} to {queries[-1]}"
            )
        asked += found
    return np.array(list(dict.fromkeys(asked)), dtype=int)


def first_generated(row: xarray.Dataset) -> int | None:
    """Position of the first token that was generated; None if the row does not say, as without segments."""
    generated = row["key"].values[_segments(row) == GENERATED]
    return int(generated[0]) if len(generated) else None


def by_importance(row: xarray.Dataset, asked: Int[np.ndarray, " asked"]) -> Int[np.ndarray, " query"]:
    """All queries, as indices, those first whose own lists matter most.

    What was asked for; generated tokens; the last ones of the prompt; ends of segments; then the others from the last
    to the first, and padding.
    """
    queries, keys, segments = row["query"].values, row["key"].values, _segments(row)
    backwards = np.arange(len(queries))[::-1]
    real = real_tokens(row, "query").isel(batch=0).values
    start = first_generated(row)
    generated = len(queries) if start is None else int(np.searchsorted(queries, start))
    prompt = backwards[backwards < generated]
    ends = keys[:-1][segments[1:] != segments[:-1]]
    wanted = [
        np.arange(generated, len(queries)), prompt[real[prompt]][:LAST_OF_PROMPT], np.flatnonzero(np.isin(queries, ends)),
        backwards[real[backwards]],
    ]  # fmt: skip
    automatic = [int(query) for group in wanted for query in group if real[query]]
    return np.array(list(dict.fromkeys([*asked.tolist(), *automatic, *backwards.tolist()])))


def _segments(row: xarray.Dataset) -> Shaped[np.ndarray, " key"]:
    """Name of the segment of every key; "" for none, and where queries are no tokens of that text."""
    if "key_segment" not in row.coords or direction_of(row) == "cross":
        return np.full(row.sizes["key"], "")
    return row["key_segment"].isel(batch=0).values


def first_seen(row: xarray.Dataset) -> Int[np.ndarray, "layer query"] | None:
    """Position of the first key that each query sees; one layer if all see the same [token].

    Causal masks, windows, chunks, padding and packed texts show a query its last keys up to itself. None where that
    does not explain how many queries see each key, as with a mask of the user's, or where queries see what follows.
    """
    if direction_of(row) != "causal":
        return None
    keys = row["key"].values[real_tokens(row, "key").isel(batch=0).values]
    seen, seen_by = (np.atleast_2d(row[name].isel(batch=0).values) for name in ("visible_keys", "visible_queries"))
    up_to = np.searchsorted(keys, row["query"].values, side="right")
    start = up_to - seen
    if (start < 0).any() or len(seen) != len(seen_by):
        return None
    for first, layer_seen, counts in zip(start, seen, seen_by, strict=True):
        steps = np.zeros(len(keys) + 1, int)
        np.add.at(steps, first[layer_seen > 0], 1)
        np.add.at(steps, up_to[layer_seen > 0], -1)
        if (np.cumsum(steps)[:-1] != counts[np.isin(row["key"].values, keys)]).any():
            return None
    # A query that sees nothing sees no key up to itself.
    return np.append(keys, keys[-1] + 1)[start]


def links_part(row: xarray.Dataset, asked: Int[np.ndarray, " asked"]) -> Part:
    """Lists of the most attended keys, first of all queries, then of the most important ones and of bins of all.

    Those that were asked for are never left out.
    """
    weight, position = (row[name].isel(batch=0).transpose("layer", "head", "query", "rank").values for name in TOP_KEYS)
    real = real_tokens(row, "query").isel(batch=0).values
    order = by_importance(row, asked)
    if row.sizes["key"] <= 2**15:
        # Integers of 16 bits are sorted several times as fast.
        position = position.astype(np.int16)
    layers, heads, queries, ranks = weight.shape
    index = np.uint16 if row.sizes["key"] < 2**16 else np.uint32
    few = min(ranks, FEWEST_RANKS)

    def lists(kind: str, weights: np.ndarray, keys: np.ndarray, bits: int, width: int) -> dict[str, Embedded]:
        return {
            f"{kind}_weight": embed_rounded(weights, bits, width=width),
            # Position + 1, so that 0 is "none" and all are unsigned.
            f"{kind}_position": embed((keys.astype(np.int64) + 1).astype(index)),
        }

    def own(count: int, bits: int) -> dict[str, Embedded]:
        at = np.sort(order[:count])
        made = lists("topk", np.nan_to_num(weight[:, :, at]), position[:, :, at], bits, 1)
        return made | {"topk_query": embed(at.astype(np.uint32))}

    def pooled(width: int) -> dict[str, Embedded]:
        # Layer by layer: sorting all lists at once would take many times their memory.
        each = [pool_top_keys(*layer, real, width, few) for layer in zip(weight, position, strict=True)]
        weights, keys = (np.stack(stacked) for stacked in zip(*each, strict=True))
        return lists("pooled", weights, keys, 8, width)

    def size(entries: int, bits: int) -> int:
        return layers * heads * entries * (bits // 8 + np.dtype(index).itemsize)

    def some_own(count: int, bits: int = 16) -> Level:
        return Level(size(count * ranks, bits), lambda: own(count, bits) if count else {})

    def mixed(width: int) -> Level:
        bins = -(-queries // width)
        count = max(len(asked), bins // BINS_PER_LIST)
        return Level(size(count * ranks, 16) + size(bins * few, 8), lambda: own(count, 16) | pooled(width))

    levels = [some_own(queries), some_own(queries, 8)]
    # Half the ranks are worth more than half the tokens.
    levels += [mixed(width) for width in widths(queries, FEWEST_BINS) if width > 1 or few < ranks]
    levels += [some_own(max(len(asked), min(queries, FEWEST_LISTS))), some_own(len(asked))]
    return Part("links", levels, WORTH)
