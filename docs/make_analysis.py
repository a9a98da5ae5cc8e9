"""Write the page on analysis, with numbers measured on SmolLM2; run by ``python docs/make_gallery.py``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from measured_runs import REPEATED, ROWS, Runs

from llama_attn import analysis
from llama_attn.analysis.roles import THRESHOLDS
from llama_attn.analysis.sinks import EPSILON, by_chance
from llama_attn.stats.token_text import readable

if TYPE_CHECKING:
    import pandas
    import xarray

PAGE = """# Analysis

Each function takes an `AttentionStats`, an `xarray.Dataset` or the path of a saved file, and returns xarray or pandas.
None needs a model. A statistic that is missing is an error that names the configuration to ask for. Padding is NaN in
the statistics and counts nowhere. This page is written by `docs/make_gallery.py`; the figures are in
[Gallery](gallery.md), the numbers of papers and other tools in [Recipes](recipes.md).

A = attention weights, i = query, j = key, n_i = number of keys that query i may see, α_k = `received` of key k: the
mean of A_ik over the queries that may see k.

| question | function | answer | source | figure |
|---|---|---|---|---|
| How strong are the sinks? | `sink_rate(ds, epsilon=0.3, key=0, by=None)` | mean over rows, layers and heads of 1[α_key > ε]; `key` counts real tokens; `attrs` hold ε and the length T, on which the rate depends | Gu et al., arXiv 2410.10781 | `plot_head_grid(…, statistic="sink_mass")` |
| Which tokens are sinks? | `sink_positions(ds, epsilon=0.3, fewest_queries=None)` | every key's `share` of all attention, its `boost` over uniform attention and how many `queries` see it; `sink` of a head: α_key > ε; `layer_sink`: more on average over the heads of a layer than chance explains; only with enough queries, see below | the same; Bernstein's inequality; baseline as in attention-sink-profiler | `plot_token_strip` |
| Is attention local or global? | `locality(ds)` | local mass, mean distance, H_i / ln n_i, and the mean distance over that of uniform attention; `local` below 0.5 | Vig & Belinkov (2019), arXiv 1906.04284; Zhai et al., arXiv 2303.06296 | `plot_distance_histogram` |
| How does it change through the layers? | `layer_evolution(ds)` | mean, standard deviation, smallest and largest over heads of every statistic; norms over tokens | | `plot_layer_profile` |
| What does each head do? | `classify_heads(ds, query_slice=None, needle=None)` | scores and a role per head, see below | TransformerLens, head_detector; Olsson et al., arXiv 2209.11895; Gu et al. | `plot_head_roles` |
| Where are the massive activations? | `massive_activations(ds, magnitude=100, ratio=1000)` | numbers that exceed 100 and reach 1,000 × the median of the state; every channel of each token, layers where they appear and disappear, share of heads for which the token is a sink | Sun et al., arXiv 2402.17762 | `plot_massive_activations` |
| What differs between two runs? | `compare(a, b)` | per statistic, layer and head: difference of the means over aligned tokens; `matched`, the same at matched positions; effect = root mean square difference at matched positions / standard deviation of the statistic over all layers, heads and aligned tokens of both, or its rounding error where that is larger; `attrs` say how many tokens were aligned, what was left out, and warn of texts with little in common, see below | | `plot_comparison`, `plot_head_comparison` |
| How many keys hold most of the attention? | `coverage(ds, mass=(0.5, 0.9, 0.95, 0.99))` | `least` and `most`: bounds on the keys per query that hold a share of the attention, if they are chosen best, from `weight_count` and `weight_mass`; `uniform`, the same of uniform attention | derived in its docstring | `plot_coverage` |
| Which keys would a smaller cache keep? | `keep_mask(ds, policy, budget, sink=4, recent=None)` | booleans (layer, batch, kv_head, key) for `AttentionStatsConfig(keep=…)` and `block_keys`; policies `streaming`, `h2o`, `snapkv`, `tova`, `knorm` | Xiao et al.; Zhang et al.; Li et al.; Oren et al.; Devoto et al. | `plot_budget` |
| Which heads fetch facts from the prompt? | `retrieval_heads(ds, needle=(first, stop))` | per row and head the share of the needle that it copied: a generated token equals the token that the head attends most, and that lies in the needle | Wu et al., arXiv 2404.15574 | |
| Which heads need only the sink and what is near? | `streaming_heads(ds, threshold=0.1)` | mass outside of sink and window, over the queries that see something outside; `streaming` below the threshold, else `retrieval` | Xiao et al., arXiv 2410.10819 (DuoAttention) | `plot_head_roles` |
| Does the answer look back at the context? | `lookback_ratio(ds, context=None, new=None)` | per head and generated token: mean attention per token on the context, over that and that on new tokens, the generated ones and those of segments that `new` names | Chuang et al., arXiv 2407.07071 | |
| Which part of the prompt did the answer come from? | `sources(ds, heads=None, among=None, batch=0)` | per generated token, and on average: the share of attention on each segment, with and without the sink, over that of uniform attention, and which segment wins | | `plot_sources`, `plot_rows` |
| How much of what a key receives comes through? | `received_norm(ds)` | Σ_i A_ik times the norm of the value behind its head's output projection | Kobayashi et al., arXiv 2004.10102 | `plot_token_strip` |
| All of it in one line per layer? | `summarize_layers(ds)` | sink mass, the key that takes most of all attention, largest activation | Gu et al.; Sun et al. | what `llama-attn demo` prints |

