"""Where are the massive activations?"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.dataset import as_dataset, coordinates_along, direction_of, of_queries, require
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.sinks import EPSILON, GU, seen_enough

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source

SUN = "Sun et al., arXiv 2402.17762"
MAGNITUDE = 100.0
RATIO = 1000.0


def massive_activations(ds: Source, magnitude: float = MAGNITUDE, ratio: float = RATIO) -> xarray.Dataset:
    """Activations of the residual stream above 100 and at least 1,000 × the median magnitude of the state.

    A state is what enters one layer: all tokens × channels of one row. Its median is ``hidden_layer_median`` or,
    where that was not measured (as in a run of ``generate``), the median over its real tokens of ``hidden_median``,
    each token's median over channels, which is near it. With ``hidden_top`` every massive channel of a token is found,
    up to the ``top_k`` that were measured; with ``hidden_max`` alone only the largest of each token is known.

    Args:
        ds: Statistics with ``hidden_top`` and ``hidden_top_channel``, or ``hidden_max`` and ``hidden_max_channel``;
            and ``hidden_layer_median`` or ``hidden_median``.
        magnitude: What the magnitude must exceed [activation]; 100 by default.
        ratio: What the magnitude over the median must reach; 1,000 by default.

    Returns:
        These variables (hidden_layer, batch, query), where hidden layer i is what enters layer i and the last one the
        last layer's output; others where they say so.

        - ``massive``: whether the token has a massive activation.
        - ``magnitude`` [activation], ``ratio`` and ``channel`` of its largest activation, massive or not; the channel
          is −1 where there is no data.
        - ``complete``: whether all its massive activations are listed, which is unknown if all that were measured are
          massive.
        - ``channels`` and ``magnitudes`` [activation], with one more axis, rank: of its massive activations, largest
          first, −1 and NaN where there are no more.
        - ``median`` (hidden_layer, batch) [activation].
        - ``appears`` and ``disappears`` (batch, query): the first measured hidden layer where the token is massive,
          and the first after it has been for the last time; −1 for never.
        - ``sink_heads`` (layer, batch, query) [fraction], if ``received`` of the same tokens was measured: the share
          of the layer's heads for which the token is a sink (α > 0.3), NaN where too few queries see it to tell, as in
          `sink_positions`.

        ``attrs["part"]``: what was measured of the model, if not all of it.

    Raises:
        ValueError: A statistic was not measured, or a bound is negative.

    Source: Sun et al., arXiv 2402.17762, section 2.
    """
    import xarray

    dataset = as_dataset(ds)
    require(dataset, *needed(dataset))
    for name, bound in (("magnitude", magnitude), ("ratio", ratio)):
        if isinstance(bound, bool) or not isinstance(bound, (int, float, np.number)) or not bound >= 0:
            raise ValueError(f"{name}: expected a number from 0 up, got {bound!r}")
    measured = dataset.variables
    largest, channels = _largest(measured)
    median, of_what = _median(measured)
    over_median = largest / median.where(median > 0)
    each = (largest > magnitude) & (over_median >= ratio)
    massive = each.any("rank")
    appears, disappears = _along_the_model(massive, dataset["hidden_layer"].values)
    first, first_over_median, first_channel = (values.isel(rank=0) for values in (largest, over_median, channels))
    described = {
        "massive": (massive, "bool", f"|x| > {magnitude:g} and ≥ {ratio:g} × median"),
        "magnitude": (first, "activation", "largest magnitude of the token"),
        "ratio": (first_over_median, "ratio", "largest magnitude over the median"),
        "channel": (first_channel, "channel", "channel of the largest magnitude"),
        "channels": (channels.where(each, -1), "channel", "channels of the massive activations, largest first"),
        "magnitudes": (largest.where(each), "activation", "magnitudes of the massive activations, largest first"),
        "complete": (~each.isel(rank=-1), "bool", "whether all massive activations are listed"),
        "median": (median, "activation", of_what),
        "appears": (appears, "layer", "first hidden layer with a massive activation"),
        "disappears": (disappears, "layer", "first hidden layer after the last one"),
    }
    arrays = {
        name: (array.dims, array.values, {"units": unit, "long_name": meaning, "source": SUN})
        for name, (array, unit, meaning) in described.items()
    }
    # In cross-attention the keys are other tokens than those of the residual stream.
    if "received" in dataset and direction_of(dataset) != "cross":
        alpha, is_key = of_queries(measured["received"].where(seen_enough(measured)), dataset)
        heads = (alpha > EPSILON).where(alpha.notnull() & is_key).mean("head")
        meaning = f"share of heads from which the token receives more than {EPSILON:g}"
        arrays["sink_heads"] = heads.dims, heads.values, {"units": "fraction", "long_name": meaning, "source": GU}
    axes = {axis for dims, *_ in arrays.values() for axis in dims}
    coordinates = coordinates_along(dataset, axes)
    if "rank" not in measured[needed(dataset)[0]].dims:
        # That of the dataset, if any, is of other statistics.
        coordinates["rank"] = [0]
    return xarray.Dataset(arrays, coordinates, {"part": measured_part(dataset)})


def needed(dataset: Container[Any]) -> tuple[str, ...]:
    """The statistics that `massive_activations` reads of a dataset, or of one with these names; it may lack some."""
    top = ("hidden_top", "hidden_top_channel")
    largest = top if all(name in dataset for name in top) else ("hidden_max", "hidden_max_channel")
    return *largest, "hidden_layer_median" if "hidden_layer_median" in dataset else "hidden_median"


def _largest(measured: Mapping[Any, xarray.Variable]) -> tuple[xarray.Variable, xarray.Variable]:
    """The largest magnitudes of every token and their channels, (hidden_layer, batch, query, rank)."""
    magnitudes, channels = (measured[name] for name in needed(measured)[:2])
    if "rank" not in magnitudes.dims:
        axes = (*magnitudes.dims, "rank")
        magnitudes, channels = (values.set_dims(axes, shape=(*values.shape, 1)) for values in (magnitudes, channels))
    return magnitudes, channels


def _median(measured: Mapping[Any, xarray.Variable]) -> tuple[xarray.Variable, str]:
    """The median of every state, (hidden_layer, batch), and what it is."""
    if "hidden_layer_median" in measured:
        return measured["hidden_layer_median"], "median magnitude of all tokens and channels"
    return measured["hidden_median"].median("query"), "median over tokens of the median magnitude"


def _along_the_model(massive: xarray.Variable, layers: np.ndarray) -> tuple[xarray.Variable, xarray.Variable]:
    """The first hidden layer where each token is massive, and the first after it has been for the last time; −1 for never."""
    # Selected layers may stand in any order.
    order = np.argsort(layers)
    ordered, along = layers[order], massive.transpose("hidden_layer", ...).values[order]
    first, last = along.argmax(0), len(order) - 1 - along[::-1].argmax(0)
    ever, after = massive.any("hidden_layer"), np.append(ordered[1:], -1)
    return tuple(ever.copy(data=found).where(ever, -1) for found in (ordered[first], after[last]))
