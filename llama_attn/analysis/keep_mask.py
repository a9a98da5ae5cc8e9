"""Which keys a smaller cache would keep, chosen as the compression methods of the literature choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from llama_attn.analysis.dataset import as_dataset, require

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source

Policy = Literal["streaming", "h2o", "snapkv", "tova", "knorm"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
# Keys over which SnapKV averages.
POOLED = 5
WINDOW = 64


def keep_mask(ds: Source, policy: Policy, budget: int, *, sink: int = 4, recent: int | None = None) -> xarray.DataArray:
    """The keys that a policy keeps after a text has been read.

    Per KV head, since a cache holds keys of KV heads: what query heads of a group say is averaged. Padding is never
    kept; of a row with fewer real keys than ``budget`` all are. Equal scores keep the lower key.

    ========= ==================================================================== ========================
    policy    keeps                                                                needs
    ========= ==================================================================== ========================
    streaming the first ``sink`` keys and the last ones                            nothing
    h2o       keys with the largest ``received_total``, and the ``recent`` last    ``received_total``
    snapkv    keys with the largest mean weight from the last ``recent`` queries,  ``rows=slice(-64, None)``
              averaged over 5 neighbours, and these last keys
    tova      keys with the largest weight from the last query, the mean over all  ``rows=(-1,)``
              heads, and the last key
    knorm     keys of the smallest norm                                            ``key_norm``
    ========= ==================================================================== ========================

    Args:
        ds: Statistics of the text.
        policy: One of the above.
        budget: Keys that are kept per row and KV head.
        sink: First keys that ``"streaming"`` keeps.
        recent: Last keys that are kept in any case: half of the budget for ``"h2o"``, the measured rows, at most 64, for
            ``"snapkv"``.

    Returns:
        Booleans (layer, batch, kv_head, key), which ``AttentionStatsConfig(keep=…)`` and `block_keys` take;
        ``attrs`` hold the arguments.

    Raises:
        ValueError: An unknown policy, a budget that is not from 1 to the number of keys, or a statistic or row that
            was not measured; the message says how to measure it.

    Source: Xiao et al., arXiv 2309.17453; Zhang et al., arXiv 2306.14048; Li et al., arXiv 2404.14469; Oren et al.,
        arXiv 2401.06104; Devoto et al., arXiv 2406.11430.
    """
    dataset = as_dataset(ds)
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {list(POLICIES)}, got {policy!r}")
    num_keys = dataset.sizes["key"]
    _check_number("budget", budget, 1, num_keys)
    _check_number("sink", sink, 0, num_keys)
    if recent is not None:
        _check_number("recent", recent, 0, num_keys)
    seen = dataset.visible_queries > 0
    real = seen.expand_dims(layer=dataset["layer"]) if "layer" not in seen.dims else seen
    real_keys = real.transpose("layer", "batch", "key").values[:, :, None]
    # Counted from the first and from the last real key of the row.
    place = real_keys.cumsum(-1) - 1
    from_end = real_keys.sum(-1, keepdims=True) - 1 - place
    if policy == "streaming":
        scores = np.where(place < min(sink, budget), np.inf, place.astype(float))
    else:
        scores, last = _scores(dataset, policy, budget, recent)
        scores = np.where(from_end < min(last, budget), np.inf, scores)
    kv_heads = _kv_heads(dataset)
    scores = np.where(real_keys, np.broadcast_to(scores, (*real_keys.shape[:2], kv_heads, num_keys)), -np.inf)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :budget]
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, best, True, axis=-1)
    import xarray

    return xarray.DataArray(
        keep & real_keys,
        dims=("layer", "batch", "kv_head", "key"),
        coords={
            "layer": dataset["layer"],
            "batch": dataset["batch"],
            "kv_head": range(kv_heads),
            "key": dataset["key"].values,
        },
        name="keep",
        attrs={"policy": policy, "budget": budget, "sink": sink, "recent": -1 if recent is None else recent},
    )


def _scores(dataset: xarray.Dataset, policy: Policy, budget: int, recent: int | None) -> tuple[np.ndarray, int]:
    """How much a policy wants each key, (layer, batch, kv_head or 1, key), and how many last keys it always keeps."""
    axes = ("layer", "batch", "head", "key")
    if policy == "knorm":
        require(dataset, "key_norm")
        return -dataset.key_norm.transpose("layer", "batch", "kv_head", "key").values, recent or 0
    if policy == "h2o":
        require(dataset, "received_total")
        scores = dataset.received_total.transpose(*axes).fillna(0).values
        return _by_group(dataset, scores), budget // 2 if recent is None else recent
    last = int(dataset["key"].values[-1])
    if policy == "tova":
        rows = _rows(dataset, [last], "(-1,)")
        return rows.isel(row=0).transpose(*axes).fillna(0).values.mean(
            2, keepdims=True
        ), 1 if recent is None else recent
    window = _measured_window(dataset) if recent is None else recent
    if not 0 < window < budget:
        raise ValueError(
            f'budget: "snapkv" keeps the keys of the {window} queries that it observes and others besides, so expected a '
            f"budget above {window}, or fewer queries (recent=…), got {budget}"
        )
    rows = _rows(dataset, list(range(last - window + 1, last + 1)), f"slice(-{max(window, 1)}, None)")
    means = rows.mean("row").transpose(*axes).fillna(0).values[..., : dataset.sizes["key"] - window]
    around = POOLED // 2
    padded = np.pad(means, [(0, 0)] * 3 + [(around, around)])
    pooled = np.lib.stride_tricks.sliding_window_view(padded, POOLED, axis=-1).mean(-1)
    scores = np.pad(_by_group(dataset, pooled), [(0, 0)] * 3 + [(0, window)])
    return scores, window


def _measured_window(dataset: xarray.Dataset) -> int:
    """How many of the last queries have been measured one after the other, at most `WINDOW`."""
    last, rows = (
        int(dataset["key"].values[-1]),
        set(dataset.coords["row"].values.tolist() if "row" in dataset.coords else ()),
    )
    window = 0
    while window < WINDOW and last - window in rows and window < dataset.sizes["key"] - 1:
        window += 1
    return max(window, 1)


def _rows(dataset: xarray.Dataset, positions: list[int], how: str) -> xarray.DataArray:
    """The weights of some queries.

    Raises:
        ValueError: One of them was not measured.
    """
    if "row_weights" not in dataset or not positions or not set(positions) <= set(dataset["row"].values.tolist()):
        there = dataset["row"].values.tolist() if "row_weights" in dataset else []
        raise ValueError(
            f"source: the weights of the queries {positions[0] if positions else 0} to {int(dataset['key'].values[-1])} were "
            f"not measured; run the model with AttentionStatsConfig(rows={how}); there are the rows {there}"
        )
    return dataset.row_weights.sel(row=positions)


def _by_group(dataset: xarray.Dataset, scores: np.ndarray) -> np.ndarray:
    """The mean over the query heads of each KV head.

    Raises:
        ValueError: Not all query heads were measured.
    """
    heads, kv_heads = scores.shape[2], _kv_heads(dataset)
    total = int(dataset.attrs.get("num_heads", 0)) or heads
    if heads != total or heads % kv_heads:
        raise ValueError(
            f"source: expected all {total} query heads of {kv_heads} KV heads, got {heads}; measure all heads"
        )
    order = np.argsort(dataset["head"].values)
    grouped = scores[:, :, order].reshape(*scores.shape[:2], kv_heads, heads // kv_heads, -1)
    return grouped.mean(3)


def _kv_heads(dataset: xarray.Dataset) -> int:
    if "kv_head" in dataset.sizes:
        return dataset.sizes["kv_head"]
    if number := int(dataset.attrs.get("num_kv_heads", 0)):
        return number
    raise ValueError("source: an older file does not say how many KV heads the model has; measure again")


def _check_number(name: str, number: int, least: int, most: int) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not least <= number <= most:
        raise ValueError(f"{name}: expected {least} to {most}, the number of keys, got {number!r}")