Rows of several texts are put together by `AttentionStats.concat([a, b, …])`, as if they had been one batch. Queries that
a generated token was drawn from are the token before it; the last token was never fed back, so that nobody knows it.

`head_means(ds, statistic)` is the (layer, head) table behind `plot_head_grid`.

## Uniform attention as the yardstick

In a short text every head seems to have a sink and to look nearby: the first of two keys receives at least half of the
attention, whatever a head does. Boost and relative distance therefore divide by what uniform attention over the same
keys would give, row by row and, where they differ, layer by layer, with windows, padding, packing, caches and strides
as they were. Who sees whom follows from how many keys each query sees and how many queries see each key: exactly, where
a query sees the last real keys up to itself, or a run of keys whose ends never move backwards from query to query. That
is so for windows, chunks and packed documents, in causal attention and in attention to both sides, and for
cross-attention, which has no distances. Behind a 4-D mask of the user's own that the counts do not explain, all of it
is NaN. With `learned_sink_mass`, distances are of the attention that is left to keys, and entropy counts the learned
sink as one more outcome.

## How many queries a sink needs

The last tokens of a text are seen by a few queries only, all of them near, so α_k > ε says nothing of them. A key is
named a sink with enough queries behind it, and sinks are ranked by the share of all attention that they take,
Σ_i A_ik / Q for the Q real queries of the row. The number follows from what a head that prefers no token gives to a
key: u queries' worth, what uniform attention gives it or 1, the most that attention by distance alone does, since Q
queries share Q keys. If each query draws for itself, that is exceeded, but for one row in 20, by no more than t of
Bernstein's inequality for weights in [0, 1]: c = u + t with t = L/3 + √(L²/9 + 2uL), L = ln(20 Q).

- `sink`, of one head: α_k > ε, and c / ε queries (u = 1) see the key, or all of the row if they are fewer.
- `layer_sink`: on average over its heads the layer gives the key more than c, with the key's own u, and as many queries
  see it. Heads may share several sinks of which none gets more than ε from any head.

| queries of the row | c | must see a sink |
| --- | --- | --- |
{fewest}

`fewest_queries` sets another number, `attrs` hold the one that was used. `sink_rate` is as Gu et al. define it: α_k > ε
alone, of one key.

## Roles of heads

{roles}

`role` has the largest score relative to its threshold, `roles` lists all that passed, `mixed` passed none. Of both
kinds of sinks the role is `first_token_sink` where its own score passes and at least half of what is on sinks is on the
first tokens. Sink,
previous-token, duplicate-token and induction scores are shares of the same attention, so they have the same threshold,
the ε of Gu et al.; `local` is where `locality` draws the line; 0.9 for `uniform` and `streaming` is a choice; 0.1 for
`retrieval` is that of Wu et al. `retrieval` is known with `needle=` only, `streaming` of texts longer than the window.
In ordinary text few tokens have an earlier copy, and heads that look for one rest on the sink, so use a random sequence
repeated twice and pass the second half as `query_slice`.

SmolLM2-135M-Instruct, {rows} rows of {repeated} random tokens, twice, behind `<|im_start|>`; queries of the second half:

{heads}

Of {total} heads: {counts}. On the opening of *Moby-Dick* (T = {length}) the same model has {text_counts}.

## Two runs of different texts

`compare` aligns tokens by what they are. A token that stands later sees more keys, and that alone changes entropy,
distances and what a key receives. So where aligned tokens stand at different positions, counted in real tokens, each
number is taken less what both runs have on average in this layer and head from p / √2 to √2 p around its position p:
`matched` and `effect` are of these, `mean_a`, `mean_b`, `difference` and `largest` of the numbers as they are.
`attrs["summary"]` says how much was compared (“59 of 451 tokens aligned”), `attrs["left_out"]` what was not and why;
below half of the shorter text `attrs["warning"]` and a `UserWarning` say that what differs may be the texts.

## What else this model shows on that text

- Sink rate {sink_rate:.2f} (ε = 0.3, first token, T = {length}); by layer from {lowest:.2f} to {highest:.2f}.
- Other sinks, by their share of all attention: {other_sinks}. At least {needed} queries must see one.
- {local} of {total} heads are local.
- Massive activations: {massive}.

