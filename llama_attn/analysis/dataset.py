"""The one way from what a user has to a labelled dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.integers import is_integer
from llama_attn.stats.table import TAKEN, statistics_table

if TYPE_CHECKING:
    import xarray

    Source = AttentionStats | xarray.Dataset | str | os.PathLike[str]
    """Statistics, as they were measured, labelled, or the path of their file."""
    Array = TypeVar("Array", xarray.DataArray, xarray.Variable)
    """With coordinates or without: what comes from one dataset has the same, and comparing them costs more than adding."""


def as_dataset(source: Source) -> xarray.Dataset:
    """An ``xarray.Dataset`` from an `AttentionStats`, a dataset, or the path of a saved file.

    Raises:
        ImportError: xarray is not installed.
        TypeError: Something else was given, e.g. a model.
    """
    if isinstance(source, (str, os.PathLike)):
        source = AttentionStats.load(source)
    if isinstance(source, AttentionStats):
        return source.to_xarray()
    import xarray

    if not isinstance(source, xarray.Dataset):
        raise TypeError(
            f"source: expected AttentionStats, xarray.Dataset or the path of a saved file, got {type(source).__name__}"
        )
    return source


def check_index(name: str, index: Any, known: Sequence[int]) -> None:
    """Refuse what is no index at all: ``None``, and ``True`` and ``1.0``, which equal one.

    Args:
        name: Of the argument.
        index: What was given for it.
        known: What it may be.

    Raises:
        ValueError: It is no integer.
    """
    if not is_integer(index):
        raise ValueError(f"{name}: expected an integer, one of {list(known)}, got {index!r}")


def check_measured(of: xarray.Dataset | xarray.DataArray, axis: str, label: int, name: str | None = None) -> None:
    """Refuse a label that ``axis`` has not.

    Args:
        of: What has the axis.
        axis: E.g. ``"layer"``.
        label: What was asked for.
        name: Of the argument; None if it is that of the axis.

    Raises:
        ValueError: It was not measured, or is no integer.
    """
    known = of[axis].values.tolist()
    check_index(name or axis, label, known)
    if label not in known:
        raise ValueError(f"{name or axis}: {label} was not measured; there are {known}")


def require(dataset: xarray.Dataset, *names: str) -> None:
    """Check that ``dataset`` holds the statistics ``names``.

    Raises:
        NotMeasuredError: One is missing; the message says which configuration measures it.
        ValueError: One is no name, or names no statistic, neither of the dataset nor of those that can be measured.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"statistic: expected a name, such as 'entropy', got {name!r}")
    # Coordinates, as "query", are no statistics.
    missing = [name for name in names if name not in dataset.data_vars]
    if missing:
        known = statistics_table()
        if unknown := [name for name in missing if name not in known and name not in TAKEN]:
            there = sorted(map(str, dataset.data_vars))
            close = get_close_matches(unknown[0], [*dict.fromkeys([*there, *known])])
            meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"source: there is no statistic {unknown[0]!r}{meant}; measured are {there}")
        raise NotMeasuredError(f"source: {missing} not measured", missing, there=dataset.data_vars)


def direction_of(dataset: xarray.Dataset) -> Literal["causal", "bidirectional", "cross"]:
    """Whether queries see keys before them, on both sides, or of another text.

    Raises:
        ValueError: The dataset says something else.
    """
    direction = dataset.attrs.get("direction", "causal")
    if direction not in ("causal", "bidirectional", "cross"):
        raise ValueError(
            f"source: expected attrs['direction'] to be 'causal', 'bidirectional' or 'cross', got {direction!r}"
        )
    return cast('Literal["causal", "bidirectional", "cross"]', direction)


def real_tokens(measured: Mapping[Any, Array], axis: Literal["query", "key"]) -> Array:
    """Which queries see some key in some layer, or which keys some query of some layer sees, (batch, axis)."""
    seen = measured["visible_keys" if axis == "query" else "visible_queries"] > 0
    return seen.any("layer") if "layer" in seen.dims else seen


def of_queries(of_keys: xarray.Variable, dataset: xarray.Dataset) -> tuple[xarray.Variable, xarray.Variable]:
    """What is known of keys, of the same tokens as queries; and which queries are keys, of the others it means nothing."""
    import xarray

    at = xarray.Variable("query", dataset.indexes["key"].get_indexer(dataset.indexes["query"]))
    return of_keys.isel(key=at), at >= 0


def coordinates_along(dataset: xarray.Dataset, axes: Collection[Hashable]) -> dict[Hashable, Any]:
    """Its coordinates that lie along these axes alone, for arrays that were worked out without."""
    return {name: values for name, values in dataset.coords.items() if set(values.dims) <= set(axes)}


def without_attention(dataset: xarray.Dataset) -> tuple[int, ...]:
    """Layers of the model that have no attention and so no statistics; none if the dataset does not say."""
    return tuple(int(layer) for layer in json.loads(dataset.attrs.get("without_attention", "[]")))


def labels(values: xarray.DataArray, threshold: float, below: str, above: str) -> xarray.DataArray:
    """``below`` or ``above`` for each number, by the side of the threshold that it lies on; "no data" for NaN."""
    # Older releases of xarray cut strings to the length of the first.
    named = np.where(values.values < threshold, below, above)
    return values.copy(data=np.where(np.isnan(values.values), "no data", named))
