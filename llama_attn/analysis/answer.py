"""Which queries wrote the answer, and how many tokens of each segment they see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.dataset import direction_of
from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.analysis.who_sees import runs_of

if TYPE_CHECKING:
    import xarray

# What a run of `generate` calls the tokens behind the prompt; template tokens of a chat; see llama_attn.stats.segments.
GENERATED, SPECIAL = "generated", "special"


def first_generated(dataset: xarray.Dataset) -> int:
    """Position of the first token that was generated [token].

    Raises:
        NotMeasuredError: The statistics do not say.
    """
    if "key_segment" in dataset.coords:
        generated = (dataset.key_segment == GENERATED).any("batch").values
        if generated.any():
            return int(dataset["key"].values[generated.argmax()])
    rows = json.loads(dataset.attrs.get("config", "{}")).get("rows")
    if isinstance(rows, dict) and rows.get("at") == GENERATED and "row" in dataset.coords and dataset.sizes["row"]:
        return int(dataset["row"].values[0]) + 1
    # A run that generated one token looks like one that generated none.
    alone = "key_segment" in dataset.coords
    raise NotMeasuredError(
        "source: nothing says which tokens were generated"
        + (": none behind the prompt was read, and the last one is never fed back" if alone else ""),
        ["generated"],
        'measure in generate, with AttentionStatsConfig(segments=…) for the prompt, or rows="generated"',
    )


def answering(dataset: xarray.Dataset) -> xarray.Dataset:
    """The dataset with only the queries that a generated token was drawn from: the token before each.

    The last one is that of a token which was never fed back.

    Raises:
        NotMeasuredError: Nothing says which tokens were generated, or these queries were not measured.
    """
    first = first_generated(dataset)
    queries = dataset["query"].values
    chosen = np.flatnonzero(queries >= first - 1)
    wanted = range(first - 1, int(dataset["key"].values[-1]) + 1)
    if queries[chosen].tolist() != list(wanted):
        raise NotMeasuredError(
            f"source: expected the queries {wanted.start} to {wanted.stop - 1}, from which tokens were generated, got "
            f"{queries[chosen].tolist()}",
            ["query_stride"],
            "measure with query_stride=1",
        )
    return dataset.isel(query=chosen)


def generated_tokens(dataset: xarray.Dataset, batch: int) -> list[str | None]:
    """The token that each measured query was followed by, None where nobody knows, as for the last.

    Args:
        dataset: With queries one by one.
        batch: Place of the row.
    """
    if "key_token" not in dataset.coords:
        return [None] * dataset.sizes["query"]
    real = (dataset.visible_queries > 0).isel(batch=batch)
    real = real.any("layer") if "layer" in real.dims else real
    strings = dict(zip(dataset["key"].values.tolist(), dataset.key_token.values[batch].tolist(), strict=True))
    seen = dict(zip(dataset["key"].values.tolist(), real.values.tolist(), strict=True))
    after = (int(query) + 1 for query in dataset["query"].values)
    return [str(strings[at]) if seen.get(at, False) else None for at in after]


def require_segments(dataset: xarray.Dataset) -> None:
    """Check that there are segments.

    Raises:
        NotMeasuredError: None were given when the run was measured.
    """
    if "segment_mass" not in dataset or "key_segment" not in dataset.coords:
        raise NotMeasuredError(
            "source: expected segments",
            ["segments"],
            "measure with AttentionStatsConfig(segments=…)",
            dataset.data_vars,
        )


def seen_of_segments(dataset: xarray.Dataset, marks: xarray.DataArray | None = None) -> xarray.DataArray:
    """How many keys of each segment each query sees, (batch, query, segment), ``layer`` in front where layers differ.

    Args:
        dataset: All queries of the run, with segments.
        marks: Only keys that are True here, (batch, key).

    Raises:
        ValueError: Behind a mask of the user's own, nobody can tell.
    """
    import xarray

    names = [str(name) for name in dataset["segment"].values]
    belongs = xarray.concat([dataset.key_segment == name for name in names], xarray.Variable("segment", names))
    return seen_keys(dataset, belongs if marks is None else belongs & marks)


def seen_keys(dataset: xarray.Dataset, marks: xarray.DataArray) -> xarray.DataArray:
    """How many of the marked keys each query sees, (batch, query, segment), ``layer`` in front where layers differ.

    Args:
        dataset: All queries of the run.
        marks: Which keys count, (segment, batch, key).

    Raises:
        ValueError: Behind a mask of the user's own, nobody can tell.
    """
    import xarray

    counts = dataset.visible_keys, dataset.visible_queries
    layered = [dim for dim in ("layer",) if any(dim in each.dims for each in counts)]
    of_queries, of_keys = (
        (each.expand_dims(layer=dataset["layer"]) if layered and "layer" not in each.dims else each)
        .transpose(*layered, "batch", axis)
        .values
        for each, axis in zip(counts, ("query", "key"), strict=True)
    )
    queries, keys = dataset["query"].values, dataset["key"].values
    marked = marks.transpose("segment", "batch", "key").values
    totals = np.zeros((*of_queries.shape, len(marked)), np.int64)
    for place in np.ndindex(of_queries.shape[:-1]):
        runs = runs_of(queries, keys, of_queries[place], of_keys[place], direction_of(dataset))
        if runs is None:
            raise ValueError(
                f"source: behind the mask of row {place[-1]} of the batch nobody can tell which keys a query sees, and "
                "so not how many are of which segment"
            )
        held = marked[:, place[-1]][:, np.isin(keys, runs.keys)]
        before = np.concatenate([np.zeros((len(held), 1), np.int64), np.cumsum(held, 1)], 1)
        totals[place][runs.places] = (before[:, runs.stop] - before[:, runs.first]).T
    coordinates = {name: dataset[name].values for name in (*layered, "batch", "query")}
    return xarray.DataArray(
        totals, coordinates | {"segment": marks["segment"].values}, (*layered, "batch", "query", "segment")
    )


def pick_names(argument: str, chosen: str | Sequence[str], dataset: xarray.Dataset) -> list[str]:
    """Names of segments, checked against those there are.

    Raises:
        ValueError: None, or one that there is not.
    """
    known = [str(name) for name in dataset["segment"].values]
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    if not names or any(name not in known for name in names):
        raise ValueError(f"{argument}: expected some of {known}, got {chosen!r}")
    return names
