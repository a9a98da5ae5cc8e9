"""Lines and steps along the text: every token of a short text, bins of a long one, names of those that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llama_attn.viz.style import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# As many tokens can be labelled on the widest figure, at so many inches each.
MOST_TOKENS, PER_TOKEN = 160, 0.11
NARROWEST, WIDEST = 8.0, 18.0
# More points than this would overlap: they are drawn in bins.
MOST_POINTS = 800
# How many tokens are named that stand out, and the part of the text that each name takes.
MOST_NAMES, NAME_WIDTH = 6, 0.09
# Modified z-score from which a number is an outlier.
OUTLIER = 3.5


class Bins(NamedTuple):
    """A statistic in bins of tokens, NaN where a bin has no number."""

    edges: Float[np.ndarray, " edge"]
    mean: Float[np.ndarray, " bin"]
    low: Float[np.ndarray, " bin"]
    high: Float[np.ndarray, " bin"]

    @property
    def centres(self) -> Float[np.ndarray, " bin"]:
        """Position of the middle of each bin [token]."""
        return (self.edges[1:] + self.edges[:-1]) / 2


def width_of(length: int) -> float:
    """Width of a figure along so many tokens, all of which are named if they fit [inches]."""
    return float(np.clip(PER_TOKEN * length, NARROWEST, WIDEST)) if length <= MOST_TOKENS else WIDEST


def tokens_per_bin(points: int) -> int:
    """Points that are drawn as one: the smallest power of two that leaves at most `MOST_POINTS`."""
    return 1 << max(0, (-(-points // MOST_POINTS) - 1).bit_length())


def in_bins(positions: Int[np.ndarray, " token"], values: Float[np.ndarray, " token"], size: int) -> Bins:
    """Mean, smallest and largest number of every ``size`` tokens that were measured."""
    starts = np.arange(0, len(values), size)
    padded = np.full(len(starts) * size, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, size)
    count = np.isfinite(rows).sum(1)
    empty = count == 0
    with np.errstate(invalid="ignore"):
        mean = np.where(empty, np.nan, np.nansum(rows, 1) / count)
    low, high = np.where(np.isnan(rows), np.inf, rows).min(1), np.where(np.isnan(rows), -np.inf, rows).max(1)
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    edges = np.append(positions[starts], positions[-1] + step) - step / 2
    return Bins(edges, mean, np.where(empty, np.nan, low), np.where(empty, np.nan, high))


def draw_line(
    axes: Axes, positions: np.ndarray, values: np.ndarray, colour: str, label: str | None = None, **settings: Any
) -> None:
    """A line from token to token; in a long text the mean of every bin, in a band from its smallest to its largest."""
    size = tokens_per_bin(len(values))
    if size == 1:
        axes.plot(positions, values, color=colour, label=label, **settings)
        return
    bins = in_bins(positions, values, size)
    axes.fill_between(bins.centres, bins.low, bins.high, color=colour, alpha=0.3, linewidth=0)
    axes.plot(bins.centres, bins.mean, color=colour, label=label, **(settings | {"linewidth": 1, "marker": None}))


def draw_steps(axes: Axes, positions: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Steps from 0; in a long text the mean of every bin, before its largest in a light colour."""
    size = tokens_per_bin(len(values))
    bins = in_bins(positions, values, size)
    if size > 1:
        axes.stairs(bins.high, bins.edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(bins.mean, bins.edges, fill=True, color=colour)


def of_bins(points: int, what: str = "smallest to largest in light colour") -> str:
    """How points were pooled, for a title; nothing if each is a token."""
    size = tokens_per_bin(points)
    return f", means of {size} tokens, {what}" if size > 1 else ""


def name_outliers(axes: Axes, positions: np.ndarray, values: np.ndarray, tokens: Sequence[str] | None) -> None:
    """Write position and token at outliers, the farthest first, on axes that do not name every token.

    Outliers are farther from the median than 3.5 standard deviations, estimated from the median of all deviations. On
    logarithmic axes ratios count. Of neighbours only the farthest is named.

    Source: Iglewicz & Hoaglin (1993), How to Detect and Handle Outliers.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return
    shown = np.log(np.where(values > 0, values, np.nan)) if axes.get_yscale() == "log" else values
    away = np.abs(shown - np.nanmedian(shown))
    away[~(0.6745 * away > OUTLIER * np.nanmedian(away))] = 0
    write_names(axes, positions, values, tokens, away)


def write_names(
    axes: Axes, positions: np.ndarray, values: np.ndarray, tokens: Sequence[str] | None, strength: np.ndarray
) -> None:
    """Write position and token at the strongest points that are apart, as many as can be read.

    Args:
        axes: Where.
        positions: Of the points [token].
        values: Height of the points.
        tokens: Token of each, if known.
        strength: Which to name first; those of 0 never.
    """
    apart = NAME_WIDTH * (positions[-1] - positions[0])
    named: list[int] = []
    for place in np.argsort(-strength, kind="stable").tolist():
        if len(named) == MOST_NAMES or not strength[place] > 0:
            break
        if all(abs(positions[place] - positions[other]) >= apart for other in named):
            named.append(place)
    middle = (positions[0] + positions[-1]) / 2
    for place in named:
        # A bare number would seem to be the height.
        text = f"token {positions[place]}" if tokens is None else f"{positions[place]} {drawable(tokens[place])}"
        side = "left" if positions[place] < middle else "right"
        axes.annotate(
            text, (positions[place], values[place]), (4 if side == "left" else -4, 0), textcoords="offset points",
            ha=side, va="center", fontsize=7, parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip
