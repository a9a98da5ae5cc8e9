"""Where are the attention sinks?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from llama_attn.analysis.dataset import as_dataset, real_tokens, require
from llama_attn.analysis.uniform import uniform_attention

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source

GU = "Gu et al., arXiv 2410.10781"
# A key is a sink of a head from which it receives more than this share of the attention (ε of Gu et al.).
EPSILON = 0.3
# The last keys are seen by so few queries that their mean says little.
FEWEST_QUERIES = 4


def sink_rate(
    ds: Source, epsilon: float = EPSILON, key: int = 0, *, by: Literal["layer", "head", "batch"] | None = None
) -> xarray.DataArray:
    """Share of heads for which one key is a sink: the mean over rows, layers and heads of 1[α_key > ε].

    α_key is ``received``, the mean attention weight that the key receives from the queries that see it.

    Args:
        ds: Statistics with ``received``.
        epsilon: ε, what a sink receives at least [probability].
        key: Which key, counted in real keys of the row, so that 0 is the first token also behind left padding.
        by: Keep this axis in place of the mean over all, e.g. ``"layer"`` for one rate per layer.

    Returns:
        A fraction in [0, 1]; NaN for a layer without data. The rate depends on the length of the text, so
        ``attrs["T"]`` and ``attrs["T_shortest"]`` hold the real tokens of the longest and shortest row, beside
        ``attrs["epsilon"]`` and ``attrs["key"]``.

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
    alpha = dataset.received.where(real & (real.cumsum("key") == key + 1)).max("key")
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
    }
    return rate


def sink_positions(ds: Source, epsilon: float = EPSILON) -> xarray.Dataset:
    """Which tokens are sinks, of which heads, and how far above a uniform share.

    The boost is ``received`` over what the key would receive from heads that attend equally to every key they may
    see. In short texts, and in a narrow window, uniform attention alone exceeds ε, with a boost of 1: read both.

    Args:
        ds: Statistics with ``received``.
        epsilon: What a sink receives at least [probability].

    Returns:
        ``sink`` (layer, batch, head, key): whether the key is a sink; never one seen by fewer than four queries
        (or than the most there are), whose mean says little.
        ``boost`` (layer, batch, head, key) [ratio]; NaN where `uniform_attention` is unknown.
        ``position`` (layer, batch, head) [token]: the sink that receives most, −1 where there is none.
        ``heads`` (batch, key) [fraction]: share of measured heads that have a sink there, of all layers in which
        some query sees the key.
        Token strings stay as coordinates.

    Raises:
        ValueError: ``received`` was not measured, or ε is out of range.

    Source: Gu et al., arXiv 2410.10781; the uniform baseline as in attention-sink-profiler.
    """
    import xarray

    dataset = as_dataset(ds)
    require(dataset, "received")
    _check_share("epsilon", epsilon)
    received = dataset.received.where(seen_enough(dataset))
    sink = received > epsilon
    boost = dataset.received / uniform_attention(dataset).received
    strongest = received.fillna(-np.inf).idxmax("key")
    heads = sink.where(dataset.received.notnull()).mean(["layer", "head"])
    of_statistic = {"source": GU, "epsilon": float(epsilon)}
    return xarray.Dataset(
        {
            "sink": sink.assign_attrs(units="bool", long_name=f"receives more than {epsilon:g}", **of_statistic),
            "boost": boost.assign_attrs(units="ratio", long_name="received over its value under uniform attention"),
            "position": strongest.where(sink.any("key"), -1)
            .astype(np.int64)
            .assign_attrs(units="token", long_name="the sink that receives most, −1 for none", **of_statistic),
            "heads": heads.assign_attrs(units="fraction", long_name="share of heads with a sink here", **of_statistic),
        }
    )


def seen_enough(dataset: xarray.Dataset) -> xarray.DataArray:
    """Whether enough queries see each key for their mean to say something, (batch, key); per layer if they differ."""
    seen = dataset.visible_queries
    return (seen >= np.minimum(seen.max("key"), FEWEST_QUERIES)) & (seen > 0)


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number from 0 up to but not 1, got {value!r}")
