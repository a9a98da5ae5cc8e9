"""Scores of the roles that a head may have, and which of them it has most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.dataset import coordinates_along, direction_of, of_queries
from llama_attn.analysis.locality import LOCAL_BELOW, normalized_entropy
from llama_attn.analysis.retrieval import RETRIEVAL, STREAMING, mass_outside, retrieval_heads
from llama_attn.analysis.sinks import EPSILON, sink_positions
from llama_attn.analysis.uniform import measured_with, share_of_keys, uniform_attention
from llama_attn.stats.integers import is_integer

if TYPE_CHECKING:
    import xarray
    from jaxtyping import Float, Int

# What the score of a role must exceed.
THRESHOLDS = {
    "first_token_sink": EPSILON,
    "sink": EPSILON,
    "previous_token": EPSILON,
    "duplicate_token": EPSILON,
    "induction": EPSILON,
    "local": 1 - LOCAL_BELOW,
    "uniform": 0.9,
    "streaming": 1 - STREAMING,
    "retrieval": RETRIEVAL,
}
# Where no score exceeds its threshold, and where there is no data.
MIXED, NO_DATA = -1, -2


def role_scores(
    dataset: xarray.Dataset,
    query_slice: slice | None = None,
    needle: tuple[int, int] | None = None,
    *,
    per_row: bool = False,
    sinks: xarray.Dataset | None = None,
) -> dict[str, xarray.DataArray]:
    """The score of every role, (layer, head), as `classify_heads` says; NaN where what it rests on is unknown.

    Args:
        dataset: Statistics, ``entropy`` among them.
        query_slice: Positions of the queries to count.
        needle: What heads may have copied into the answer.
        per_row: Of every row of the batch by itself, (layer, batch, head).
        sinks: What `sink_positions` says of the dataset, if it has been asked; None to ask it.

    Raises:
        ValueError: The slice holds no measured query, or there is a needle and `retrieval_heads` cannot tell.
    """
    import xarray

    over = ("query",) if per_row else ("batch", "query")
    uniform = uniform_attention(dataset).variables
    chosen, of_uniform = _queries(dataset, query_slice, dataset.variables, uniform)
    found = _scores(dataset, chosen, of_uniform, over)
    if {"received", "sink_mass"} <= set(dataset) and _has_every(dataset, chosen):
        found["sink"] = _on_sinks(dataset, over, sink_positions(dataset) if sinks is None else sinks)
    if {"local_mass", "sink_mass"} <= set(dataset) and direction_of(dataset) == "causal":
        # Mass on sink and window, of the queries that see a key outside.
        found["streaming"] = 1 - mass_outside(chosen, of_uniform)[0].mean(over)
    if needle is not None:
        score = retrieval_heads(dataset, needle).score.variable
        found["retrieval"] = score if per_row else score.mean("batch")
    unknown = dataset.variables["entropy"].mean(over) * np.nan
    order = ("layer", "batch", "head")[:: 1 if per_row else 2]
    coordinates = coordinates_along(dataset, order)
    return {role: xarray.DataArray(found.get(role, unknown).transpose(*order), coordinates) for role in THRESHOLDS}


def strengths(scores: dict[str, xarray.DataArray]) -> Float[np.ndarray, "role ..."]:
    """Each score over its threshold, in the order of `THRESHOLDS`; NaN where it is unknown.

    Of both kinds of sinks, the first token's comes first where at least half of what is on sinks is on the first
    tokens, as if its score were that of all.
    """
    relative = {role: scores[role].values / threshold for role, threshold in THRESHOLDS.items()}
    mostly_first = scores["first_token_sink"].values >= scores["sink"].values / 2
    relative["first_token_sink"] = np.where(
        mostly_first, np.fmax(relative["first_token_sink"], relative["sink"]), relative["first_token_sink"]
    )
    # Scores that differ by rounding alone are equal, and the role that is named first counts.
    return np.stack(list(relative.values())).round(6)


def strongest_roles(scores: dict[str, xarray.DataArray]) -> Int[np.ndarray, ...]:
    """Index into `THRESHOLDS` of the role that each head has most; `MIXED` for none, `NO_DATA` where all is unknown."""
    values = np.stack([scores[role].values for role in THRESHOLDS])
    above = np.stack([values[at] > threshold for at, threshold in enumerate(THRESHOLDS.values())])
    best = np.where(above, strengths(scores), -np.inf).argmax(0)
    return np.where(above.any(0), best, np.where(np.isfinite(values).any(0), MIXED, NO_DATA))


def _queries(
    dataset: xarray.Dataset, query_slice: slice | None, *arrays: Mapping[Any, xarray.Variable]
) -> list[Mapping[Any, xarray.Variable]]:
    """Arrays by name, with only the queries that count."""
    if query_slice is None:
        return list(arrays)
    if not _is_slice(query_slice):
        raise ValueError(f"query_slice: expected a slice such as slice(65, None), got {query_slice!r}")
    queries = dataset["query"].values
    positions = range(*query_slice.indices(int(max(dataset["key"].values[-1], queries[-1])) + 1))
    chosen = np.flatnonzero(np.isin(queries, positions))
    if not len(chosen):
        raise ValueError(f"query_slice: {query_slice} holds no query; there are {queries[0]} to {queries[-1]}")
    return [
        {name: array.isel(query=chosen) if "query" in array.dims else array for name, array in by_name.items()}
        for by_name in arrays
    ]


def _is_slice(chosen: Any) -> bool:
    """Whether it is a slice of positions."""
    if not isinstance(chosen, slice) or chosen.step == 0:
        return False
    return all(part is None or is_integer(part) for part in (chosen.start, chosen.stop, chosen.step))


def _scores(
    dataset: xarray.Dataset,
    chosen: Mapping[Any, xarray.Variable],
    uniform: Mapping[Any, xarray.Variable],
    over: Sequence[str],
) -> dict[str, xarray.Variable]:
    """Scores that are means over queries, of what was measured."""
    several = chosen["visible_keys"] > 1
    scores = {"uniform": normalized_entropy(chosen).mean(over)}
    if "mean_distance" in chosen:
        distances = chosen["mean_distance"] / share_of_keys(chosen), uniform["mean_distance"]
        distance, uniform_distance = (each.where(several).mean(over) for each in distances)
        scores["local"] = 1 - distance / uniform_distance
    if "sink_mass" in chosen:
        # Unknown, it counts: it is so in packed documents, each of which begins with its sink.
        sees_sink = (chosen["visible_keys"] > measured_with(dataset, "sink_tokens")) & (uniform["sink_mass"] != 0)
        scores["first_token_sink"] = chosen["sink_mass"].where(sees_sink).mean(over)
    for role in ("previous_token", "duplicate_token", "induction"):
        if role in chosen:
            scores[role] = chosen[role].where(several).mean(over)
    return scores


def _has_every(dataset: xarray.Dataset, chosen: Mapping[Any, xarray.Variable]) -> bool:
    """Whether every query that sees more than one key is among the chosen ones."""
    every, some = ((counts["visible_keys"] > 1).sum("query") for counts in (dataset.variables, chosen))
    return bool((every == some).all())


def _on_sinks(dataset: xarray.Dataset, over: Sequence[str], found: xarray.Dataset) -> xarray.Variable:
    """Mean mass on the sinks of the run, of the queries that see more than one key; NaN if unknown."""
    measured, seen = dataset.variables, dataset.variables["visible_keys"]
    sinks = found.variables["layer_sink"].any("layer")
    known = found.variables["boost"].notnull().any(["layer", "head", "key"])
    received = measured["received"]
    total = (received * measured["visible_queries"]).where(sinks).sum("key").where(received.count("key") > 0)
    if direction_of(dataset) != "cross":
        # A query that sees one key sees itself, the first of its sequence, and has no choice.
        own, is_key = of_queries(sinks, dataset)
        total = total - measured["sink_mass"].where((seen == 1) & own & is_key).sum("query")
    count = (seen > 1).sum("query").where(known)
    total = total.where(known)
    if "batch" in over:
        total, count = total.sum("batch", min_count=1), count.sum("batch")
    return total / count.where(count > 0)
