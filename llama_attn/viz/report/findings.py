"""What one run shows, in words: one paragraph per question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis import (
    classify_heads,
    layer_evolution,
    locality,
    massive_activations,
    sink_positions,
    sink_rate,
)
from llama_attn.analysis.activations import MAGNITUDE, RATIO, needed as needed_activations
from llama_attn.analysis.answer import GENERATED, seen_of_segments
from llama_attn.analysis.dataset import direction_of, real_tokens, without_attention
from llama_attn.analysis.locality import LOCAL_BELOW
from llama_attn.analysis.part import measured_part, named_layers
from llama_attn.analysis.sinks import EPSILON
from llama_attn.analysis.uniform import measured_with
from llama_attn.stats.shares import percent

if TYPE_CHECKING:
    import xarray

# Words, and tokens as {"token": position}.
Words = list[str | dict[str, int]]
# Those of a dataset may stand in any order.
AXES = ("layer", "hidden_layer", "batch", "head", "kv_head", "query", "key")
# So many examples of one kind are named.
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Args:
        question: As a user asks it.
        figure: The one number to remember, as text.
        caption: What the number is.
        words: The paragraph.
        missing: Statistics without which there is no answer.
    """

    question: str
    figure: str = ""
    caption: str = ""
    words: Words = field(default_factory=list)
    missing: tuple[str, ...] = ()


def findings(row: xarray.Dataset) -> list[Finding]:
    """Answer every question from one row of a batch; without data, or where a statistic is missing, say so.

    Where not all of the model was measured, every caption and paragraph says what was.
    """
    # "From the first to the last layer" is along the model.
    row = row.sortby([axis for axis in ("layer", "hidden_layer") if axis in row.coords])
    row = _of_measured_layers(row.transpose(*AXES, ..., missing_dims="ignore"))
    part = measured_part(row)
    questions: list[tuple[str, tuple[str, ...], Callable[[xarray.Dataset], tuple[str, str, Words]]]] = [
        ("Where are the attention sinks?", ("received",), _sinks),
        ("Is attention local or global?", ("local_mass", "mean_distance", "entropy"), _locality),
        ("How does it change through the layers?", ("entropy", "mean_distance"), _layers),
        (
            "What does each head do?",
            ("sink_mass", "mean_distance", "entropy", "previous_token", "duplicate_token", "induction"),
            _heads,
        ),
        (
            "Where are the massive activations?",
            needed_activations(row),
            _activations,
        ),
    ]
    if "segment_mass" in row and _has_parts(row):
        questions.append(("Which part of the text gets the attention?", ("segment_mass",), _segments))
    answers = []
    for question, needed, answer in questions:
        missing = tuple(name for name in needed if name not in row)
        empty = [name for name in needed if not missing and not np.isfinite(row[name].values).any()]
        if missing:
            answers.append(Finding(question, missing=missing))
        elif empty:
            answers.append(Finding(question, "–", "no data", [f"{' and '.join(empty)}: every number is missing."]))
        else:
            figure, caption, words = answer(row)
            if part:
                caption, words = f"{caption}; measured: {part}", [f"Measured: {part}. ", *words]
            answers.append(Finding(question, figure, caption, words))
    return answers


def _of_measured_layers(row: xarray.Dataset) -> xarray.Dataset:
    """Without the output of the last layer, if that layer was not measured: of what lies between nothing is known."""
    total = int(row.attrs.get("num_layers", 0))
    if "hidden_layer" not in row.coords or total - 1 in row.coords.get("layer", row["hidden_layer"]).values:
        return row
    return row.sel(hidden_layer=row["hidden_layer"].values != total)


