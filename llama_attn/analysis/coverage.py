"""How many keys hold most of the attention?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.dataset import as_dataset, require
from llama_attn.analysis.part import measured_part

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source


def coverage(ds: Source, mass: Sequence[float] = (0.5, 0.9, 0.95, 0.99)) -> xarray.Dataset:
    """Bounds on the keys per query that hold some share of a head's attention.

    Asked is the smallest number of (query, key) pairs that hold the share of all attention, per query: the pairs with
    the largest weights, whatever query they are of. It is what a cache must hold on average if every query had the keys
    that it wants most; a fixed number for each query would be no smaller. The histogram tells how many pairs are in
    each bin of weights and what they hold together: taking whole bins from the largest weights down, the share is
    reached within one bin, whose C pairs hold M and of which R is still lacking. As no weight in bin b is above
    min(2^−b, M), at least R · 2^b of them are needed, and no more than R · C / M, since the largest weights of a bin
    hold no less than its mean; and as none of its pairs is below 2^−(b+1), no more than R · 2^(b+1).

    Args:
        ds: Statistics with ``weight_count`` and ``weight_mass``.
        mass: Shares of the attention on keys, each above 0 and up to 1.

    Returns:
        ``least`` and ``most`` [keys per query], (layer, head, mass): the mean over the rows of the batch. NaN without
        data. With a learned sink the share is of what the keys get.

    Raises:
        ValueError: The histogram was not measured, or a share is out of range.
    """
    dataset = as_dataset(ds)
    require(dataset, "weight_count", "weight_mass")
    shares = np.asarray(mass, float)
    if shares.ndim != 1 or not shares.size or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"mass: expected shares above 0 and up to 1, got {mass!r}")
    axes = ("layer", "head", "batch", "weight_bin")
    counts, masses = (dataset[name].transpose(*axes).values.astype(float) for name in ("weight_count", "weight_mass"))
    bins = counts.shape[-1]
    total = masses.sum(-1, keepdims=True)
    # (layer, head, batch, share, bin)
    wanted = (shares * total)[..., None]
    before = (masses.cumsum(-1) - masses)[..., None, :]
    keys_before = (counts.cumsum(-1) - counts)[..., None, :]
    held, inside = masses[..., None, :], counts[..., None, :]
    # The sums themselves are rounded: what is lacking by less than that is not lacking.
    lacking = np.clip(wanted - before, 0, held)
    at = np.minimum((before + held < wanted * (1 - 1e-6)).sum(-1, keepdims=True), bins - 1)
    taken, missing, in_bin, of_bin = (
        np.take_along_axis(np.broadcast_to(part, lacking.shape), at, axis=-1)[..., 0]
        for part in (keys_before, lacking, inside, held)
    )
    largest = 2.0 ** -at[..., 0].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_weight = np.where(in_bin > 0, of_bin / in_bin, np.inf)
        least = taken + missing / largest
        # In the last bin weights may be as small as can be.
        smallest = np.where(at[..., 0] == bins - 1, 0.0, largest / 2)
        most = taken + np.minimum(np.where(missing > 0, missing / np.maximum(mean_weight, smallest), 0), in_bin)
    known = np.isfinite(total)
    least, most = (np.where(known, bound, np.nan).mean(2) for bound in (least, most))
    import xarray

    coordinates = {"layer": dataset["layer"].values, "head": dataset["head"].values, "mass": shares}
    made = xarray.Dataset(
        {
            name: (("layer", "head", "mass"), values, {"units": "keys", "long_name": f"{words} keys per query"})
            for name, values, words in (("least", least, "at least so many"), ("most", most, "at most so many"))
        },
        coordinates,
    )
    made.attrs["part"] = measured_part(dataset)
    return made
