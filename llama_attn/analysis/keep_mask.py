"""Which keys would a smaller cache keep?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from llama_attn.analysis.dataset import as_dataset, direction_of, real_tokens, require
from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.analysis.part import measured_part

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source

Policy = Literal["streaming", "h2o", "snapkv", "tova", "knorm"]
"""How the keys that stay in a cache are chosen."""
POLICIES: tuple[Policy, ...] = get_args(Policy)
# SnapKV's window of queries [tokens] and the width of its average.
WINDOW, KERNEL = 64, 5
SINK = 4
# What each policy chooses by, and how to ask for it.
NEEDED = {
    "streaming": (), "h2o": ("received_total",), "snapkv": ("row_weights",), "tova": ("row_weights",),
    "knorm": ("key_norm",),
}  # fmt: skip
ROWS = {"snapkv": f"rows=slice(-{WINDOW}, None)", "tova": "rows=(-1,)"}


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of the batch in one layer, without padding.

    Args:
        dataset: Its statistics.
        keys: Places of the real keys on the key axis.
        groups: KV heads.
        budget: Keys to keep, no more than there are.
        sink: First keys that `streaming` keeps.
        recent: Last keys that are kept in any case; None for the policy's own number.
    """

    dataset: xarray.Dataset
    keys: Int[np.ndarray, " key"]
    groups: int
    budget: int
    sink: int
    recent: int | None

    def of_groups(self, values: np.ndarray) -> np.ndarray:
        """Means over the query heads of each KV head, from (head, …)."""
        return values.reshape(self.groups, len(values) // self.groups, *values.shape[1:]).mean(1)


def keep_mask(
    ds: Source,
    policy: Policy,
    budget: int,
    *,
    sink: int = SINK,
    recent: int | None = None,
) -> xarray.DataArray:
    """Which keys each policy keeps after the measured text: ``budget`` of every row, layer and KV head.

    - ``streaming``: the first ``sink`` and the last keys.
    - ``h2o``: the last ``recent`` (default: half of the budget), and those that received most in total.
    - ``snapkv``: the last ``recent`` (default: 64), and those that received most from the queries of this window, an
      average over 5 neighbours.
    - ``tova``: the last key, and those that received most from the last query, on average over all heads.
    - ``knorm``: the keys of the smallest norm.

    Scores of query heads are averaged over those of a KV head. Of keys with equal scores, lower ones are kept.
    Padding is never kept; a row with fewer real keys than the budget keeps all. The sets are those of kvpress'
    ``StreamingLLMPress``, ``SnapKVPress``, ``TOVAPress`` and ``KnormPress``, and of H2O's own code, row by row. The
    authors of TOVA do not hold on to the last key; it is the last query's own and rarely goes.

    Args:
        ds: Statistics of a causal text with what the policy chooses by: ``received_total`` for ``h2o``,
            ``row_weights`` of the last 64 queries for ``snapkv`` and of the last one for ``tova``, ``key_norm`` for
            ``knorm``; of all query heads.
        policy: One of these names.
        budget: Keys to keep in every row, layer and KV head.
        sink: First keys that ``streaming`` keeps, if the budget holds as many; 4 by default.
        recent: Last keys that ``h2o`` and ``snapkv`` keep in any case. For ``snapkv`` also the queries that choose;
            where fewer rows were measured or the text is shorter, and nothing is named, those that there are.

    Returns:
        Bool (layer, batch, kv_head, key), as ``AttentionStatsConfig(keep=…)`` and `block_keys` take it. ``attrs`` hold
        the arguments, with −1 where ``recent`` is left to the policy, and ``part``, what was measured of the model if
        not all of it.

    Raises:
        ValueError: No such policy; its statistic was not measured; a budget that is not from 1 to the keys of the text,
            or too small for what is kept in any case; heads or last queries that were not measured.

    Source: Xiao et al., arXiv 2309.17453; Zhang et al., arXiv 2306.14048; Li et al., arXiv 2404.14469; Oren et al.,
    arXiv 2401.06104; Devoto et al., arXiv 2406.11430.
    """
    import xarray

    dataset = as_dataset(ds)
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {list(POLICIES)}, got {policy!r}")
    _check_text(dataset, policy)
    _check_numbers(dataset, policy, budget, sink, recent)
    groups = _groups(dataset, policy)
    real = real_tokens(dataset, "key").transpose("batch", "key").values
    kept = np.zeros((dataset.sizes["layer"], *real.shape[:1], groups, real.shape[1]), dtype=bool)
    needed = dataset[[*NEEDED[policy]]] if NEEDED[policy] else dataset[["visible_queries"]]
    for layer, row in np.ndindex(kept.shape[:2]):
        keys = np.flatnonzero(real[row])
        if not len(keys):
            continue
        here = needed.isel(batch=row) if "layer" not in needed.dims else needed.isel(layer=layer, batch=row)
        chosen = _KEPT_BY[policy](_Row(here, keys, groups, min(budget, len(keys)), sink, recent))
        kept[layer, row][:, keys] = chosen
    return xarray.DataArray(
        kept,
        dims=("layer", "batch", "kv_head", "key"),
        coords={name: dataset[name].values for name in ("layer", "batch", "key")} | {"kv_head": range(groups)},
        name="keep",
        attrs={
            "units": "bool",
            "long_name": f"kept by {policy} with a budget of {budget}",
            "policy": policy,
            "budget": int(budget),
            "sink": int(sink),
            "recent": -1 if recent is None else int(recent),
            "part": measured_part(dataset),
        },
    )


def _streaming(row: _Row) -> Bool[np.ndarray, "kv_head key"]:
    # Places behind the sink come before those in it, from the last one on.
    first = min(row.sink, row.budget)
    kept = np.zeros((row.groups, len(row.keys)), dtype=bool)
    kept[:, :first] = True
    kept[:, len(row.keys) - (row.budget - first) :] = True
    return kept


def _h2o(row: _Row) -> Bool[np.ndarray, "kv_head key"]:
    scores = row.of_groups(row.dataset.received_total.transpose("head", "key").values[:, row.keys])
    recent = row.budget // 2 if row.recent is None else min(row.recent, row.budget)
    return _largest(scores, row.budget, recent)


def _snapkv(row: _Row) -> Bool[np.ndarray, "kv_head key"]:
    most = WINDOW if row.recent is None else row.recent
    weights = _last_rows(row, min(most, len(row.keys)), exactly=row.recent is not None)
    window = weights.shape[1]
    if row.budget < window and row.budget < len(row.keys):
        raise ValueError(
            f"budget: snapkv keeps the {window} keys of the queries that it observes, so expected {window} or more, or "
            f"fewer queries (recent=…), got {row.budget}"
        )
    before = weights[:, :, : len(row.keys) - window].mean(1)
    # Beyond either end stand zeros, which count.
    padded = np.pad(before, ((0, 0), (KERNEL // 2, KERNEL // 2)))
    pooled = sum(padded[:, step : step + before.shape[1]] for step in range(KERNEL)) / KERNEL
    scores = np.pad(row.of_groups(np.asarray(pooled)), ((0, 0), (0, window)))
    return _largest(scores, row.budget, min(window, row.budget))


def _tova(row: _Row) -> Bool[np.ndarray, "kv_head key"]:
    weights = _last_rows(row, 1, exactly=True)[:, -1].mean(0)
    return _largest(np.broadcast_to(weights, (row.groups, len(row.keys))), row.budget, 1)


def _knorm(row: _Row) -> Bool[np.ndarray, "kv_head key"]:
    return _largest(-row.dataset.key_norm.transpose("kv_head", "key").values[:, row.keys], row.budget, 0)


_KEPT_BY: dict[str, Callable[[_Row], Bool[np.ndarray, "kv_head key"]]] = {
    "streaming": _streaming,
    "h2o": _h2o,
    "snapkv": _snapkv,
    "tova": _tova,
    "knorm": _knorm,
}


def _largest(scores: Float[np.ndarray, "kv_head key"], budget: int, recent: int) -> Bool[np.ndarray, "kv_head key"]:
    """The last ``recent`` keys, and those of the largest scores of the others, lower ones of equal scores."""
    older = scores.shape[1] - recent
    # A key that nobody of the layer sees has no score.
    order = np.argsort(-np.nan_to_num(scores[:, :older], nan=-np.inf), axis=1, kind="stable")
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, order[:, : budget - recent], True, axis=1)
    kept[:, older:] = True
    return kept


def _last_rows(row: _Row, most: int, *, exactly: bool) -> Float[np.ndarray, "head row key"]:
    """Weights of the last queries of a row of the batch, at most so many, that were measured without a gap."""
    weights = row.dataset.row_weights.transpose("head", "row", "key")
    positions, last = weights["row"].values, int(row.dataset["key"].values[row.keys[-1]])
    found = []
    for position in range(last, last - most, -1):
        if position not in positions:
            break
        found.append(int(np.flatnonzero(positions == position)[0]))
    if not found or (exactly and len(found) < most):
        raise NotMeasuredError(
            f"row_weights: expected those of the last {most} queries up to {last}, which row "
            f"{int(row.dataset['batch'])} of the batch ends with, got those of {positions.tolist()}",
            ["rows"],
            f"measure with rows=slice(-{most}, None), and texts of different length with padding on the left",
        )
    return np.asarray(weights.values[:, found[::-1]][..., row.keys], dtype=np.float64)


def _check_text(dataset: xarray.Dataset, policy: str) -> None:
    if direction_of(dataset) != "causal":
        raise ValueError(f"source: expected causal attention, whose cache can be cut, got {direction_of(dataset)}")
    if policy in ROWS and "row_weights" not in dataset:
        raise NotMeasuredError(
            f"source: {policy} needs row_weights, which were not measured",
            ["rows"],
            f"measure with AttentionStatsConfig({ROWS[policy]})",
            dataset.data_vars,
        )
    require(dataset, *NEEDED[policy])
    asked, last = dataset["query"].values, int(dataset["key"].values[-1])
    if not len(asked) or int(asked[-1]) != last:
        raise NotMeasuredError(
            f"source: expected the last token, {last}, among the measured queries, got {asked[-1:].tolist()}",
            ["query_stride"],
            "without it nobody can tell which keys are real: measure with query_stride=1, and do not leave out queries",
        )


def _check_numbers(dataset: xarray.Dataset, policy: str, budget: int, sink: int, recent: int | None) -> None:
    length = dataset.sizes["key"]
    for name, number, least in (("budget", budget, 1), ("sink", sink, 0), ("recent", recent, int(policy != "h2o"))):
        if name == "recent" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not least <= number <= length:
            raise ValueError(f"{name}: expected {least} to {length}, the keys of the text, got {number!r}")
    if recent is not None and policy not in ("h2o", "snapkv"):
        raise ValueError(f"recent: only h2o and snapkv have a choice, got {recent} for {policy}")
    if recent is not None and recent > budget:
        raise ValueError(f"recent: expected no more than the budget of {budget}, got {recent}")


def _groups(dataset: xarray.Dataset, policy: str) -> int:
    """How many KV heads there are, checked against the query heads that were measured."""
    groups = dataset.sizes.get("kv_head") or int(dataset.attrs.get("num_kv_heads", 0))
    if not groups:
        raise ValueError("source: an older file does not say how many KV heads the model has; measure again")
    if policy in ("h2o", "snapkv", "tova"):
        heads = dataset["head"].values.tolist() if "head" in dataset.coords else []
        total = int(dataset.attrs.get("num_heads", 0)) or len(heads)
        if heads != list(range(total)) or total % groups:
            raise NotMeasuredError(
                f"source: expected all {total} query heads of {groups} KV heads, in order, got {heads}",
                ["heads"],
                "measure with heads=None",
            )
    return groups