def _sinks(row: xarray.Dataset) -> tuple[str, str, Words]:
    found = sink_positions(row).isel(batch=0)
    taken = found.share.mean(["layer", "head"])
    strongest = int(taken["key"].values[int(taken.fillna(-1).argmax("key"))])
    share = _percent(taken.sel(key=strongest))
    if dropped := int(row["key"].values[0]):
        words: Words = [f"The first {dropped} tokens are no longer in the cache. ", *_other_sinks(found, None)]
        words += ["The token that takes most of all attention is ", {"token": strongest}, f" at {strongest}: {share}. "]
        return share, "of all attention is taken by one token", [*words, _who_is_named(found)]
    rate, by_layer = sink_rate(row), sink_rate(row, by="layer").dropna("layer")
    first = int(row["key"].values[real_tokens(row, "key").isel(batch=0).values][0])
    words = [
        "The first token, ", {"token": first}, f", is a sink of {_percent(rate)} of the {_heads_of(row)}: it receives "
        f"more than {EPSILON:g} of the attention of the queries that see it. ",
    ]  # fmt: skip
    seen, fewest = int(found.queries.sel(key=first).min()), found.attrs["fewest_queries"][0]
    if np.isfinite(found.boost.values).any() and seen < fewest:
        words.append(f"As few as {seen:,} queries see it, where {fewest:,} tell a sink from chance. ")
    boost = float(found.boost.sel(key=first).mean())
    words.append(f"On average it takes {_percent(taken.sel(key=first))} of all attention")
    words.append(f", {_times(boost)} what uniform attention would give it. " if np.isfinite(boost) else ". ")
    if len(by_layer) > 1 and rate > 0:
        peak = by_layer[int(by_layer.argmax("layer"))]
        half = by_layer.layer.values[by_layer.values > 0.5]
        ties = int((by_layer == peak).sum()) - 1
        more = f" and {ties} more" if ties else ""
        words.append(f"The rate is highest in layer {int(peak.layer)}{more} ({_percent(peak)})")
        words.append(f" and first exceeds one half in layer {int(half[0])}. " if len(half) else ". ")
    words += _other_sinks(found, first)
    if strongest != first:
        words += ["Yet the token that takes most is ", {"token": strongest}, f" at {strongest}: {share}. "]
    words.append(_who_is_named(found))
    return _percent(rate), f"of heads have a sink at the first token (ε = {EPSILON:g}, T = {rate.attrs['T']})", words


def _other_sinks(found: xarray.Dataset, first: int | None) -> Words:
    """The sinks besides the first token, by what they take of all attention; each in the layer that gives it most."""
    named = found.layer_sink.any("layer") & (found["key"] != (-1 if first is None else first))
    taken = found.share.mean(["layer", "head"]).where(named, -1)
    order = np.argsort(-taken.values, kind="stable")[: int(named.sum())]
    if not len(order):
        known = np.isfinite(found.boost.values).any()
        return ["No other token is named. " if known and first is not None else ""]
    words: Words = ["Sinks" if first is None else "Other sinks", ", by the share of all attention: "]
    for number, at in enumerate(order[:EXAMPLES]):
        sink = found.isel(key=at)
        position, by_layer = int(sink["key"]), sink.share.mean("head").fillna(-1)
        peak = sink.isel(layer=int(by_layer.argmax("layer")))
        words += ["; " if number else "", {"token": position}, f" at {position} with {_percent(taken[at])}"]
        words.append(
            f" (most in layer {int(peak.layer)}: {_percent(peak.share.mean())}, {_times(float(peak.boost.mean()))} "
            f"uniform attention; seen by {int(peak.queries):,} queries)"
        )
    more = len(order) - EXAMPLES
    return [*words, f"; and {more} more. " if more > 0 else ". "]


def _who_is_named(found: xarray.Dataset) -> str:
    if not np.isfinite(found.boost.values).any():
        return "Other sinks are not named: behind this mask it is unknown what uniform attention would give."
    fewest = found.attrs["fewest_queries"][0]
    return (
        "Tokens are named if the heads of some layer give them, on average, more of all attention than chance "
        f"explains, and at least {fewest:,} queries see them."
    )