`massive_activations` compares with `hidden_layer_median`, the median over all tokens and channels of a layer. A run of
several forwards, as of `generate`, cannot have it; there the median over tokens of `hidden_median` stands in, which on
this text is {median_low:.3f} to {median_high:.3f} × the median of the layer. How many channels of a token are known is
up to `top_k`; without `hidden_top` it is one, and `complete` says so.
"""


def _table(columns: list[str], lines: list[list[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _roles() -> str:
    meanings = {
        "first_token_sink": "mass on the first `sink_tokens` tokens, of queries that see more than these",
        "sink": "mass on all tokens that are a `layer_sink` of some measured layer; of all queries only",
        "previous_token": "mass on the token before",
        "duplicate_token": "mass on earlier copies of the query's token",
        "induction": "mass on tokens that followed earlier copies of the query's token",
        "local": "1 − mean distance / mean distance of uniform attention",
        "uniform": "mean of H_i / ln n_i",
        "streaming": "mass on the first `sink_tokens` tokens and within `window`, of queries that see more than these",
        "retrieval": "share of the `needle` that the head copied into the answer, of runs of `generate`",
    }
    lines = [[f"`{role}`", meanings[role], f"{threshold:g}"] for role, threshold in THRESHOLDS.items()]
    return _table(["role", "score, a mean over rows and queries that see more than one key", "threshold"], lines)


def _heads(frame: pandas.DataFrame) -> str:
    lines = []
    for role in ("previous_token", "duplicate_token", "induction"):
        of_role = frame[frame.role == role].sort_values("score", ascending=False)
        named = ", ".join(f"{line.layer}.{line.head} ({line.score:.2f})" for line in of_role.itertuples())
        lines.append([f"`{role}`", named])
    return _table(["role", "layer.head (score)"], lines)


def _counts(frame: pandas.DataFrame) -> str:
    return ", ".join(f"{count} {role.replace('_', ' ')}" for role, count in frame.role.value_counts().items())


def _fewest() -> str:
    lines = []
    for queries in (34, 132, 700, 8192, 131_072):
        c = float(by_chance(1.0, np.array(queries)))
        lines.append(f"| {queries:,} | {c:.1f} | {math.ceil(c / EPSILON)} |")
    return "\n".join(lines)


def _others(sinks: xarray.Dataset) -> str:
    """The sinks besides the first token, those first that take most."""
    share = sinks.share.mean("head")
    named = [key for key in np.argsort(-share.mean("layer").values) if key and sinks.layer_sink[:, key].any()]
    described = []
    for key in named:
        peak = int(share[:, key].values.argmax())
        described.append(
            f"`{readable(str(sinks.key_token.values[key]))}` at {key} takes {float(share[:, key].mean()):.1%}, "
            f"{float(share[peak, key]):.0%} in layer {peak} ({float(sinks.boost[peak, :, key].mean()):.0f} × uniform), "
            f"seen by {int(sinks.queries[key])} queries"
        )
    return "; ".join(described)


def _massive(found: xarray.Dataset) -> str:
    row = found.isel(batch=0)
    described = []
    for query in np.flatnonzero(row.massive.any("hidden_layer")):
        token = row.isel(query=query)
        layers = token.hidden_layer.values[token.massive.values]
        described.append(
            f"token {query} `{readable(str(token.query_token.values))}`, {_channels(token)}, "
            f"up to {float(token.magnitude.max()):,.0f} = {float(token.ratio.max()):,.0f} × the median, in what enters "
            f"layers {layers.min()} to {layers.max()}"
        )
    return "; ".join(described)


def _channels(token: xarray.Dataset) -> str:
    channels = np.unique(token.channels.values[token.channels.values >= 0])
    return f"channel{'s' if len(channels) > 1 else ''} {', '.join(map(str, channels))}"


def analysis_page(runs: Runs) -> str:
    """The page with the numbers of these runs."""
    text = runs.text.to_xarray()
    frame = analysis.classify_heads(runs.repeated, slice(REPEATED + 1, None))
    rate, by_layer = analysis.sink_rate(text), analysis.sink_rate(text, by="layer")
    sinks = analysis.sink_positions(text).isel(batch=0)
    massive = analysis.massive_activations(text)
    near = analysis.massive_activations(text.drop_vars("hidden_layer_median"))["median"]
    ratio = (near / massive["median"]).isel(batch=0).values
    return PAGE.format(
        roles=_roles(),
        rows=ROWS,
        repeated=REPEATED,
        heads=_heads(frame),
        total=len(frame),
        counts=_counts(frame),
        length=rate.attrs["T"],
        text_counts=_counts(analysis.classify_heads(text)),
        sink_rate=float(rate),
        lowest=float(by_layer.min()),
        highest=float(by_layer.max()),
        fewest=_fewest(),
        other_sinks=_others(sinks) or "none",
        needed=sinks.attrs["fewest_queries"][0],
        local=int((analysis.locality(text).reach == "local").sum()),
        massive=_massive(massive),
        median_low=ratio.min(),
        median_high=ratio.max(),
    )
