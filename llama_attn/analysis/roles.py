"""Scores of the roles that a head may have, and which of them it has most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.dataset import direction_of
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
    over = ("query",) if per_row else ("batch", "query")
    chosen = _queries(dataset, query_slice)
    unknown = dataset.entropy.mean(over) * np.nan
    found = {
        **_scores(chosen, over),
        "sink": _on_sinks(dataset, chosen, over, sinks),
        "streaming": _streaming(dataset, chosen, over),
    }
    if needle is not None:
        score = retrieval_heads(dataset, needle).score
        found["retrieval"] = score if per_row else score.mean("batch")
    order = ("layer", "batch", "head")[:: 1 if per_row else 2]
    return {role: found.get(role, unknown).transpose(*order) for role in THRESHOLDS}


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


def _queries(dataset: xarray.Dataset, query_slice: slice | None) -> xarray.Dataset:
    """The dataset and what uniform attention would give, with only the queries that count."""
    if query_slice is not None and not _is_slice(query_slice):
        raise ValueError(f"query_slice: expected a slice such as slice(65, None), got {query_slice!r}")
    uniform = uniform_attention(dataset)
    dataset = dataset.assign(uniform_distance=uniform.mean_distance, uniform_sink_mass=uniform.sink_mass)
    positions = range(
        *(query_slice or slice(None)).indices(int(max(dataset["key"].values[-1], dataset["query"].values[-1])) + 1)
    )
    queries = dataset["query"].values
    chosen = np.flatnonzero(np.isin(queries, positions))
    if not len(chosen):
        raise ValueError(f"query_slice: {query_slice} holds no query; there are {queries[0]} to {queries[-1]}")
    return dataset.isel(query=chosen)


def _is_slice(chosen: Any) -> bool:
    """Whether it is a slice of positions."""
    if not isinstance(chosen, slice) or chosen.step == 0:
        return False
    return all(part is None or is_integer(part) for part in (chosen.start, chosen.stop, chosen.step))


def _scores(dataset: xarray.Dataset, over: Sequence[str]) -> dict[str, xarray.DataArray]:
    """Scores that are means over queries, of what was measured."""
    several = dataset.visible_keys > 1
    scores = {"uniform": normalized_entropy(dataset).mean(over)}
    if "mean_distance" in dataset:
        distances = dataset.mean_distance / share_of_keys(dataset), dataset.uniform_distance
        distance, uniform_distance = (each.where(several).mean(over) for each in distances)
        scores["local"] = 1 - distance / uniform_distance
    if "sink_mass" in dataset:
        # Unknown, it counts: it is so in packed documents, each of which begins with its sink.
        sees_sink = (dataset.visible_keys > measured_with(dataset, "sink_tokens")) & (dataset.uniform_sink_mass != 0)
        scores["first_token_sink"] = dataset.sink_mass.where(sees_sink).mean(over)
    for role in ("previous_token", "duplicate_token", "induction"):
        if role in dataset:
            scores[role] = dataset[role].where(several).mean(over)
    return scores


def _on_sinks(
    dataset: xarray.Dataset, chosen: xarray.Dataset, over: Sequence[str], found: xarray.Dataset | None
) -> xarray.DataArray:
    """Mean mass on the sinks of the run, of the queries that see more than one key; NaN if unknown."""
    several, alone = dataset.visible_keys > 1, dataset.visible_keys == 1
    every = bool((several.sum("query") == (chosen.visible_keys > 1).sum("query")).all())
    if not {"received", "sink_mass"} <= set(dataset) or not every:
        return dataset.entropy.mean(over) * np.nan
    found = sink_positions(dataset) if found is None else found
    sinks = found.layer_sink.any("layer")
    known = found.boost.notnull().any(["layer", "head", "key"])
    total = (
        (dataset.received * dataset.visible_queries).where(sinks).sum("key").where(dataset.received.count("key") > 0)
    )
    if direction_of(dataset) != "cross":
        # A query that sees one key sees itself, the first of its sequence, and has no choice.
        own = sinks.reindex(key=dataset["query"].values, fill_value=False).drop_vars("key_token", errors="ignore")
        own = own.rename(key="query").assign_coords(query=dataset["query"])
        total = total - dataset.sink_mass.where(alone & own).sum("query")
    count = several.sum("query").where(known)
    total = total.where(known)
    if "batch" in over:
        total, count = total.sum("batch", min_count=1), count.sum("batch")
    return total / count.where(count > 0)


def _streaming(dataset: xarray.Dataset, chosen: xarray.Dataset, over: Sequence[str]) -> xarray.DataArray:
    """Mean mass on sink and window of the chosen queries that see a key outside; NaN if unknown."""
    if not {"local_mass", "sink_mass"} <= set(dataset) or direction_of(dataset) != "causal":
        return dataset.entropy.mean(over) * np.nan
    outside, _ = mass_outside(dataset)
    return 1 - outside.sel(query=chosen["query"].values).mean(over)