def _locality(row: xarray.Dataset) -> tuple[str, str, Words]:
    found = locality(row).isel(batch=0)
    known = found.reach != "no data"
    local = found.reach == "local"
    share = float(local.sum() / known.sum()) if known.any() else np.nan
    per_layer = local.where(known).mean("head").dropna("layer")
    window = measured_with(row, "window")
    over = " over what each layer sees" if "layer" in found.uniform_distance.dims else ""
    words: Words = [
        f"{int(local.sum())} of {int(known.sum())} heads are local: the keys they attend to lie less than "
        f"{LOCAL_BELOW:g} × as far away as under uniform attention. "
        f"The mean distance is {_number(found.mean_distance.mean())} tokens, and would be "
        f"{_number(found.uniform_distance.mean())} if attention were uniform{over}. ",
        # Of what lies nearer than any key can be, the share would be all.
        f"All that a token sees lies within the nearest {window} tokens. "
        if bool((found.uniform_local_mass.min() == 1).all())
        else f"The nearest {window} tokens hold {_percent(found.local_mass.mean())} of the attention, "
        f"against {_percent(found.uniform_local_mass.mean())}. ",
        _limits(row),
    ]
    if len(per_layer) > 1 and per_layer.max() > per_layer.min():
        most = per_layer[int(per_layer.argmax("layer"))]
        words.append(f"Local heads are most frequent in layer {int(most.layer)} ({_percent(most)} of its heads). ")
    entropy = found.normalized_entropy.mean()
    if np.isfinite(entropy):
        words.append(f"Entropy is {_percent(entropy)} of what uniform attention has.")
    return _percent(share), "of heads are local", words


def _limits(row: xarray.Dataset) -> str:
    """In which layers a query sees less than the text up to it, or all of it, and at most how much."""
    keys, seen = row["key"].values[real_tokens(row, "key").isel(batch=0).values], row.visible_keys.isel(batch=0)
    whole = len(keys) + 0 * row["query"]
    if direction_of(row) == "causal":
        whole = whole.copy(data=np.searchsorted(keys, row["query"].values, side="right"))
    seen = seen.where(seen > 0)
    limited = (seen < whole).any("query")
    most = seen.max("query")
    if "layer" not in limited.dims:
        return f"In every layer a query sees at most {int(most):,} tokens. " if limited else ""
    words = []
    for number in np.unique(most.values[limited.values]):
        layers = limited["layer"].values[limited.values & (most.values == number)].tolist()
        words.append(f"In {named_layers(layers)} a query sees at most {int(number):,} tokens. ")
    return "".join(words)


def _layers(row: xarray.Dataset) -> tuple[str, str, Words]:
    asked = {
        "entropy": ("Mean entropy", " nat"),
        "mean_distance": ("Mean distance to the attended keys", " tokens"),
        "sink_mass": (f"Attention of all queries on the first {_tokens(measured_with(row, 'sink_tokens'))}", ""),
        "hidden_norm": ("The norm of the residual stream", ""),
    }
    names = [name for name in asked if name in row]
    evolution = layer_evolution(row[names])
    words: Words = []
    for name in names:
        meaning, unit = asked[name]
        axis = str(evolution[name].dims[0])
        means = evolution[name].sel(summary="mean").dropna(axis)
        if not len(means):
            continue
        shown = _percent if row[name].attrs.get("units") == "probability" else _number
        low, high = (means[int(getattr(means, f"arg{end}")(axis))] for end in ("min", "max"))
        at = [
            "in the output" if layer == row.attrs.get("num_layers") else f"in layer {layer}"
            for layer in (int(low[axis]), int(high[axis]))
        ]
        words.append(
            f"{meaning} goes from {shown(means[0])} to {shown(means[-1])}{unit}; "
            f"lowest {at[0]} ({shown(low)}), highest {at[1]} ({shown(high)}). "
        )
    if absent := without_attention(row):
        words.append(f"There are no attention weights in {named_layers(absent)}.")
    entropy = evolution.entropy.sel(summary="mean").dropna("layer")
    ends = f"{_number(entropy[0])} → {_number(entropy[-1])}"
    first, last = (int(entropy.layer[at]) for at in (0, -1))
    return ends, f"nat: mean entropy of layer {first} and of layer {last}", words


