"""What a head that attends equally to every key it may see would show: the yardstick for sinks and distances."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    import xarray


def measured_with(dataset: xarray.Dataset, parameter: str) -> int:
    """A parameter of the configuration, such as ``sink_tokens`` or ``window`` [tokens].

    Raises:
        ValueError: The dataset does not say how it was measured.
    """
    try:
        return int(json.loads(dataset.attrs["config"])[parameter])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"source: attrs['config'] does not say {parameter}; take the dataset from AttentionStats.to_xarray()"
        ) from None


def uniform_attention(dataset: xarray.Dataset) -> xarray.Dataset:
    """``received``, ``mean_distance`` and ``local_mass`` of uniform attention, A_ij = 1 / n_i for the n_i visible keys.

    Who sees whom is read off the counts ``visible_keys`` and ``visible_queries``: a query sees either the last n_i
    real keys up to itself (causal attention, also padded or packed) or all of them (bidirectional attention).

    Returns:
        ``received`` (batch, key) [probability]; ``mean_distance`` [tokens] and ``local_mass`` [probability]
        (batch, query). NaN in a row whose counts fit neither, which only a mask of the user's own can bring about.
    """
    import xarray

    window = measured_with(dataset, "window")
    queries = dataset["query"].values
    rows = [
        _uniform_row(queries, keys, seen, window)
        for keys, seen in zip(
            dataset.visible_keys.transpose("batch", "query").values,
            dataset.visible_queries.transpose("batch", "key").values,
            strict=True,
        )
    ]
    received, distance, local = (np.stack(values) for values in zip(*rows, strict=True))
    return xarray.Dataset(
        {
            "received": (("batch", "key"), received),
            "mean_distance": (("batch", "query"), distance),
            "local_mass": (("batch", "query"), local),
        },
        {name: dataset[name] for name in ("batch", "key", "query")},
    )


def _uniform_row(
    queries: Int[np.ndarray, " query"],
    visible_keys: Int[np.ndarray, " query"],
    visible_queries: Int[np.ndarray, " key"],
    window: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    received = np.full(len(visible_queries), np.nan)
    distance, local = np.full((2, len(queries)), np.nan)
    keys = np.flatnonzero(visible_queries)
    measured = visible_keys > 0
    at, count = queries[measured], visible_keys[measured].astype(np.int64)
    # Each query sees a run of the real keys, from the first-th up to the last-th.
    until_query = np.searchsorted(keys, at, side="right")
    causal, everything = (until_query - count, until_query), (0 * count, 0 * count + len(keys))
    for first, last in (causal, everything):
        seen_by = _sum_of_runs(np.ones(len(at)), first, last, len(keys))
        if np.array_equal(last - first, count) and np.array_equal(seen_by, visible_queries[keys]):
            break
    else:
        return received, distance, local
    received[keys] = _sum_of_runs(1 / count, first, last, len(keys)) / visible_queries[keys]
    before = np.concatenate([[0], np.cumsum(keys)])
    behind = np.clip(until_query, first, last)
    positions_behind, positions_ahead = before[behind] - before[first], before[last] - before[behind]
    total = at * (behind - first) - positions_behind + positions_ahead - at * (last - behind)
    distance[measured] = total / count
    nearest = np.maximum(np.searchsorted(keys, at - window, side="right"), first)
    farthest = np.minimum(np.searchsorted(keys, at + window, side="left"), last)
    local[measured] = (farthest - nearest) / count
    return received, distance, local


def _sum_of_runs(values: np.ndarray, first: np.ndarray, last: np.ndarray, length: int) -> np.ndarray:
    """Add ``values[i]`` to every place from ``first[i]`` up to but not ``last[i]``, in time linear in both."""
    steps = np.zeros(length + 1)
    inside = (first >= 0) & (last <= length)
    np.add.at(steps, first[inside], values[inside])
    np.add.at(steps, last[inside], -values[inside])
    return np.cumsum(steps)[:length]
