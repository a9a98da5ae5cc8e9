"""Is attention local or global?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.dataset import as_dataset, labels, require
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.uniform import measured_with, share_of_keys, uniform_attention

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Array, Source

# A head is local if it looks less than this far, as a share of the distance of uniform attention.
LOCAL_BELOW = 0.5


def locality(ds: Source) -> xarray.Dataset:
    """How far each head looks, against uniform attention over the same keys: in a window, those of the window.

    Args:
        ds: Statistics with ``local_mass``, ``mean_distance`` and ``entropy``; with ``learned_sink_mass`` too, all are
            of the attention that is left to keys.

    Returns:
        These variables (layer, batch, head), means over the real queries.

        - ``local_mass`` [probability]: on distances below the configuration's ``window``.
        - ``mean_distance`` [tokens].
        - ``normalized_entropy`` [ratio]: H_i / ln n_i over the queries that have n_i > 1 outcomes, the keys they see
          and a learned sink: 1 is uniform.
        - ``relative_distance`` [ratio]: mean distance over that of uniform attention: 0 looks at itself, 1 is as far
          as uniform, almost 2 looks at the first token only.
        - ``reach``: ``"local"`` where the relative distance is below 0.5, else ``"global"``, or ``"no data"``, as in
          cross-attention, which has no distances.
        - ``uniform_local_mass`` and ``uniform_distance``, (batch), and per layer where the layers see different keys:
          the same means of uniform attention.

        Where the text, or what the layer sees of it, is hardly longer than the configuration's ``window``, local mass
        says little, and the relative distance still does. ``attrs["part"]``: what was measured of the model, if not all
        of it.

    Raises:
        ValueError: A statistic was not measured.

    Source: Vig & Belinkov (2019), arXiv 1906.04284 (mean distance); Zhai et al., arXiv 2303.06296 (entropy).
    """
    import xarray

    dataset = as_dataset(ds)
    require(dataset, "local_mass", "mean_distance", "entropy")
    uniform = uniform_attention(dataset)[["local_mass", "mean_distance"]].mean("query")
    on_keys = share_of_keys(dataset)
    distance = (dataset.mean_distance / on_keys).mean("query")
    relative = distance / uniform.mean_distance.where(uniform.mean_distance > 0)
    reach = labels(relative, LOCAL_BELOW, "local", "global")
    window = measured_with(dataset, "window")
    described = {
        "local_mass": (
            (dataset.local_mass / on_keys).mean("query"),
            "probability",
            f"mass at distances below {window}",
        ),
        "mean_distance": (distance, "tokens", "mean distance to the attended keys"),
        "normalized_entropy": (
            normalized_entropy(dataset).mean("query"),
            "ratio",
            "entropy over that of uniform attention",
        ),
        "relative_distance": (relative, "ratio", "mean distance over that of uniform attention"),
        "reach": (reach, "label", f"local where the relative distance is below {LOCAL_BELOW:g}, else global"),
        "uniform_local_mass": (uniform.local_mass, "probability", "local mass of uniform attention"),
        "uniform_distance": (uniform.mean_distance, "tokens", "mean distance of uniform attention"),
    }
    return xarray.Dataset(
        {name: array.assign_attrs(units=unit, long_name=meaning) for name, (array, unit, meaning) in described.items()},
        attrs={"part": measured_part(dataset)},
    )


def normalized_entropy(measured: Mapping[Any, Array]) -> Array:
    """H_i / ln n_i per query that has n_i > 1 outcomes, else NaN: 1 for uniform attention, 0 for a single outcome.

    The outcomes are the keys that it sees and, if ``learned_sink_mass`` says that there is one, the learned sink.
    """
    outcomes = measured["visible_keys"]
    if "learned_sink_mass" in measured:
        outcomes = outcomes + (measured["learned_sink_mass"] > 0).any("query")
    return measured["entropy"] / np.log(outcomes.where((measured["visible_keys"] > 0) & (outcomes > 1)))
