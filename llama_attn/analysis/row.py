"""One row of a batch as a text of its own: without padding, positions counted from its first token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from llama_attn.analysis.dataset import check_measured, direction_of, real_tokens

if TYPE_CHECKING:
    import xarray
    from jaxtyping import Bool, Int

MAP_AXES: dict[Literal["query", "key"], str] = {"query": "query_bin", "key": "key_bin"}


def row_alone(dataset: xarray.Dataset, batch: int) -> xarray.Dataset:
    """A row of a batch as if it had been run without the others.

    Padding at its ends is cut off. Where it stood on the left, positions become those of the row's own text, in
    coordinates and in ``topk_position``. Bins of maps keep what they hold, since they cannot be laid out anew: those
    of padding alone are cut off, and the first may begin at a negative position, where padding was. Whatever cannot be
    told to be padding stays, as keys in front of the first measured query that a window may hide.

    Args:
        dataset: Any statistics.
        batch: Row of the batch.

    Returns:
        The same variables with a ``batch`` axis of length 1. The width of bins [token] is in ``attrs["width"]`` of
        their coordinates.

    Raises:
        ValueError: The row was not measured.
    """
    rows = dataset["batch"].values
    check_measured(dataset, "batch", batch)
    at = int(np.flatnonzero(rows == batch)[0])
    # Slices, here and below: a copy of a long run takes seconds.
    row = dataset.isel(batch=slice(at, at + 1))
    ends = _ends_by_axis(row)
    widths = {bins: _bin_width(row, bins) for bins in MAP_AXES.values() if bins in row.coords}
    if any(end is not None for end in ends.values()):
        row = _cut(row, ends, widths)
    return row.assign_coords({bins: (bins, row[bins].values, {"width": width}) for bins, width in widths.items()})


def unasked_keys(row: xarray.Dataset) -> Bool[np.ndarray, " key"]:
    """Keys of which nothing says whether they are padding or text: no measured query sees them, nor are they ones themselves.

    So are the last tokens behind the last measured query, and those that a window hides from all that were measured.

    Args:
        row: What `row_alone` returns.
    """
    unseen = ~real_tokens(row, "key").isel(batch=0).values
    # In cross-attention every query sees the whole text.
    return unseen & ~np.isin(row["key"].values, row["query"].values) & (direction_of(row) != "cross")


def starts_of_text(dataset: xarray.Dataset, at: int) -> dict[str, int]:
    """By how much the positions of a row of the batch are larger than those of its own text, which begin at 0."""
    ends = _ends_by_axis(dataset.isel(batch=slice(at, at + 1)))
    return {axis: end[0] if end else 0 for axis, end in ends.items()}


def _ends_by_axis(row: xarray.Dataset) -> dict[Literal["query", "key"], tuple[int, int] | None]:
    """First position of the text of the queries and of the keys, and the one behind its last; None without padding."""
    if direction_of(row) == "cross":
        # Either text has its own padding, and every token of the one sees all of the other.
        return {axis: _ends(row[axis].values, real_tokens(row, axis).isel(batch=0).values) for axis in MAP_AXES}
    return dict.fromkeys(MAP_AXES, _ends_of_text(row))


def _ends(positions: Int[np.ndarray, " token"], real: Bool[np.ndarray, " token"]) -> tuple[int, int] | None:
    """First real position and the one behind the last; None if none or all are real."""
    if real.all() or not real.any():
        return None
    return int(positions[real][0]), int(positions[real][-1]) + 1


def _ends_of_text(row: xarray.Dataset) -> tuple[int, int] | None:
    """First position of the row's text, and the one behind its last; None if there is no padding that one can tell.

    A query that sees nothing is padding, for a token sees itself. A key that nobody sees may also lie outside of the
    windows of those queries that were measured.
    """
    queries, keys = row["query"].values, row["key"].values
    real_queries, real_keys = (real_tokens(row, axis).isel(batch=0).values for axis in ("query", "key"))
    real = np.concatenate([queries[real_queries], keys[real_keys]])
    if not len(real) or real_queries.all():
        return None
    start, stop = 0, max(int(keys[-1]), int(queries[-1])) + 1
    padding = queries[~real_queries]
    first = int(real.min())
    if padding[0] == 0 and (first - 1 in padding or _seen_twice(row, first)):
        start = first
    if len(behind := padding[padding > real.max()]) and behind[-1] == queries[-1]:
        stop = int(behind[0])
    return start, stop


def _seen_twice(row: xarray.Dataset, key: int) -> bool:
    """Whether several queries of a layer see a key; then no window hides the one before it from the first of them."""
    counts = row.visible_queries
    return key in row["key"].values and bool((counts.sel(key=key) > 1).any())


def _cut(
    row: xarray.Dataset, ends: dict[Literal["query", "key"], tuple[int, int] | None], widths: dict[str, int]
) -> xarray.Dataset:
    for axis, bins in MAP_AXES.items():
        if (end := ends[axis]) is None:
            continue
        start, stop = end
        positions = row[axis].values
        row = row.isel({axis: slice(*np.searchsorted(positions, [start, stop]))})
        row = row.assign_coords({axis: row[axis].values - start})
        if bins in row.coords:
            edges = row[bins].values
            row = row.isel({bins: slice(*np.searchsorted(edges, [start - widths[bins] + 1, stop]))})
            row = row.assign_coords({bins: row[bins].values - start})
        if axis == "query" and "row" in row.coords:
            # Those whose weights were measured one by one.
            rows = row["row"].values
            row = row.isel(row=(rows >= start) & (rows < stop))
            row = row.assign_coords(row=row["row"].values - start)
        if axis == "key" and "topk_position" in row and start:
            places = row["topk_position"]
            row = row.assign(topk_position=places.where(places < 0, places - start).assign_attrs(places.attrs))
        if axis == "key" and "distance_bin" in row.coords and direction_of(row) != "cross":
            row = row.isel(distance_bin=row["distance_bin"].values < stop - start)
    return row


def _bin_width(row: xarray.Dataset, bins: str) -> int:
    """Tokens per bin."""
    coordinate = row[bins]
    if "width" in coordinate.attrs:
        return int(coordinate.attrs["width"])
    # A single bin is as wide as the power of two that holds the row.
    edges = coordinate.values
    return int(edges[1] - edges[0]) if len(edges) > 1 else 1 << int(row["key"].values[-1]).bit_length()
