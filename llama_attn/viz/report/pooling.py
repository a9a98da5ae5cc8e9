"""Coarser versions of statistics: means over bins of tokens, merged maps, merged lists of the most attended keys."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


def pool_tokens(values: Float[np.ndarray, "*axes token"], width: int) -> Float[np.ndarray, "*axes bin"]:
    """Means over bins of ``width`` neighbouring tokens; NaN where a bin holds no number."""
    if width == 1:
        return values
    bins = -(-values.shape[-1] // width)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, bins * width - values.shape[-1])]
    binned = np.pad(values, padding, constant_values=np.nan).reshape(*values.shape[:-1], bins, width)
    return mean_of_known(binned, -1)


def mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(values.dtype)


def widths(length: int, fewest: int) -> list[int]:
    """Powers of two: widths of bins of which at least ``fewest`` are needed for ``length`` tokens; 1 always."""
    found = [1]
    while -(-length // (2 * found[-1])) >= fewest:
        found.append(2 * found[-1])
    return found


def pool_top_keys(
    weight: Float[np.ndarray, "head query rank"],
    position: Int[np.ndarray, "head query rank"],
    real: Bool[np.ndarray, " query"],
    width: int,
    ranks: int,
) -> tuple[Float[np.ndarray, "head bin rank"], Int[np.ndarray, "head bin rank"]]:
    """The keys that a bin of queries attends to most: means over its real queries, counting only the keys listed.

    A key that some query of the bin attends to, but not among its most attended, counts 0 there, so that a mean is
    at least what is given. Missing ranks are 0 and −1.

    Args:
        weight: Attention weights, NaN where missing [probability].
        position: Keys, −1 where missing [token].
        real: Which queries are not padding.
        width: Queries per bin.
        ranks: Keys to keep.
    """
    heads, queries, listed = weight.shape
    bins = -(-queries // width)
    pad = ((0, 0), (0, bins * width - queries), (0, 0))
    keys = np.pad(position, pad, constant_values=-1).reshape(heads, bins, width * listed)
    parts = np.pad(np.nan_to_num(weight), pad).reshape(heads, bins, width * listed)
    order = np.argsort(keys, -1, kind="stable")
    keys = np.take_along_axis(keys, order, -1)
    running = np.cumsum(np.take_along_axis(parts, order, -1), -1, dtype=np.float64)
    # The last of equal keys gets the sum of all of them.
    last = np.concatenate([keys[..., 1:] != keys[..., :-1], np.ones_like(keys[..., :1], bool)], -1)
    places = np.where(last, np.arange(keys.shape[-1]), -1)
    before = np.concatenate([np.full_like(places[..., :1], -1), np.maximum.accumulate(places, -1)[..., :-1]], -1)
    earlier = np.where(before >= 0, np.take_along_axis(running, np.maximum(before, 0), -1), 0.0)
    sums = np.where(last & (keys >= 0), running - earlier, -1.0)
    ranks = min(ranks, sums.shape[-1])
    largest = np.argpartition(-sums, ranks - 1, -1)[..., :ranks]
    sums, keys = np.take_along_axis(sums, largest, -1), np.take_along_axis(keys, largest, -1)
    order = np.argsort(-sums, -1, kind="stable")
    sums, keys = np.take_along_axis(sums, order, -1), np.take_along_axis(keys, order, -1)
    count = np.pad(real, (0, bins * width - queries)).reshape(bins, width).sum(-1)
    missing = sums <= 0
    means = np.where(missing, 0.0, sums / np.maximum(count, 1)[:, None])
    return means.astype(np.float32), np.where(missing, -1, keys)
