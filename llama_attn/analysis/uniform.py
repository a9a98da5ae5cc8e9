"""What a head that attends equally to every key it may see would show: the yardstick for sinks and distances."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.dataset import direction_of
from llama_attn.analysis.who_sees import Runs, runs_of, sink_shares, sum_of_runs

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Array

OF_QUERIES = ("entropy", "sink_mass", "local_mass", "mean_distance", "previous_token")
OF_KEYS = ("received", "received_total")
OF_DISTANCES = ("distance_histogram",)
# What compares positions, of which cross-attention has no common ones.
DISTANCES = ("local_mass", "mean_distance", "previous_token", "distance_histogram")


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
    """The statistics of uniform attention, A_ij = 1 / n_i for the n_i keys that query i may see.

    Who sees whom is read off the counts ``visible_keys`` and ``visible_queries``, layer by layer where they differ;
    `llama_attn.analysis.who_sees.runs_of` says when they tell. A learned sink is not a key and gets nothing.

    Args:
        dataset: Any statistics, from ``AttentionStats.to_xarray``.

    Returns:
        ``received`` [probability] and ``received_total`` [attention], (batch, key);
        ``entropy`` [nat], ``sink_mass``, ``local_mass`` and ``previous_token`` [probability] and ``mean_distance``
        [tokens], (batch, query); ``distance_histogram`` [probability], (batch, distance_bin).
        With the axis ``layer`` in front where the layers see different keys.
        NaN for padding; in a row whose counts do not tell who sees whom, behind a mask of the user's own; in
        cross-attention for all that compares positions. ``sink_mass`` is NaN where it is unknown where a sequence
        begins: in all but the first of several packed documents or chunks that no layer links, and where the row
        begins before what was measured.

    Raises:
        ValueError: The dataset does not say how it was measured.
    """
    import xarray

    layered = "layer" in dataset.visible_keys.dims or "layer" in dataset.visible_queries.dims
    layers = dataset["layer"] if layered else xarray.DataArray([0], dims="layer")
    counts_of_keys, counts_of_queries = (
        (counts if "layer" in counts.dims else counts.expand_dims(layer=layers.values)).transpose(
            "batch", "layer", axis
        )
        for counts, axis in ((dataset.visible_keys, "query"), (dataset.visible_queries, "key"))
    )
    window, sink_tokens = measured_with(dataset, "window"), measured_with(dataset, "sink_tokens")
    starts = _distance_bins(dataset)
    lengths = dict.fromkeys(OF_QUERIES, dataset.sizes["query"]) | dict.fromkeys(OF_KEYS, dataset.sizes["key"])
    lengths |= {name: len(starts) for name in OF_DISTANCES}
    shape = dataset.sizes["batch"], layers.size
    values = {name: np.full((*shape, length), np.nan) for name, length in lengths.items()}
    for row in range(shape[0]):
        _fill_row(
            {name: array[row] for name, array in values.items()},
            dataset, counts_of_keys.values[row], counts_of_queries.values[row], starts, window, sink_tokens,
        )  # fmt: skip
    axes = dict.fromkeys(OF_QUERIES, "query") | dict.fromkeys(OF_KEYS, "key")
    axes |= dict.fromkeys(OF_DISTANCES, "distance_bin")
    coordinates = {name: dataset[name] for name in ("batch", "key", "query")} | {"distance_bin": starts}
    result = xarray.Dataset(
        {name: (("batch", "layer", axes[name]), array) for name, array in values.items()},
        coordinates | {"layer": layers},
    ).transpose("layer", "batch", ...)
    return result if layered else result.isel(layer=0, drop=True)


def share_of_keys(measured: Mapping[Any, Array]) -> Array | float:
    """How much of its attention each query leaves to keys: all of it, but for ``learned_sink_mass`` if measured."""
    return 1 - measured["learned_sink_mass"] if "learned_sink_mass" in measured else 1.0


def _distance_bins(dataset: xarray.Dataset) -> np.ndarray:
    """Smallest distance of each bin [tokens]."""
    if "distance_bin" in dataset.coords:
        return np.asarray(dataset["distance_bin"].values, np.int64)
    length = int(dataset["key"].values[-1]) + 1
    return 2 ** np.arange(length.bit_length(), dtype=np.int64) - 1


def _fill_row(
    values: dict[str, np.ndarray],
    dataset: xarray.Dataset,
    visible_keys: np.ndarray,
    visible_queries: np.ndarray,
    starts: np.ndarray,
    window: int,
    sink_tokens: int,
) -> None:
    """Write what uniform attention shows in one row, (layer, …) each, where it is known."""
    queries, keys, direction = dataset["query"].values, dataset["key"].values, direction_of(dataset)
    # Layers of the same kind see the same: they are worked out once.
    kinds: dict[bytes, list[int]] = {}
    for layer, counts in enumerate(zip(visible_keys, visible_queries, strict=True)):
        kinds.setdefault(b"".join(count.tobytes() for count in counts), []).append(layer)
    found = []
    for places in map(np.array, kinds.values()):
        at = places[0]
        runs = runs_of(queries, keys, visible_keys[at], visible_queries[at], direction)
        if runs is not None:
            found.append((places, runs))
    sinks = sink_shares([runs for _, runs in found], queries, sink_tokens, cross=direction == "cross")
    for (places, runs), share in zip(found, sinks, strict=True):
        if not len(runs.queries):
            continue
        per_query = {"entropy": np.log(runs.count), "sink_mass": share} | _distances(runs, window)
        for name, numbers in per_query.items():
            values[name][np.ix_(places, runs.places)] = numbers
        total = sum_of_runs(1 / runs.count, runs.first, runs.stop, len(runs.keys))
        seen = np.flatnonzero(visible_queries[places[0]])
        values["received_total"][np.ix_(places, seen)] = total
        values["received"][np.ix_(places, seen)] = total / visible_queries[places[0]][seen]
        closer = runs.near(np.append(starts, 2 * starts[-1] + 1))
        values["distance_histogram"][places] = (np.diff(closer, axis=-1) / runs.count[:, None]).mean(0)
    if direction == "cross":
        for name in DISTANCES:
            values[name][:] = np.nan


def _distances(runs: Runs, window: int) -> dict[str, np.ndarray]:
    """What compares the positions of each query and the keys it sees."""
    before = np.concatenate([[0], np.cumsum(runs.keys)])
    # The keys up to the query, and those behind it.
    middle = np.searchsorted(runs.keys, runs.queries, side="right").clip(runs.first, runs.stop)
    earlier, later = before[middle] - before[runs.first], before[runs.stop] - before[middle]
    total = runs.queries * (middle - runs.first) - earlier + later - runs.queries * (runs.stop - middle)
    previous = np.searchsorted(runs.keys, runs.queries - 1)
    at_previous = runs.keys[previous.clip(max=len(runs.keys) - 1)] == runs.queries - 1
    sees_previous = at_previous & (previous >= runs.first) & (previous < runs.stop)
    return {
        "mean_distance": total / runs.count,
        "local_mass": runs.near(window) / runs.count,
        "previous_token": sees_previous / runs.count,
    }