def _heads(row: xarray.Dataset) -> tuple[str, str, Words]:
    frame = classify_heads(row)
    known = frame.dropna(subset="role")
    if known.empty:
        return "–", "no data", ["Every head lacks data."]
    counts = known.role.value_counts()
    listed = ", ".join(f"{count} {str(role).replace('_', ' ')}" for role, count in counts.items())
    words: Words = [f"Of {len(known)} heads: {listed}. "]
    for role in ("previous_token", "induction", "duplicate_token"):
        best = known.sort_values(f"{role}_score", ascending=False).head(EXAMPLES)
        named = ", ".join(
            f"{line['layer']}.{line['head']} ({line[f'{role}_score']:.2f})" for line in best.to_dict("records")
        )
        words.append(f"Highest {role.replace('_', '-')} scores (layer.head): {named}. ")
    words.append(
        "In ordinary text few tokens have an earlier copy, so heads that look for copies often rest on the sink; "
        "a random sequence repeated twice shows them better."
    )
    top = str(counts.index[0]).replace("_", " ")
    return _percent(counts.iloc[0] / len(known)), f"of heads are “{top}”, the most frequent role", words


def _activations(row: xarray.Dataset) -> tuple[str, str, Words]:
    found = massive_activations(row).isel(batch=0)
    peak = found.isel({axis: int(at) for axis, at in found.magnitude.argmax(["hidden_layer", "query"]).items()})
    where: Words = [{"token": int(peak["query"])}, f" at {int(peak['query'])}, channel {int(peak.channel)}, "]
    where.append(f"in what {_enters(row, int(peak.hidden_layer))}.")
    tokens = np.flatnonzero(found.massive.any("hidden_layer").values)
    # The steps of generating have no median in common.
    median = "the median" if "hidden_layer_median" in row else "the median of the tokens' medians"
    ratio = f"{_number(peak.ratio)} × {median}"
    figure, caption = _number(peak.magnitude), f"largest magnitude in the residual stream, {ratio}"
    bound = f"above {MAGNITUDE:g} and at least {RATIO:,.0f} × {median}"
    if not len(tokens):
        words = [f"No activation is massive ({bound}). The largest is {_number(peak.magnitude)}, on ", *where]
        return figure, caption, words
    words = [f"{'One token has' if len(tokens) == 1 else f'{len(tokens)} tokens have'} massive activations ({bound}). "]
    for at in tokens[np.argsort(-found.magnitude.max("hidden_layer").values[tokens])][:EXAMPLES]:
        token = found.isel(query=at)
        inside = token.massive.values
        words += [{"token": int(token["query"])}, f" at {int(token['query'])}: {_channels(row, token)}"]
        if "sink_heads" in found:
            layers = [layer for layer in token.hidden_layer.values[inside] if layer in row["layer"].values]
            share = token.sink_heads.sel(layer=layers).mean()
            words.append(f"; {_percent(share)} of the heads of these layers have their sink here" if layers else "")
        words.append(". ")
    return figure, caption, [*words, f"The largest, {_number(peak.magnitude)}, is on ", *where]


def _has_parts(row: xarray.Dataset) -> bool:
    """Whether what was read has several parts: of all that was fed, all attention goes to it."""
    if "key_segment" not in row.coords:
        return True
    real = real_tokens(row, "key").isel(batch=0).values
    return len({*row.key_segment.values[0][real].tolist()} - {GENERATED}) > 1


