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
from llama_attn.analysis.dataset import direction_of, real_tokens, without_attention
from llama_attn.analysis.locality import LOCAL_BELOW
from llama_attn.analysis.sinks import EPSILON
from llama_attn.analysis.uniform import measured_with
from llama_attn.viz.style import named_layers

if TYPE_CHECKING:
    import xarray

# Words, and tokens as {"token": position}.
Words = list[str | dict[str, int]]
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
    """Answer every question from one row of a batch; without data, or where a statistic is missing, say so."""
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
    answers = []
    for question, needed, answer in questions:
        missing = tuple(name for name in needed if name not in row)
        empty = [name for name in needed if not missing and not np.isfinite(row[name].values).any()]
        if missing:
            answers.append(Finding(question, missing=missing))
        elif empty:
            answers.append(Finding(question, "–", "no data", [f"{' and '.join(empty)}: every number is missing."]))
        else:
            answers.append(Finding(question, *answer(row)))
    return answers


def _sinks(row: xarray.Dataset) -> tuple[str, str, Words]:
    found = sink_positions(row).isel(batch=0)
    received = row.received.isel(batch=0).mean(["layer", "head"])
    if dropped := int(row["key"].values[0]):
        words: Words = [
            f"The first {dropped} tokens are no longer in the cache. ",
            *_other_sinks(found, received, None),
        ]
        return _percent(found.heads.max()), "of heads have a sink at the key where most have one", words
    rate, by_layer = sink_rate(row), sink_rate(row, by="layer").dropna("layer")
    first = int(row["key"].values[real_tokens(row, "key").isel(batch=0).values][0])
    words = [
        "The first token, ", {"token": first}, f", is a sink of {_percent(rate)} of the {_heads_of(row)}: it receives "
        f"more than {EPSILON:g} of the attention of the queries that see it. ",
    ]  # fmt: skip
    boost = float(found.boost.sel(key=first).mean())
    if np.isfinite(boost):
        words.append(f"On average it receives {_times(boost)} what uniform attention would give it. ")
    if len(by_layer) > 1:
        peak = by_layer[int(by_layer.argmax("layer"))]
        half = by_layer.layer.values[by_layer.values > 0.5]
        words.append(f"The rate is highest in layer {int(peak.layer)} ({_percent(peak)})")
        words.append(f" and first exceeds one half in layer {int(half[0])}. " if len(half) else ". ")
    words += _other_sinks(found, received, first)
    return _percent(rate), f"of heads have a sink at the first token (ε = {EPSILON:g}, T = {rate.attrs['T']})", words


def _other_sinks(found: xarray.Dataset, received: xarray.DataArray, first: int | None) -> Words:
    """The sinks besides the first token, and the strongest of all."""
    heads = found.heads.fillna(0)
    others = heads.where(heads["key"] != first, 0) if first is not None else heads
    order = np.argsort(-others.values, kind="stable")[:EXAMPLES]
    named = [others[at] for at in order if others.values[at] > 0]
    words: Words = ["Sinks: " if first is None else "Other sinks: "] if named else []
    for number, share in enumerate(named):
        position = int(share["key"])
        words += ["; " if number else "", {"token": position}, f" at {position}, of {_percent(share)}"]
    words += [" of the heads. "] if named else []
    if heads.max() > 0:
        strongest = received[int(received.where(heads > 0).fillna(-1).argmax("key"))]
        position = int(strongest["key"])
        words += ["The token that receives most is ", {"token": position}]
        words.append(f" at {position}, with {float(strongest):.2g} on average over all heads.")
    return words


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
        f"{_number(found.uniform_distance.mean())} if attention were uniform{over}. The nearest {window} tokens hold "
        f"{_percent(found.local_mass.mean())} of the attention, against {_percent(found.uniform_local_mass.mean())}. ",
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
        "sink_mass": ("Attention on the sink tokens", ""),
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
    return ends, "nat: mean entropy of the first and of the last measured layer", words


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
    ratio = f"{_number(peak.ratio)} × the median"
    figure, caption = _number(peak.magnitude), f"largest magnitude in the residual stream, {ratio}"
    bound = f"above {MAGNITUDE:g} and at least {RATIO:,.0f} × the median magnitude"
    if not len(tokens):
        words = [f"No activation is massive ({bound}). The largest is {_number(peak.magnitude)}, on ", *where]
        return figure, caption, words
    words = [f"{'One token has' if len(tokens) == 1 else f'{len(tokens)} tokens have'} massive activations ({bound}). "]
    for at in tokens[np.argsort(-found.magnitude.max("hidden_layer").values[tokens])][:EXAMPLES]:
        token = found.isel(query=at)
        inside = token.massive.values
        words += [{"token": int(token["query"])}, f" at {int(token['query'])}: {_channels(token)}"]
        last = int(token.hidden_layer.values[inside][-1])
        words.append(f", from what {_enters(row, int(token.appears))} to what {_enters(row, last)}")
        if "sink_heads" in found:
            layers = [layer for layer in token.hidden_layer.values[inside] if layer in row["layer"].values]
            share = token.sink_heads.sel(layer=layers).mean()
            words.append(f"; {_percent(share)} of the heads of these layers have their sink here" if layers else "")
        words.append(". ")
    return figure, caption, [*words, f"The largest, {_number(peak.magnitude)}, is on ", *where]


def _channels(token: xarray.Dataset) -> str:
    """The channels of a token's massive activations, those first that are massive in most layers."""
    listed = token.channels.values
    numbers, counts = np.unique(listed[listed >= 0], return_counts=True)
    shown = [str(number) for number in numbers[np.argsort(-counts, kind="stable")][:EXAMPLES]]
    more = "" if len(numbers) == len(shown) else f" and {len(numbers) - len(shown)} more"
    # Where everything that was measured of the token is massive, more may be.
    unknown = "" if token.complete.all() else ", and perhaps others that were not measured"
    return f"channel{'s' if len(numbers) > 1 else ''} {', '.join(shown)}{more}{unknown}"


def _enters(row: xarray.Dataset, layer: int) -> str:
    return "leaves the last layer" if layer == row.attrs.get("num_layers") else f"enters layer {layer}"


def _heads_of(row: xarray.Dataset) -> str:
    layers, heads = row.sizes["layer"], row.sizes["head"]
    return f"{layers * heads} heads" if layers * heads > 1 else "one head"


def _percent(share: Any) -> str:
    share = float(share)
    if not np.isfinite(share):
        return "–"
    return f"{share:.0%}" if share == 0 or share >= 0.095 else f"{share:.1%}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 10 else f"{ratio:,.0f} times"


def _number(value: Any) -> str:
    value = float(value)
    if not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
