"""Arrays inside a page: rounded to few bits, compressed, and coarsened until all of them fit."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Compressed numbers are hardly ever smaller than this share of what they were; the truth is measured afterwards.
LEAST_SHARE = 0.25
BASE64 = 4 / 3


@dataclass(frozen=True)
class Embedded:
    """One array as the page holds it.

    Numbers are stored as codes on a scale that is linear near zero and logarithmic beyond, v = s sinh(low + step
    (code − 1)), with s the median magnitude of the layer; code 0 is NaN. So a few large numbers do not cost the small
    ones their digits.

    Args:
        text: Base64 of the deflated bytes: first the lowest byte of every element, then the next.
        dtype: ``u1``, ``u2``, ``u4`` or ``f4``.
        shape: Length of each axis.
        about: What the reader needs besides: ``scale``, ``low`` and ``step`` per layer for codes, the ``rounding``,
            and whatever was said of the pooling.
    """

    text: str
    dtype: str
    shape: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """All but the bytes, as plain JSON types."""
        return {"dtype": self.dtype, "shape": list(self.shape), **self.about}


def embed(values: np.ndarray, **about: Any) -> Embedded:
    """Deflate an array as it is: ``uint8``, ``uint16``, ``uint32`` or ``float32``."""
    dtype = values.dtype.newbyteorder("<")
    planes = np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(-1, dtype.itemsize).T
    text = base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode()
    return Embedded(text, f"{dtype.kind}{dtype.itemsize}", values.shape, about)


def embed_rounded(values: np.ndarray, bits: int, **about: Any) -> Embedded:
    """Round numbers to ``bits`` bits, layer by layer, and deflate them. What is not finite becomes "no data".

    ``about["rounding"]`` bounds the error of every number, as a share of its magnitude or of the median magnitude of
    its layer, whichever is larger.

    Args:
        values: Numbers whose first axis is the layer.
        bits: 8 or 16.
        about: What else to say of it.
    """
    codes = np.zeros(values.shape, np.uint8 if bits == 8 else np.uint16)
    steps = 2**bits - 2
    scales, lows, widths = [], [], []
    for layer, numbers in enumerate(values.astype(np.float64)):
        known = np.isfinite(numbers)
        magnitude = np.abs(numbers[known & (numbers != 0)])
        scale = float(np.median(magnitude)) if magnitude.size else 1.0
        bent = np.arcsinh(numbers[known] / scale)
        low, high = (float(bent.min()), float(bent.max())) if bent.size else (0.0, 0.0)
        width = (high - low) / steps
        codes[layer][known] = 1 + np.rint((bent - low) / (width or 1.0))
        scales.append(scale)
        lows.append(low)
        widths.append(width)
    half = max(widths, default=0.0) / 2
    rounding = float(np.sqrt(2) * np.sinh(half) + np.cosh(half) - 1)
    return embed(codes, scale=scales, low=lows, step=widths, rounding=rounding, bits=bits, **about)


@dataclass(frozen=True)
class Level:
    """One level of detail of a part.

    Args:
        size: Bytes before compression.
        make: Gives the arrays by name; none if the part is left out at this level.
    """

    size: int
    make: Callable[[], dict[str, Embedded]]


@dataclass
class Part:
    """Arrays that lose detail together.

    Args:
        name: What they are.
        levels: From the finest level to the coarsest.
        worth: How many times its size another part may have before this one is coarsened first.
    """

    name: str
    levels: Sequence[Level]
    worth: float = 1.0
    level: int = 0
    made: dict[str, Embedded] | None = None
    share: float = LEAST_SHARE

    @property
    def size(self) -> float:
        """Characters in the page; an estimate until the arrays are made."""
        if self.made is not None:
            return sum(len(array.text) for array in self.made.values())
        return BASE64 * self.share * self.levels[self.level].size

    @property
    def coarsest(self) -> bool:
        """Whether no detail is left to lose."""
        return self.level == len(self.levels) - 1

    def coarsen(self) -> None:
        """Go to the next level."""
        if self.made is not None and self.levels[self.level].size:
            self.share = max(LEAST_SHARE, self.size / BASE64 / self.levels[self.level].size)
        self.level, self.made = self.level + 1, None

    def make(self) -> None:
        """Compress the arrays of the level."""
        if self.made is None:
            self.made = self.levels[self.level].make()


def fit(parts: Sequence[Part], most: int) -> dict[str, Embedded]:
    """Coarsen the part that is largest for its worth, again and again, until all fit into ``most`` characters.

    Returns:
        All arrays by name.

    Raises:
        ValueError: They do not fit at the coarsest level.
    """
    while True:
        while sum(part.size for part in parts) > most and (left := [part for part in parts if not part.coarsest]):
            max(left, key=lambda part: part.size / part.worth).coarsen()
        for part in parts:
            part.make()
        if sum(part.size for part in parts) <= most:
            return arrays_of(parts)
        if all(part.coarsest for part in parts):
            raise ValueError(f"most: {most:,} characters are too few for the coarsest level of all parts")


def arrays_of(parts: Sequence[Part]) -> dict[str, Embedded]:
    """The arrays that were made, by name."""
    return {name: array for part in parts for name, array in (part.made or {}).items()}
