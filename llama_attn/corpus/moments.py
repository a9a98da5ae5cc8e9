"""Count, mean, spread, extremes and histogram of many numbers, which merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_attn.corpus.bins import Bins

# Fields but the histogram.
DENSE = ("count", "mean", "m2", "low", "high")


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the numbers in each cell; cells without numbers have count 0, mean and m2 0.

    Merging is associative and commutative: exactly in what is counted and in the extremes, to rounding in float64 for
    means and spreads.

    Args:
        count: How many numbers.
        mean: Their mean.
        m2: Sum of their squared differences from it.
        low: The smallest; +∞ for none.
        high: The largest; −∞ for none.
        histogram: How many in each bin, the ones below and above all edges included.

    Source: Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for computing sample variances.
    """

    count: Int[np.ndarray, "*cell"]
    mean: Float[np.ndarray, "*cell"]
    m2: Float[np.ndarray, "*cell"]
    low: Float[np.ndarray, "*cell"]
    high: Float[np.ndarray, "*cell"]
    histogram: Int[np.ndarray, "*cell bin"]

    @classmethod
    def of(cls, values: Float[Tensor, "*cell number"], bins: Bins) -> Moments:
        """Of the numbers along the last axis; NaN is no number."""
        values = values.contiguous()
        missing = values.isnan().sum(-1)
        count = values.shape[-1] - missing
        mean = values.nansum(-1, dtype=torch.float64) / count.clamp(min=1)
        apart = (values.double() - mean[..., None]).nan_to_num_(nan=0.0)
        low = values.nan_to_num(nan=torch.inf).amin(-1).double()
        high = values.nan_to_num(nan=-torch.inf).amax(-1).double()
        number_of_bins = len(bins.edges) + 1
        at = bins.place(values)
        at += torch.arange(count.numel(), dtype=torch.int32).view(*count.shape, 1) * number_of_bins
        histogram = torch.bincount(at.flatten(), minlength=count.numel() * number_of_bins)
        histogram = histogram.view(*count.shape, number_of_bins)
        # What is no number counts as above.
        histogram[..., -1] -= missing
        numbers = count, mean, apart.square_().sum(-1), low, high, histogram
        return cls(*(number.numpy() for number in numbers))

    @classmethod
    def stack(cls, parts: Sequence[Moments]) -> Moments:
        """Of parts with the same cells, along a new last axis of cells."""
        axis = parts[0].count.ndim
        return cls(*(np.stack([getattr(part, field.name) for part in parts], axis) for field in fields(cls)))

    def merged(self, other: Moments) -> Moments:
        """Of the numbers of both."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        # Of infinite numbers, which half precision may give, mean and spread are NaN.
        with np.errstate(invalid="ignore", over="ignore"):
            apart = other.mean - self.mean
            # Of the one that has numbers, where the other has none: no rounding.
            mean = np.where(self.count == 0, other.mean, self.mean + apart * share)
            m2 = self.m2 + other.m2 + apart**2 * (self.count * share)
        return Moments(
            count, mean, m2, np.minimum(self.low, other.low), np.maximum(self.high, other.high),
            self.histogram + other.histogram,
        )  # fmt: skip

    def padded(self, positions: int) -> Moments:
        """With more cells along the last axis, which hold nothing."""
        more = positions - self.count.shape[-1]
        if more <= 0:
            return self
        empty = {"low": np.inf, "high": -np.inf}
        padded = {}
        for field in fields(self):
            array = getattr(self, field.name)
            axis = self.count.ndim - 1
            widths = [(0, more if at == axis else 0) for at in range(array.ndim)]
            padded[field.name] = np.pad(array, widths, constant_values=empty.get(field.name, 0))
        return Moments(**padded)

    def packed(self) -> dict[str, np.ndarray]:
        """Arrays for a file; of the histogram, most of whose bins are empty, those that are not."""
        flat = self.histogram.ravel()
        (filled,) = np.nonzero(flat)
        dense = {name: getattr(self, name) for name in DENSE}
        return dense | {"histogram_at": filled, "histogram": flat[filled], "bins": np.array(self.histogram.shape[-1:])}

    @classmethod
    def unpacked(cls, arrays: Mapping[str, np.ndarray], prefix: str, bins: Bins) -> Moments:
        """What `packed` makes, each name with a prefix.

        Raises:
            ValueError: The histogram has other bins, or is of other numbers than the count.
        """
        dense = {name: arrays[prefix + name] for name in DENSE}
        number_of_bins = len(bins.edges) + 1
        if (found := int(arrays[f"{prefix}bins"][0])) != number_of_bins:
            raise ValueError(f"{prefix}bins: expected {number_of_bins}, got {found}")
        filled, size = arrays[f"{prefix}histogram_at"], dense["count"].size * number_of_bins
        if filled.size and not (filled[-1] < size and (np.diff(filled) > 0).all()):
            raise ValueError(f"{prefix}histogram_at: expected places below {size} in order")
        histogram = np.zeros((*dense["count"].shape, number_of_bins), np.int64)
        histogram.reshape(-1)[filled] = arrays[f"{prefix}histogram"]
        if (histogram.sum(-1) != dense["count"]).any():
            raise ValueError(f"{prefix}histogram: expected as many numbers as are counted")
        return cls(**dense, histogram=histogram)

    @property
    def std(self) -> Float[np.ndarray, "*cell"]:
        """Standard deviation of the numbers (divided by n); NaN for none."""
        return np.sqrt(np.where(self.count > 0, self.m2, np.nan) / np.maximum(self.count, 1))
