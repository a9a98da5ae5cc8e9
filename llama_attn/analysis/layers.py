"""How do the statistics change through the layers?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.dataset import as_dataset, require
from llama_attn.analysis.part import measured_part
from llama_attn.stats.table import WHOLE_HAVE_NO_MEAN

if TYPE_CHECKING:
    from collections.abc import Callable

    import xarray

    from llama_attn.analysis.dataset import Source

POSITION_DIMS = ("batch", "query", "key")
HEAD_DIMS = ("head", "kv_head")
SUMMARIES = ("mean", "std", "min", "max")


def layer_evolution(ds: Source) -> xarray.Dataset:
    """Mean and spread of every statistic, layer by layer; norms of the residual stream, keys and values beside.

    A statistic of heads is first averaged over rows and tokens, which gives one number per head; the spread is that
    of the heads. A statistic without heads (the residual stream) is spread over rows and tokens.

    Args:
        ds: Any statistics.

    Returns:
        Every real-valued statistic except maps and the distance histogram, with the axes (layer, summary) or
        (hidden_layer, summary), and ``segment`` or ``rank`` where it has them. ``summary`` is mean, std (of the
        population), min, max. The unit stays. A layer without data is NaN. ``attrs["part"]``: what was measured of the model, if not all of it.

    Raises:
        ValueError: There is no such statistic.
    """
    import xarray

    dataset = as_dataset(ds)
    evolution = {}
    for name, values in dataset.data_vars.items():
        pooled = {"query_bin", "key_bin", "distance_bin"} & set(values.dims)
        if not {"layer", "hidden_layer"} & set(values.dims) or pooled or not has_mean(values):
            continue
        spread_over = [dim for dim in values.dims if dim in HEAD_DIMS]
        if spread_over:
            values = over_positions(values)
        else:
            spread_over = [dim for dim in values.dims if dim in POSITION_DIMS]
        summaries = [getattr(values, summary)(spread_over, keep_attrs=True) for summary in SUMMARIES]
        axis = xarray.Variable("summary", list(SUMMARIES))
        evolution[name] = xarray.concat(summaries, axis, coords="minimal", compat="override").transpose(..., "summary")
    if not evolution:
        raise ValueError(f"source: no statistic of layers; there are {sorted(map(str, dataset.data_vars))}")
    return xarray.Dataset(evolution, attrs={"part": measured_part(dataset)})


def head_means(ds: Source, statistic: str) -> xarray.DataArray:
    """One number per head, (layer, head) or (layer, kv_head): the mean of a statistic over rows and tokens.

    Raises:
        ValueError: It was not measured, has other axes, such as a map, or is of whole numbers.
    """
    dataset = as_dataset(ds)
    require(dataset, statistic)
    check_suited(dataset, statistic, _one_per_head, "head")
    return over_positions(dataset[statistic])


def _one_per_head(values: xarray.DataArray) -> bool:
    """Whether means over rows and tokens leave one number per layer and head."""
    left = set(values.dims) - set(POSITION_DIMS)
    return left in [{"layer", dim} for dim in HEAD_DIMS] and has_mean(values)


def one_per_layer(values: xarray.DataArray) -> bool:
    """Whether means over heads and tokens leave one number per layer."""
    left = set(values.dims) - {*HEAD_DIMS, *POSITION_DIMS}
    return left in ({"layer"}, {"hidden_layer"}) and has_mean(values)


def has_mean(values: xarray.DataArray) -> bool:
    """Whether the numbers are quantities, and not positions or channels with −1 for none."""
    return np.issubdtype(values.dtype, np.floating)


def check_suited(dataset: xarray.Dataset, statistic: str, suits: Callable[[xarray.DataArray], bool], of: str) -> None:
    """Check that a statistic is one that can be averaged.

    Args:
        dataset: Where it is.
        statistic: Its name.
        suits: Whether one can.
        of: What has one number per token, for the message.

    Raises:
        ValueError: It cannot; the message says which can, and why whole numbers cannot.
    """
    if suits(dataset[statistic]):
        return
    suited = [str(name) for name, values in dataset.data_vars.items() if suits(values)]
    why = "" if has_mean(dataset[statistic]) else f", {WHOLE_HAVE_NO_MEAN}"
    raise ValueError(f"statistic: expected one number per {of} and token, one of {suited}, got {statistic!r}{why}")


def over_positions(values: xarray.DataArray) -> xarray.DataArray:
    """The mean over rows and tokens, of those that are real."""
    return values.mean([dim for dim in values.dims if dim in POSITION_DIMS], keep_attrs=True)
