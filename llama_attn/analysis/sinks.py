"""Where are the attention sinks?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_attn.analysis.dataset import as_dataset, coordinates_along, real_tokens, require
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.uniform import uniform_attention

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source

GU = "Gu et al., arXiv 2410.10781"
# A key is a sink of a head from which it receives more than this share of the attention (ε of Gu et al.).
EPSILON = 0.3
# In so many rows of a head that prefers no token, chance makes a sink of some key.
FALSE_ALARMS = 0.05


def sink_rate(
    ds: Source, epsilon: float = EPSILON, key: int = 0, *, by: Literal["layer", "head", "batch"] | None = None
) -> xarray.DataArray:
    """Share of heads for which one key is a sink: the mean over rows, layers and heads of 1[α_key > ε].

    α_key is ``received``, the mean attention weight that the key receives from the queries that see it.

    Args:
        ds: Statistics with ``received``.
        epsilon: ε, what a sink receives at least [probability]; 0.3 by default.
        key: Which key, counted in real keys of the row, so that 0 is the first token also behind left padding.
        by: Keep this axis in place of the mean over all, e.g. ``"layer"`` for one rate per layer.

    Returns:
        A fraction in [0, 1]; NaN for a layer without data. The rate depends on the length of the text, so
        ``attrs["T"]`` and ``attrs["T_shortest"]`` hold the real tokens of the longest and shortest row, and
        ``attrs["queries"]`` how many measured queries see the key at most, fewer than T in a window; beside
        ``attrs["epsilon"]``, ``attrs["key"]`` and ``attrs["part"]``, what was measured of the model if not all of it.

    Raises:
        ValueError: ``received`` was not measured, an argument is out of range, no row has so many keys, or the first
            tokens were dropped from the cache, so that it is unknown how many came before.

    Source: Gu et al., arXiv 2410.10781 (ε = 0.3, T = 64, first token; printed there × 100).
    """
    dataset = as_dataset(ds)
    require(dataset, "received")
    _check_share("epsilon", epsilon)
    if by not in (None, "layer", "head", "batch"):
        raise ValueError(f"by: expected None, 'layer', 'head' or 'batch', got {by!r}")
    if dropped := int(dataset["key"].values[0]):
        raise ValueError(f"key: the first {dropped} tokens are no longer in the cache; real keys cannot be counted")
    real = real_tokens(dataset, "key")
    lengths = real.sum("key").values
    if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < lengths.max(initial=0):
        raise ValueError(f"key: expected 0 to {lengths.max(initial=0) - 1}, the real keys of a row, got {key!r}")
    asked = real & (real.cumsum("key") == key + 1)
    alpha = dataset.received.where(asked).max("key")
    is_sink = (alpha > epsilon).where(alpha.notnull())
    rate = is_sink.mean([dim for dim in is_sink.dims if dim != by]).rename("sink_rate")
    rate.attrs = {
        "units": "fraction",
        "long_name": f"share of heads from which key {key} receives more than {epsilon:g}",
        "source": GU,
        "epsilon": float(epsilon),
        "key": int(key),
        "T": int(lengths.max()),
        "T_shortest": int(lengths.min()),
        "queries": int(dataset.visible_queries.where(asked, 0).max()),
        "part": measured_part(dataset),
    }
    return rate


def sink_positions(ds: Source, epsilon: float = EPSILON, *, fewest_queries: int | None = None) -> xarray.Dataset:
    """Which tokens are sinks, of which heads and layers, what they take of all attention, and how far above uniform.

    The last tokens of a text are seen by a few queries only, all of them near: α_k > ε says nothing there. So a key is
    named only with ``fewest_queries`` behind it. By default that is c / ε for the Q real queries of the row, or Q if
    they are fewer. c is the attention, in queries' worth, that a key takes by chance at most from a head that prefers
    no token: Bernstein's inequality for a sum of weights in [0, 1], at most one such key in 20 rows,
    c = u + t, t = L/3 + √(L²/9 + 2uL), L = ln(20 Q). u is what such a head gives the key: what uniform attention
    does, or 1, the most that attention by distance alone does (Q queries share Q keys). So c is 8.4 for 132 queries,
    and 28 of them must see a key; 9.6 and 32 for 700.

    Args:
        ds: Statistics with ``received``.
        epsilon: What a sink of a head receives at least of the attention of those who see it [probability]; 0.3 by
            default.
        fewest_queries: By how many measured queries a sink must be seen; None for the number above.

    Returns:
        These variables, with token strings as coordinates.

        - ``sink`` (layer, batch, head, key): whether α_k > ε and enough queries see the key.
        - ``layer_sink`` (layer, batch, key): whether the heads of the layer give it more than c on average, with its
          own u, and enough queries see it: heads may share several sinks of which none exceeds ε. Never where
          `uniform_attention` is unknown.
        - ``share`` (layer, batch, head, key) [fraction]: Σ_i A_ik / Q, of all attention what the key takes.
        - ``boost`` (layer, batch, head, key) [ratio]: this over its value under uniform attention; NaN where
          `uniform_attention` is unknown. In short texts uniform attention alone exceeds ε, with a boost of 1: read both.
        - ``queries`` (batch, key), with ``layer`` in front where the layers differ: how many measured queries see it.
        - ``position`` (layer, batch, head) [token]: the sink with the largest share, −1 where there is none.
        - ``heads`` (batch, key) [fraction]: share of measured heads that have a sink there, of all layers in which
          some query sees the key.

        ``attrs`` hold ``epsilon``, row by row ``fewest_queries``, and ``part`` as in `sink_rate`.

    Raises:
        ValueError: ``received`` was not measured, ε is out of range, or the number is not a positive integer.

    Source: Gu et al., arXiv 2410.10781 (α, ε); Bernstein's inequality (c); the baseline as in attention-sink-profiler.
    """
    import xarray

    dataset = as_dataset(ds)
    require(dataset, "received")
    _check_share("epsilon", epsilon)
    if fewest_queries is not None and not _is_positive(fewest_queries):
        raise ValueError(f"fewest_queries: expected a positive integer, got {fewest_queries!r}")
    measured, uniform = dataset.variables, uniform_attention(dataset).variables
    received, queries = measured["received"], measured["visible_queries"]
    of_row = real_tokens(measured, "query").sum("query")
    needed = _needed(of_row, epsilon) if fewest_queries is None else xarray.full_like(of_row, fewest_queries)
    enough = (queries >= needed) & (queries > 0)
    sink = (received > epsilon) & enough
    total = received * queries
    share = total / (measured["visible_keys"] > 0).sum("query")
    layer_sink = (total.mean("head") > by_chance(np.maximum(uniform["received_total"], 1), of_row)) & enough
    strongest = share.where(sink).fillna(-np.inf).argmax("key")
    position = xarray.Variable(strongest.dims, dataset["key"].values[strongest.values]).where(sink.any("key"), -1)
    of_rule = {"source": GU, "epsilon": float(epsilon), "fewest_queries": needed.values.tolist()}
    described = {
        "sink": (sink, "bool", f"receives more than {epsilon:g}, seen by enough queries"),
        "layer_sink": (layer_sink, "bool", "takes more than chance explains, on average over heads"),
        "share": (share, "fraction", "share of all attention"),
        "boost": (received / uniform["received"], "ratio", "share over its value under uniform attention"),
        "queries": (queries, "queries", "measured queries that see the key"),
        "position": (position.astype(np.int64), "token", "the sink with the largest share, −1 for none"),
        "heads": (
            sink.where(received.notnull()).mean(["layer", "head"]),
            "fraction",
            "share of heads with a sink here",
        ),
    }
    ruled = ("sink", "layer_sink", "position", "heads")
    order = ("layer", "batch", "head", "key")
    arrays = {}
    for name, (array, unit, meaning) in described.items():
        dims = tuple(dim for dim in order if dim in array.dims)
        attrs = {"units": unit, "long_name": meaning, **(of_rule if name in ruled else {})}
        arrays[name] = dims, array.transpose(*dims).values, attrs
    return xarray.Dataset(arrays, coordinates_along(dataset, order), of_rule | {"part": measured_part(dataset)})


def seen_enough(measured: Mapping[Any, xarray.Variable]) -> xarray.Variable:
    """Whether enough queries see each key to name it a sink, (batch, key); per layer if they differ."""
    queries = measured["visible_queries"]
    return (queries >= _needed(real_tokens(measured, "query").sum("query"), EPSILON)) & (queries > 0)


def _needed(queries: xarray.Variable, epsilon: float) -> xarray.Variable:
    """By how many of the queries of a row a sink must be seen."""
    # At ε = 0 no number would do.
    most: xarray.Variable = np.ceil(by_chance(1.0, queries) / max(epsilon, 1e-9))
    return most.where(most < queries, queries).astype(np.int64)


def by_chance(expected: Any, queries: Any) -> Any:
    """What a key takes at most from a head that prefers no token, and is expected to give it so much [queries' worth].

    But for one row in 20, over as many keys as there are queries. Both may be numbers, or arrays that fit each other.
    """
    bound = np.log(np.maximum(queries, 1) / FALSE_ALARMS)
    return expected + bound / 3 + np.sqrt(bound**2 / 9 + 2 * expected * bound)


def _is_positive(number: object) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool) and int(number) > 0


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number from 0 up to but not 1, got {value!r}")
