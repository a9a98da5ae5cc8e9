"""Which queries `row_weights` are of: what a user may ask for, and the positions that it means in a forward."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from llama_attn.stats.integers import as_integer
from llama_attn.stats.segments import GENERATED

Rows = tuple[int, ...] | slice | str
"""Query positions [token], or ``"generated"``."""
# Weights of so many bytes are refused unless they are asked for on the CPU.
MOST_BYTES = 2 * 2**30


def read_rows(rows: Any) -> Rows:
    """Positions of queries, a slice of them, or ``"generated"``.

    Raises:
        ValueError: Anything else, no position, or one that is named twice.
    """
    if isinstance(rows, str) and rows == GENERATED:
        return rows
    try:
        if isinstance(rows, slice):
            start, stop, step = (None if e is None else as_integer(e) for e in (rows.start, rows.stop, rows.step))
            if step is None or step > 0:
                return slice(start, stop, step)
        elif not isinstance(rows, str):
            found = tuple(map(as_integer, rows if isinstance(rows, Iterable) else (rows,)))
            if found and len(set(found)) == len(found):
                return found
    except TypeError:
        pass
    raise ValueError(
        f'rows: expected distinct positions such as (-1,), a slice such as slice(-64, None), or "generated", got {rows!r}'
    )


def rows_to_json(rows: Rows | None) -> Any:
    """The same as plain JSON types."""
    return [rows.start, rows.stop, rows.step] if isinstance(rows, slice) else {"at": rows} if rows else None


def rows_from_json(data: Any) -> Rows | None:
    """The inverse of `rows_to_json`.

    Raises:
        ValueError: Something else.
    """
    if data is None:
        return None
    if isinstance(data, list) and len(data) == 3:
        return read_rows(slice(*data))
    if isinstance(data, dict) and set(data) == {"at"}:
        return read_rows(data["at"])
    raise ValueError(f"rows: expected a slice or positions, got {data!r}")


def counts_from_end(rows: Rows | None) -> bool:
    """Whether the end of the row has to be known."""
    ends = (rows.start, rows.stop) if isinstance(rows, slice) else rows if isinstance(rows, tuple) else ()
    return any(end is not None and end < 0 for end in ends)


def positions(rows: Rows, queries: range, prompt: int | None) -> tuple[int, ...]:
    """Positions of the queries of one forward whose weights are wanted, in order.

    Args:
        rows: What was asked for.
        queries: Positions of all queries of the forward [token].
        prompt: Length of the prompt that is being continued [token]; None if the forward stands alone.

    Raises:
        ValueError: A position that the row does not have.
    """
    if isinstance(rows, str):
        # Without a prompt it is a text that is read, or tokens that continue what a cache holds.
        first = (queries.start or queries.stop - 1) if prompt is None else prompt - 1
        return tuple(range(max(first, queries.start), queries.stop))
    alone = prompt is None and queries.start == 0
    if isinstance(rows, slice):
        wanted: Sequence[int] = range(*rows.indices(queries.stop))
    else:
        wanted = sorted({row + queries.stop if row < 0 else row for row in rows})
        if alone and not (wanted[0] >= 0 and wanted[-1] < queries.stop):
            raise ValueError(
                f"rows: expected positions from {-queries.stop} to {queries.stop - 1}, got {rows}; of tokens that are "
                'still to come, "generated" gives the rows'
            )
    found = tuple(row for row in wanted if row in queries)
    if alone and not found:
        raise ValueError(f"rows: none of the positions 0 to {queries.stop - 1} is in {rows}")
    return found


def runs_of_positions(found: Sequence[int]) -> list[range]:
    """Positions as runs that follow one another without a gap."""
    gaps = [at for at, (before, after) in enumerate(pairwise(found), 1) if after != before + 1]
    edges = [0, *gaps, len(found)]
    return [range(found[a], found[b - 1] + 1) for a, b in pairwise(edges) if b > a]


def check_size(size: int, offload: str | None) -> None:
    """Refuse weights that would take the memory of the model that is being measured.

    Args:
        size: Of the weights of all layers [bytes].
        offload: Where the numbers are kept; None for the device of the model.

    Raises:
        ValueError: They are larger than `MOST_BYTES`, or on the CPU than what is free there.
    """
    most = MOST_BYTES if offload is None else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > most:
        way = "" if offload else ', or offload="cpu" if they fit there'
        raise ValueError(
            f"rows: their weights would take {size / 2**30:.1f} GiB, and no more than {most / 2**30:.1f} GiB are taken; "
            f"choose fewer rows, `layers` or `heads`{way}"
        )
