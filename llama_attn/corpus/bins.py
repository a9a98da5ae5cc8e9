"""Fixed bins, of values by their unit and of positions, so that counts of any texts add up.

Many values would lie on edges: shares such as 1/2, one key, a distance of 1. So that their rounding, which differs with
the batch that a text is read in, does not decide, values are raised by 2^−18 of themselves before they are put into bins.
Where there is none below zero no edge is at zero, and those of logits are odd numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

RAISED = 1 + 2.0**-18


@dataclass(frozen=True)
class Linear:
    """Bins of the same width, and one below and one above them.

    Args:
        start: The first edge.
        width: A power of two.
        count: Bins between the edges.
    """

    start: float
    width: float
    count: int

    @property
    def edges(self) -> Float[np.ndarray, " edge"]:
        """Where bins begin, but the one below; the last edge begins the one above."""
        return self.start + self.width * np.arange(self.count + 1)

    def place(self, values: Float[Tensor, "*cell"]) -> Int[Tensor, "*cell"]:
        """The bin of each value, 0 for the one below; NaN is above."""
        at = values.mul(RAISED).div_(self.width).sub_(self.start / self.width).floor_().add_(1)
        return at.nan_to_num_(nan=self.count + 1).clamp_(0, self.count + 1).int()


@dataclass(frozen=True)
class Octaves:
    """Two bins for each doubling, [2^e, 1.5 · 2^e) and [1.5 · 2^e, 2 · 2^e), one below, for what is negative too, and one above.

    Args:
        lowest: e of the first bin.
        highest: e of the edge behind the last.
    """

    lowest: int
    highest: int

    @property
    def edges(self) -> Float[np.ndarray, " edge"]:
        """Where bins begin, but the one below; the last edge begins the one above."""
        octaves = 2.0 ** np.arange(self.lowest, self.highest)
        return np.append(np.stack([octaves, 1.5 * octaves], 1).ravel(), 2.0**self.highest)

    def place(self, values: Float[Tensor, "*cell"]) -> Int[Tensor, "*cell"]:
        """The bin of each value, 0 for the one below; NaN is above."""
        # The bits of a float: sign, exponent, then the first of the mantissa, which says which half of the octave.
        integers, shift, bias = (torch.int64, 51, 1023) if values.dtype == torch.float64 else (torch.int32, 22, 127)
        bits = values.mul(RAISED).view(integers) >> shift
        at = bits.sub_(2 * (bias + self.lowest) - 1).clamp_(0, 2 * (self.highest - self.lowest) + 1)
        return at.masked_fill_(values.isnan(), 2 * (self.highest - self.lowest) + 1).int()


Bins = Linear | Octaves
BINS: dict[str, Bins] = {
    "probability": Linear(1 / 64, 1 / 64, 62),
    "nat": Linear(1 / 4, 1 / 4, 63),
    "logit": Linear(-63, 2, 63),
    "tokens": Octaves(-2, 24),
    "keys": Octaves(0, 24),
    "attention": Octaves(-20, 24),
    "activation": Octaves(-10, 20),
}
# Of statistics that somebody added, in a unit of their own.
OTHERS = Octaves(-20, 20)


def value_bins(unit: str) -> Bins:
    """The bins of values of a unit."""
    return BINS.get(unit, OTHERS)


def position_starts(length: int) -> list[int]:
    """First position of each bin of positions, 2^b − 1, as the bins of `distance_histogram` begin.

    Args:
        length: Tokens of the longest text.
    """
    return [2**b - 1 for b in range(max(length, 1).bit_length())]
