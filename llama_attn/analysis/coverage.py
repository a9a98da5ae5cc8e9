"""How many keys hold how much of the attention?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from llama_attn.analysis.dataset import as_dataset, require
from llama_attn.analysis.part import measured_part

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source

MASS = (0.5, 0.9, 0.95, 0.99)


def coverage(ds: Source, mass: Sequence[float] = MASS) -> xarray.Dataset:
    r"""Bounds on the keys per query that hold a share of the attention, at least, if they are chosen best.

    Of all weights of all queries of a head, the largest are taken until they hold the share μ of all attention; k is
    their number per query, the last one counted in part. No choice of keys holds as much with fewer. It is a number
    of the queries together: some get more of their keys, and more of their mass, than others. If each query shall have
    the share μ of its own attention, it takes k keys per query on average or more, and so ``least`` or more.

    What was measured are c_b and m_b, the number of weights in bin b, (2^−(b+1), 2^−b], and their sum, per query. All
    weights of a bin are larger than all of the next, so the largest are those of whole bins up to one, which holds
    the rest r of the mass: 0 < r ≤ m_b, and k = c_0 + … + c_(b−1) + x. G(x), the mass of the x largest of the bin, is
    concave from G(0) = 0 to G(c_b) = m_b, and k is where G(x) = r. Hence

    - G(x) ≥ x m_b / c_b, by concavity: x ≤ r c_b / m_b, which gives ``most``;
    - G(x) ≤ x 2^−b, as no weight is larger: x ≥ r 2^b;
    - G(x) ≤ m_b − (c_b − x) 2^−(b+1), as each weight left out is larger than that: x ≥ c_b − (m_b − r) 2^(b+1). It
      says nothing of the last bin, whose weights have no lower bound. The larger of both gives ``least``.

    Neither can be better: weights that are equal within the bin have the k of ``most``, and those at its two edges come
    as near to ``least`` as one likes. In any bin but the last, they differ by no more than 3 − √8 = 17 % of its keys: with
    u = m_b 2^b / c_b between ½ and 1, and ρ = r / m_b, by c_b min(ρ (1 − u), (1 − ρ) (2u − 1)) ≤ c_b (3 − 2u − 1/u).

    Args:
        ds: Statistics with ``weight_count`` and ``weight_mass``.
        mass: Shares μ of the attention that goes to keys, each above 0 and up to 1; 0.5, 0.9, 0.95 and 0.99 by default.

    Returns:
        These variables, in keys.

        - ``least`` and ``most`` (layer, head, mass): bounds on k, over the real queries of all rows; NaN where there is
          no data.
        - ``uniform`` (mass), with ``layer`` in front where the layers see different keys: k of uniform attention over
          the same keys.

        ``attrs["part"]``: what was measured of the model, if not all of it.

    Raises:
        ValueError: A statistic was not measured, or a share is not in (0, 1].

    Source: bounds derived here; minimal sets of keys as in Zhang et al., arXiv 2306.14048 (H2O), section 3.
    """
    import xarray

    dataset = as_dataset(ds)
    require(dataset, "weight_count", "weight_mass")
    shares = _shares(mass)
    queries = (dataset.visible_keys > 0).sum("query")
    weight = queries / queries.sum("batch").where(lambda total: total > 0)
    axes = ("layer", "head", "weight_bin")
    counts, masses = (
        (dataset[name].fillna(0) * weight).sum("batch", min_count=1).transpose(*axes)
        for name in ("weight_count", "weight_mass")
    )
    # Where no attention goes to keys, as all of it goes to a learned sink, none hold a share of it.
    known = (masses > 0).any("weight_bin").values
    bounds = np.full((2, *known.shape, len(shares)), np.nan)
    for place in np.argwhere(known):
        at = tuple(place)
        bounds[(slice(None), *at)] = bounds_of(counts.values[at], masses.values[at], shares)
    coordinates = {"layer": dataset["layer"], "head": dataset["head"], "mass": shares}
    of_uniform = [dim for dim in ("layer",) if dim in dataset.visible_keys.dims]
    numbers = dataset.visible_keys.transpose(*of_uniform, "batch", "query").values
    numbers = numbers.reshape(*numbers.shape[: len(of_uniform)], -1)
    uniform = np.apply_along_axis(_of_uniform, -1, numbers, shares)
    described = {
        "least": (("layer", "head", "mass"), bounds[0], "lower bound on the keys that hold the share of attention"),
        "most": (("layer", "head", "mass"), bounds[1], "upper bound on the keys that hold the share of attention"),
        "uniform": ((*of_uniform, "mass"), uniform, "keys that hold the share of uniform attention"),
    }
    return xarray.Dataset(
        {
            name: (dims, values, {"units": "keys", "long_name": meaning})
            for name, (dims, values, meaning) in described.items()
        },
        coordinates,
        {"part": measured_part(dataset)},
    )


def _shares(mass: Sequence[float]) -> Float[np.ndarray, " share"]:
    numbers = list(mass) if isinstance(mass, (Sequence, np.ndarray)) and not isinstance(mass, str) else []
    for share in numbers:
        if isinstance(share, bool) or not isinstance(share, (int, float, np.number)) or not 0 < share <= 1:
            raise ValueError(f"mass: expected shares above 0 and up to 1, got {share!r} in {mass!r}")
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"mass: expected shares such as {MASS}, each once, got {mass!r}")
    return np.array(numbers, dtype=np.float64)


def bounds_of(
    counts: Float[np.ndarray, " bin"], masses: Float[np.ndarray, " bin"], shares: Float[np.ndarray, " share"]
) -> Float[np.ndarray, "2 share"]:
    """Bounds on the keys per query that hold each share, from the histogram of one head, as `coverage` says.

    Args:
        counts: Weights in each bin, per query.
        masses: Their sums, likewise; not all 0.
        shares: Shares of the attention.
    """
    counts, masses = counts.astype(np.float64), masses.astype(np.float64)
    # From the smallest up, so that weights do not get lost beside larger ones: what all bins behind each hold, and
    # what may be left out.
    behind = np.append(np.cumsum(masses[::-1])[::-1][1:], 0)
    left_out = (1 - shares) * masses.sum()
    at = np.maximum((behind[:, None] > left_out).sum(0), np.flatnonzero(masses)[0])
    count, held = counts[at], masses[at]
    left_of_bin = np.clip(left_out - behind[at], 0, held)
    rest = held - left_of_bin
    highest = 2.0**-at
    # Of the last bin any number of keys may hold what is left out.
    keys_left = np.where(at == len(masses) - 1, np.inf, left_of_bin * 2 / highest)
    before = np.cumsum(counts)[at] - count
    most = count * rest / held
    # Rounding aside, it does not exceed the other bound.
    least = np.clip(np.maximum(rest / highest, count - keys_left), 0, most)
    return np.stack([before + least, before + most])


def _of_uniform(visible: Int[np.ndarray, " query"], shares: Float[np.ndarray, " share"]) -> Float[np.ndarray, " share"]:
    """Keys per query that hold each share of uniform attention: all those of the queries that see fewest."""
    numbers = np.sort(visible[visible > 0])
    if not len(numbers):
        return np.full(len(shares), np.nan)
    keys = np.concatenate([[0], np.cumsum(numbers)])
    return np.interp(shares * len(numbers), np.arange(len(keys)), keys) / len(numbers)
