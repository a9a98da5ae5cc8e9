"""How colours follow numbers: evenly, or so that weak attention is seen beside a sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from llama_attn.viz.style import LOWEST

if TYPE_CHECKING:
    from matplotlib.colors import Normalize

Scale = Literal["linear", "sqrt", "log"]
"""What of a weight the colours follow."""
SCALES: tuple[str, ...] = get_args(Scale)
# Of a colour bar: parts of its length that ticks at least lie apart.
APART = 0.05


@dataclass(frozen=True)
class ColourScale:
    """Colours of a picture.

    Args:
        norm: From numbers to colours.
        ticks: What is written beside the colour bar; None for matplotlib's choice.
        note: What the label of the colour bar says of the scale, on a line of its own.
        extend: On which ends numbers lie beyond the colours, for the colour bar.
    """

    norm: Normalize
    ticks: list[float] | None = None
    note: str = ""
    extend: Literal["neither", "min"] = "neither"


def colour_scale(cells: np.ndarray, kind: str, scale: str | None) -> ColourScale:
    """The scale of a map.

    Args:
        cells: All that is drawn in these colours, NaN for "no data".
        kind: Attention weights, which begin at 0, or scores.
        scale: What was asked for; None for the square root of weights, evenly for scores.
    """
    from matplotlib.colors import LogNorm, Normalize

    finite = cells[np.isfinite(cells)]
    if kind == "logits":
        high = finite.max(initial=-np.inf) if finite.size else 1.0
        return ColourScale(Normalize(finite.min(initial=high), high))
    high = float(finite.max(initial=0.0)) or 1.0
    if scale == "linear":
        return ColourScale(Normalize(0.0, high))
    if scale == "log":
        low = max(float(finite[finite > 0].min(initial=high)), LOWEST * high)
        beyond: Literal["neither", "min"] = "min" if (finite < low).any() else "neither"
        # What is smaller, 0 too, has the darkest colour; grey is for no data.
        return ColourScale(LogNorm(min(low, 0.5 * high), high, clip=True), note="\nlog scale", extend=beyond)
    return square_root(high)


def square_root(high: float) -> ColourScale:
    """Colours that follow the square root, from 0 to ``high``."""
    from matplotlib.colors import PowerNorm

    return ColourScale(PowerNorm(0.5, 0, high), square_root_ticks(high), "\nsquare-root scale")


def square_root_ticks(high: float) -> list[float]:
    """What to write beside such colours: 0 and some of 1, 2, 5 of the two decades below ``high``, so that all are apart."""
    series = [digit * 10.0**power for power in range(-8, 4) for digit in (1, 2, 5)]
    ticks = [0.0]
    for tick in series:
        if high / 100 <= tick <= high and np.sqrt(tick / high) - np.sqrt(ticks[-1] / high) >= APART:
            ticks.append(tick)
    return ticks


def check_scale(scale: str | None, kind: str) -> None:
    """Check what colours shall follow.

    Raises:
        ValueError: No such scale, or another than the linear one for scores.
    """
    if scale is not None and scale not in SCALES:
        raise ValueError(f"scale: expected one of {list(SCALES)}, or None for the default, got {scale!r}")
    if kind == "logits" and scale not in (None, "linear"):
        raise ValueError(f"scale: expected 'linear' for scores, which are negative too, got {scale!r}")
