"""What does each head do?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.dataset import as_dataset, direction_of, require
from llama_attn.analysis.locality import LOCAL_BELOW, normalized_entropy
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.retrieval import RETRIEVAL, STREAMING, mass_outside, retrieval_heads
from llama_attn.analysis.sinks import EPSILON, sink_positions
from llama_attn.analysis.uniform import measured_with, share_of_keys, uniform_attention

if TYPE_CHECKING:
    import pandas
    import xarray

    from llama_attn.analysis.dataset import Source

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
NEEDED = ("sink_mass", "mean_distance", "entropy", "previous_token", "duplicate_token", "induction")


def classify_heads(
    ds: Source, query_slice: slice | None = None, *, needle: tuple[int, int] | None = None
) -> pandas.DataFrame:
    """A role for every head, with the scores that it follows from.

    Scores are means over rows and over the real queries that see more than one key:

    ================== =========================================================================== =========
    role               score                                                                       threshold
    ================== =========================================================================== =========
    first_token_sink   mass on the first tokens, of queries that see them and more                 0.3
    sink               mass on all tokens that are sinks of some measured layer                    0.3
    previous_token     mass on the token before the query                                          0.3
    duplicate_token    mass on earlier copies of the query's token                                 0.3
    induction          mass on tokens that followed earlier copies of the query's token            0.3
    local              1 − mean distance / mean distance of uniform attention                      0.5
    uniform            mean of entropy / ln(number of visible keys)                                0.9
    streaming          mass on sink and window together, of queries that see other keys too        0.9
    retrieval          share of the ``needle`` that the head copied into the answer                0.1
    ================== =========================================================================== =========

    The sinks of the run are those that `sink_positions` finds, its ``layer_sink`` in any layer, the first token or
    others: a head may rest on several. ``sink`` is known of all measured queries together only: it is NaN for some of
    them, without ``received``, and where `uniform_attention` is unknown.

    ``streaming`` is 1 − ``outside`` of `streaming_heads`; it is NaN without ``local_mass``, in texts that are no longer
    than sink and window, and where attention is not causal. ``retrieval`` is the score of `retrieval_heads`, the mean
    over rows, of all that was generated; it is NaN without a ``needle``.

    0.3 is the ε of Gu et al.; 0.5 is where `locality` draws the line; both 0.9 are a choice; 0.1 is that of Wu et al. What a layer's window hides
    counts against no head: uniform attention is that over the window, and queries whose window has left the first
    tokens behind do not count for ``first_token_sink``.

    In ordinary text few tokens have an earlier copy, so that heads which look for copies score low and often rest on
    the sink. To find them, measure a random sequence repeated twice and pass the second half as ``query_slice``.

    Args:
        ds: Statistics with ``sink_mass``, ``mean_distance``, ``entropy``, ``previous_token``, ``duplicate_token``
            and ``induction``, and with ``received`` for ``sink``.
        query_slice: Positions of the queries to count, as a Python slice of the row: ``slice(65, None)``.
        needle: What heads may have copied into the answer, as in `retrieval_heads`, which then is asked.

    Returns:
        One line per (layer, head), in the order of the dataset. ``role`` has the largest score relative to its
        threshold among those that exceed it, ``roles`` lists all of these, strongest first; ``score`` is that of the
        role. Of both kinds of sinks, ``first_token_sink`` comes first where it passes and at least half of what is
        on sinks is on the first tokens, as if its score were that of ``sink``. Where none does, the role is ``mixed``, with ``score``
        NaN; where there is no data, ``role`` is missing.
        Then one ``<role>_score`` each. ``attrs["part"]``: what was measured of the model, if not all of it.

    Raises:
        ValueError: A statistic was not measured, the slice holds no measured query, or there is a needle and
            `retrieval_heads` cannot tell.

    Source: TransformerLens, head_detector (previous token, duplicate token, induction); Gu et al., arXiv 2410.10781;
    Xiao et al., arXiv 2410.10819 (streaming); Wu et al., arXiv 2404.15574 (retrieval).
    """
    import pandas

    dataset = as_dataset(ds)
    require(dataset, *NEEDED)
    chosen = _queries(dataset, query_slice)
    scores = _scores(chosen) | {"sink": _on_sinks(dataset, chosen)}
    scores |= {"streaming": _streaming(dataset, chosen), "retrieval": _retrieval(dataset, needle)}
    lines = []
    for layer in dataset.layer.values:
        for head in dataset["head"].values:
            of_head = {role: float(scores[role].sel(layer=layer, head=head)) for role in THRESHOLDS}
            strength = {role: of_head[role] / threshold for role, threshold in THRESHOLDS.items()}
            if of_head["first_token_sink"] >= of_head["sink"] / 2:
                strength["first_token_sink"] = max(strength["first_token_sink"], strength["sink"])
            passed = [role for role, threshold in THRESHOLDS.items() if of_head[role] > threshold]
            roles = sorted(passed, key=lambda role: -strength[role])
            known = any(np.isfinite(score) for score in of_head.values())
            lines.append(
                {
                    "layer": int(layer),
                    "head": int(head),
                    "role": roles[0] if roles else "mixed" if known else None,
                    "roles": roles,
                    "score": of_head[roles[0]] if roles else np.nan,
                }
                | {f"{role}_score": score for role, score in of_head.items()}
            )
    frame = pandas.DataFrame(lines)
    frame.attrs["part"] = measured_part(dataset)
    return frame


def _queries(dataset: xarray.Dataset, query_slice: slice | None) -> xarray.Dataset:
    """The dataset and what uniform attention would give, with only the queries that count."""
    if query_slice is not None and not isinstance(query_slice, slice):
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


def _scores(dataset: xarray.Dataset) -> dict[str, xarray.DataArray]:
    """The score of every role, (layer, head)."""
    everywhere = ["batch", "query"]
    several = dataset.visible_keys > 1
    distances = dataset.mean_distance / share_of_keys(dataset), dataset.uniform_distance
    distance, uniform_distance = (each.where(several).mean(everywhere) for each in distances)
    # Unknown, it counts: it is so in packed documents, each of which begins with its sink.
    sees_sink = (dataset.visible_keys > measured_with(dataset, "sink_tokens")) & (dataset.uniform_sink_mass != 0)
    scores = {
        "first_token_sink": dataset.sink_mass.where(sees_sink).mean(everywhere),
        "local": 1 - distance / uniform_distance,
        "uniform": normalized_entropy(dataset).mean(everywhere),
    }
    for role in ("previous_token", "duplicate_token", "induction"):
        scores[role] = dataset[role].where(several).mean(everywhere)
    return scores


def _on_sinks(dataset: xarray.Dataset, chosen: xarray.Dataset) -> xarray.DataArray:
    """Mean mass on the sinks of the run, (layer, head), of the queries that see more than one key; NaN if unknown."""
    several, alone = dataset.visible_keys > 1, dataset.visible_keys == 1
    every = bool((several.sum("query") == (chosen.visible_keys > 1).sum("query")).all())
    if "received" not in dataset or not every:
        return dataset.entropy.mean(["batch", "query"]) * np.nan
    found = sink_positions(dataset)
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
    return total.where(known).sum("batch", min_count=1) / count.sum("batch").where(lambda queries: queries > 0)


def _streaming(dataset: xarray.Dataset, chosen: xarray.Dataset) -> xarray.DataArray:
    """Mean mass on sink and window, (layer, head), of the chosen queries that see a key outside; NaN if unknown."""
    if "local_mass" not in dataset or direction_of(dataset) != "causal":
        return dataset.entropy.mean(["batch", "query"]) * np.nan
    outside, _ = mass_outside(dataset)
    return 1 - outside.sel(query=chosen["query"].values).mean(["batch", "query"])


def _retrieval(dataset: xarray.Dataset, needle: tuple[int, int] | None) -> xarray.DataArray:
    """How much of the needle each head copied, (layer, head), mean over rows; NaN without a needle."""
    if needle is None:
        return dataset.entropy.mean(["batch", "query"]) * np.nan
    return retrieval_heads(dataset, needle).score.mean("batch")
