"""What does the answer draw on?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.answer import (
    GENERATED,
    SPECIAL,
    answering,
    generated_tokens,
    pick_names,
    require_segments,
    seen_keys,
    seen_of_segments,
)
from llama_attn.analysis.dataset import as_dataset, check_measured, real_tokens
from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.uniform import measured_with
from llama_attn.stats.integers import is_integer

if TYPE_CHECKING:
    import pandas
    import xarray

    from llama_attn.analysis.dataset import Source

SHARES = (
    "share", "all_heads", "uniform", "relative", "without_sink", "uniform_without_sink", "relative_without_sink",
)  # fmt: skip


def sources(
    ds: Source,
    *,
    heads: Mapping[int, Sequence[int]] | None = None,
    among: Sequence[str] | None = None,
    batch: int = 0,
) -> pandas.DataFrame:
    """For every generated token, and on average, how much of the attention goes to each segment.

    The attention is that of the query which the token was drawn from, the token before it.

    Args:
        ds: Statistics of a run of ``generate`` with segments; to take out the sink, with ``row_weights`` of these
            queries (``rows="generated"``) or with ``sink_mass``.
        heads: Heads of each layer to average over, e.g. those that `retrieval_heads` finds: ``{17: [3, 4], 18: [6]}``;
            None for all.
        among: Segments of which one wins; None for those of the prompt, without the template's ``special``.
        batch: Row of the batch.

    Returns:
        One line per generated token and segment, then one per segment for the mean over tokens, whose ``position`` is
        −1 and whose ``token`` is ``"mean"``. The columns are

        - ``position`` of the generated token;
        - ``token``, missing where it is not known, as for the last, which was never fed back;
        - ``segment``;
        - ``tokens``, how many of its tokens the query sees, on average over layers;
        - ``share`` of the attention of the chosen heads, and ``all_heads`` of all; what is missing to 1 lies in no
          segment, or in a learned sink;
        - ``uniform``, the share of the tokens that the query sees, which is what uniform attention would give;
        - ``relative``, share over uniform: 1 is uniform attention, whatever the length of the segment;
        - ``without_sink``, ``uniform_without_sink`` and ``relative_without_sink``, the same of what does not go to the
          first ``sink_tokens`` tokens;
        - ``wins``: whether the segment has the largest ``without_sink`` of those ``among`` which one shall win, the
          first of equal ones, and none where there is no data.

        ``attrs`` hold ``exact``, whether the sink was taken out of the weights themselves, and ``part``.

    Raises:
        ValueError: There are no segments, no generated tokens, or no such segment, head or row; or what the sink takes
            of each segment cannot be known from what was measured, and the message names what to ask for.

    Source: attention to parts of the prompt as in Chuang et al., arXiv 2407.07071; sinks: Xiao et al., arXiv 2309.17453.
    """
    import pandas
    import xarray

    dataset = as_dataset(ds)
    require_segments(dataset)
    check_measured(dataset, "batch", batch)
    names = [str(name) for name in dataset["segment"].values]
    candidates = _among(dataset, names, among)
    if dropped := int(dataset["key"].values[0]):
        raise ValueError(f"source: the first {dropped} tokens, the sink among them, are no longer in the cache")
    dataset = dataset.sel(batch=[batch])
    chosen = _chosen_heads(dataset, heads)
    marks = sink_keys(dataset)
    answer = answering(dataset)
    queries = answer["query"].values
    seen, of_sink = seen_of_segments(dataset), seen_of_segments(dataset, marks)
    visible = dataset.visible_keys
    sinks_seen = seen_keys(dataset, marks.expand_dims(segment=["sink"])).isel(segment=0, drop=True)
    taken, exact = sink_by_segment(answer, marks)
    left_of_segments = answer.segment_mass.copy()
    for name in taken.keys() & {*names}:
        left_of_segments.loc[{"segment": name}] = answer.segment_mass.sel(segment=name) - taken[name]
    nothing = xarray.zeros_like(answer.segment_mass.isel(segment=0, drop=True))
    all_sinks = sum(taken.values(), answer.learned_sink_mass if "learned_sink_mass" in answer else nothing)

    def pooled(values: xarray.DataArray, where: xarray.DataArray) -> xarray.DataArray:
        return values.where(where).mean(["layer", "head"]).isel(batch=0)

    def per_query(counts: xarray.DataArray) -> xarray.DataArray:
        counts = counts.isel(batch=0).sel(query=queries)
        # Where layers differ, as many times as heads of each are chosen.
        return counts.weighted(chosen.sum("head")).mean("layer") if "layer" in counts.dims else counts

    everything = chosen | True
    share, of_all = pooled(answer.segment_mass, chosen), pooled(answer.segment_mass, everything)
    # Of the sums over heads: a head that rests on the sink says little of the rest, and one without data nothing of either.
    known = chosen & all_sinks.notnull() & answer.segment_mass.notnull().all("segment")
    rest = 1 - pooled(all_sinks, known)
    without = pooled(left_of_segments.clip(min=0), known) / rest.where(rest > 1e-6)
    tokens, left = per_query(seen), per_query(seen - of_sink)
    among_seen, among_left = tokens / per_query(visible), left / per_query(visible - sinks_seen)
    real = per_query(visible) > 0
    numbers = {
        "tokens": tokens,
        "share": share,
        "all_heads": of_all,
        "uniform": among_seen,
        "relative": share / among_seen.where(among_seen > 0),
        "without_sink": without,
        "uniform_without_sink": among_left,
        "relative_without_sink": without / among_left.where(among_left > 0),
    }
    numbers = {name: values.transpose("query", "segment").values[real.values] for name, values in numbers.items()}
    strings = np.array(generated_tokens(answer, 0), dtype=object)[real.values]
    positions = queries[real.values] + 1
    if not len(positions):
        raise ValueError(f"batch: no token of row {batch} was generated")
    lines = pandas.DataFrame(
        {
            "position": np.repeat(positions, len(names)),
            # Not pandas' own type of strings, which holds no halves of characters.
            "token": pandas.Series(np.repeat(strings, len(names)), dtype=object),
            "segment": names * len(positions),
        }
        | {name: values.reshape(-1) for name, values in numbers.items()}
    )
    means = lines.groupby("segment", sort=False)[["tokens", *SHARES]].mean().reset_index()
    means["position"], means["token"] = -1, "mean"
    means = means[[*lines.columns]]
    frame = pandas.concat([lines, means], ignore_index=True)
    frame["wins"] = _winners(frame, candidates)
    frame.attrs = {"exact": exact, "part": measured_part(dataset)}
    return frame


def sink_by_segment(answer: xarray.Dataset, marks: xarray.DataArray) -> tuple[dict[str, xarray.DataArray], bool]:
    """What the sink takes of the attention of each query, by the segments that its tokens lie in.

    Args:
        answer: The queries that the answer was written from, in one row of the batch.
        marks: Which keys are the sink, (batch, key), as `sink_keys` says.

    Returns:
        Shares of single segments, or of no segment, by name, (layer, batch, head, query) [probability], which are not a
        number where a weight of the sink is none; and whether the weights themselves say so.

    Raises:
        NotMeasuredError: Neither the weights nor ``sink_mass`` of a sink in one segment were measured.
    """
    queries, places = answer["query"].values, np.flatnonzero(marks.isel(batch=0).values)
    labels = answer.key_segment.isel(batch=0, key=places).values.astype(str)
    holding = sorted(set(labels.tolist()))
    if "row_weights" in answer and np.isin(queries, answer["row"].values).all():
        # Of few keys only: all of them may be more than memory holds once more.
        rows = answer.row_weights.isel(key=places).sel(row=queries).rename(row="query")
        return {name: rows.isel(key=labels == name).sum("key", skipna=False) for name in holding}, True
    if "sink_mass" not in answer:
        raise NotMeasuredError(
            "source: how much goes to the sink is not known",
            ["sink_mass"],
            'measure "sink_mass", or the rows themselves with AttentionStatsConfig(rows="generated")',
            answer.data_vars,
        )
    if len(holding) > 1:
        raise NotMeasuredError(
            f"source: the sink's tokens lie in {len(holding)} segments, {holding}, and nothing says what each of them gets",
            ["sink_tokens"],
            'measure the rows themselves with AttentionStatsConfig(rows="generated"), or with sink_tokens=1',
        )
    return dict.fromkeys(holding, answer.sink_mass), False


def sink_keys(dataset: xarray.Dataset) -> xarray.DataArray:
    """The first ``sink_tokens`` real keys of the row, (batch, key)."""
    real = real_tokens(dataset, "key")
    return real & (real.cumsum("key") <= measured_with(dataset, "sink_tokens"))


def _chosen_heads(dataset: xarray.Dataset, heads: Mapping[int, Sequence[int]] | None) -> xarray.DataArray:
    """Which heads count, (layer, head)."""
    import xarray

    layers, known = dataset["layer"].values, dataset["head"].values
    chosen = np.full((len(layers), len(known)), heads is None)
    if heads is not None and (not isinstance(heads, Mapping) or not heads):
        raise ValueError(f"heads: expected heads of each layer, such as {{17: [3, 4]}}, got {heads!r}")
    for layer, wanted in (heads or {}).items():
        if not is_integer(layer) or layer not in layers:
            raise ValueError(f"heads: layer {layer!r} was not measured; there are {layers.tolist()}")
        wanted = list(wanted) if isinstance(wanted, Iterable) else [wanted]
        if not wanted or any(not is_integer(head) or head not in known for head in wanted):
            raise ValueError(f"heads: expected some of {known.tolist()} in layer {layer}, got {wanted!r}")
        chosen[np.ix_(layers == layer, np.isin(known, wanted))] = True
    return xarray.DataArray(chosen, {"layer": layers, "head": known}, ("layer", "head"))


def _among(dataset: xarray.Dataset, names: list[str], among: Sequence[str] | None) -> list[str]:
    """Segments of which one wins."""
    if among is not None:
        return pick_names("among", among, dataset)
    of_prompt = [name for name in names if name != GENERATED]
    return [name for name in of_prompt if name != SPECIAL] or of_prompt


def _winners(frame: pandas.DataFrame, candidates: list[str]) -> np.ndarray:
    """Which line of each token has the largest share of those that may win."""
    wins = np.zeros(len(frame), dtype=bool)
    may_win = frame[frame.segment.isin(candidates) & (frame.without_sink > 0)]
    wins[may_win.groupby("position").without_sink.idxmax().to_numpy(dtype=int)] = True
    return wins