def _segments(row: xarray.Dataset) -> tuple[str, str, Words]:
    mass = row.segment_mass.isel(batch=0)
    shares, last = mass.mean(["layer", "head", "query"]), mass.dropna("query", how="all").isel(query=-1)
    of_last = last.mean(["layer", "head"])
    order = shares.values.argsort(kind="stable")[::-1]
    names = [f"“{row.segment.values[at]}”" for at in order]
    listed = ", ".join(f"{name} {_percent(shares[at])}" for name, at in zip(names, order, strict=True))
    words: Words = [
        f"Of all attention: {listed}; tokens of no part, {_percent(max(0.0, 1 - float(shares.sum())))}. "
        "Early tokens see the first parts only. "
    ]
    listed = ", ".join(f"{name} {_percent(of_last[at])}" for name, at in zip(names, order, strict=True))
    words += ["Of the attention of the last measured token, ", {"token": int(last["query"])}, f": {listed}. "]
    by_layer = mass.mean(["head", "query"])
    if by_layer.sizes["layer"] > 1:
        for name, at in zip(names, order[:EXAMPLES], strict=False):
            peak = by_layer[:, at].isel(layer=int(by_layer[:, at].fillna(-1).argmax("layer")))
            words.append(f"{name} gets most in layer {int(peak.layer)} ({_percent(peak)}). ")
    even = _even_shares(row)
    if even is None:
        return _percent(shares[order[0]]), f"of all attention goes to {names[0]}", words
    listed = ", ".join(f"{name} {_percent(even[at])}" for name, at in zip(names, order, strict=True))
    words.append(f"Uniform attention would give {listed}.")
    # The longest part says nothing by being long.
    at = int((shares - even).argmax("segment"))
    if _percent(shares[at]) == _percent(even[at]):
        return "–", "no part gets more than uniform attention would give it", words
    name = names[order.tolist().index(at)]
    return _percent(shares[at]), f"of all attention goes to {name}, uniform attention: {_percent(even[at])}", words


def _even_shares(row: xarray.Dataset) -> xarray.DataArray | None:
    """What uniform attention gives each segment, on average over layers and queries; None if it is unknown who sees whom."""
    if "key_segment" not in row.coords:
        return None
    try:
        seen = seen_of_segments(row)
    except ValueError:
        # Behind a mask of the user's own.
        return None
    shares = (seen / row.visible_keys.where(row.visible_keys > 0)).isel(batch=0)
    return shares.mean([dim for dim in shares.dims if dim != "segment"])


def _channels(row: xarray.Dataset, token: xarray.Dataset) -> str:
    """The channels of a token's massive activations and where, those first that are massive in most layers."""
    listed = token.channels.values
    numbers, counts = np.unique(listed[listed >= 0], return_counts=True)
    words = []
    for number in numbers[np.argsort(-counts, kind="stable")][:EXAMPLES]:
        layers = token.hidden_layer.values[(listed == number).any(-1)]
        first, last = (_enters(row, int(layers[end])) for end in (0, -1))
        where = f"in what {first}" if first == last else f"from what {first} to what {last}"
        words.append(f"channel {number} {where}")
    if len(numbers) > len(words):
        words.append(f"{len(numbers) - len(words)} more")
    # Where everything that was measured of the token is massive, more may be.
    unknown = "" if token.complete.all() else ", and perhaps others that were not measured"
    return f"{', '.join(words)}{unknown}"


def _tokens(count: int) -> str:
    return "token" if count == 1 else f"{count} tokens"


def _enters(row: xarray.Dataset, layer: int) -> str:
    return "leaves the last layer" if layer == row.attrs.get("num_layers") else f"enters layer {layer}"


def _heads_of(row: xarray.Dataset) -> str:
    layers, heads = row.sizes["layer"], row.sizes["head"]
    return f"{layers * heads} heads" if layers * heads > 1 else "one head"


def _percent(share: Any) -> str:
    share = float(share)
    return percent(share, 1 if 0 < share < 0.095 else 0)


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 10 else f"{ratio:,.0f} times"


def _number(value: Any) -> str:
    value = float(value)
    if not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
