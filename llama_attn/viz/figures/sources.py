"""What each generated token draws on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, sources
from llama_attn.analysis.answer import GENERATED
from llama_attn.analysis.row import row_alone
from llama_attn.stats.shares import percent
from llama_attn.viz.figures.along import MOST_TOKENS, NARROWEST, PER_TOKEN, WIDEST
from llama_attn.viz.figures.canvas import BESIDE, add_legend, entitle, label_axes, new_figure
from llama_attn.viz.style import (
    AMBER,
    BLUE,
    GREEN,
    NO_DATA,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    about,
    check_flag,
    drawable,
    of_head,
    of_part,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, YELLOW)
# Of the tokens that were generated; and of segments beyond the colours there are.
OWN, OTHER = "#C9B18A", "#7A6A52"
HEIGHT, LEGEND = 5.0, 2.8


def plot_sources(
    source: Source,
    *,
    heads: Mapping[int, Sequence[int]] | None = None,
    batch: int = 0,
    sink: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Which segments the attention goes to while the answer is written: one bar per generated token.

    A bar shows the shares of `llama_attn.analysis.sources`, of the query that the token was drawn from. On the right
    stand the mean over tokens, with the share of each segment in the legend, and what uniform attention would give,
    which is as long as the segments are. What is missing to 1 lies in no segment. The sink is left out, unless asked for.

    Args:
        source: What `sources` needs.
        heads: Heads of each layer to average over; None for all.
        batch: Row of the batch.
        sink: Whether the first tokens count, which take most of the attention of many heads.
        ax: Where to draw; None for a figure of its own.

    Raises:
        ValueError: There are no segments or no generated tokens, or the head or row was not measured.
        TypeError: ``ax`` is something else than axes.
    """
    from matplotlib.patches import Patch

    check_flag("sink", sink)
    dataset = as_dataset(source)
    # Positions as in every picture of a row: of its own text.
    frame = sources(row_alone(dataset, batch), heads=heads, batch=batch)
    shown, uniform = ("share", "uniform") if sink else ("without_sink", "uniform_without_sink")
    names = list(dict.fromkeys(frame.segment))
    lines, mean = frame[frame.position >= 0], frame[frame.position < 0].set_index("segment")
    positions = lines.position.unique()
    shares = lines.pivot(index="position", columns="segment", values=shown).loc[positions, names].to_numpy()
    places = np.arange(len(positions))
    # Mean and uniform attention stand apart, as wide as can be read beside many tokens.
    wide = max(1.0, len(places) / 25)
    beside = len(places) - 0.5 + wide * np.array([1.0, 2.2])
    # Twice as wide as along the text: a bar has more to show than a step; and the legend stands beside.
    width = float(np.clip(2 * PER_TOKEN * (len(places) + 3 * wide) + LEGEND, NARROWEST, WIDEST))
    figure, axes = new_figure((width, HEIGHT), ax)
    bottoms, under = np.zeros(len(places)), np.zeros(2)
    handles = []
    for at, name in enumerate(names):
        colour = OWN if name == GENERATED else COLOURS[at] if at < len(COLOURS) else OTHER
        heights = np.nan_to_num(shares[:, at])
        axes.bar(places, heights, bottom=bottoms, width=0.9, color=colour)
        pair = np.nan_to_num(mean.loc[name, [shown, uniform]].to_numpy(dtype=float))
        axes.bar(beside, pair, bottom=under, width=wide, color=colour)
        bottoms, under = bottoms + heights, under + pair
        share = percent(pair[0]) if np.isfinite(mean.loc[name, shown]) else "no data"
        even = percent(float(mean.loc[name, uniform]))
        handles.append(Patch(color=colour, label=f"{written(name)}: {share} (uniform {even})"))
    empty = ~np.isfinite(shares).any(1)
    if empty.any():
        axes.bar(places[empty], 1, width=0.9, color=NO_DATA)
        handles.append(Patch(color=NO_DATA, label="no data"))
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.7, beside[-1] + 0.7 * wide)
    _label(axes, places, positions, lines.drop_duplicates("position").token.tolist(), beside)
    label_axes(axes, "generated token", f"attention [probability]\n{'sink included' if sink else 'without the sink'}")
    right = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    add_legend(figure, ax, handles[::-1], loc="outside right upper", given=right, title="segment: mean share")
    whose = f"{of_head(dataset, None)}{of_part(dataset)}" if heads is None else _heads(heads)
    entitle(
        axes, f"What the answer draws on, {whose}", about(dataset, batch), BESIDE + LEGEND if ax is None else BESIDE
    )
    return figure


def _label(axes: Axes, places: np.ndarray, positions: np.ndarray, tokens: list[object], beside: np.ndarray) -> None:
    """Tokens or, where they are not known and of a long answer, positions; and the two bars on the right."""
    known = [
        drawable(token) if isinstance(token, str) else f"[{position}]"
        for token, position in zip(tokens, positions, strict=True)
    ]
    if len(places) > MOST_TOKENS or not any(isinstance(token, str) for token in tokens):
        step = -(-len(places) // 20)
        places, known = places[::step], [str(position) for position in positions[::step]]
    ticks = axes.set_xticks([*places, *beside], [*known, "mean", "uniform"])
    for tick in ticks:
        tick.label1.set_parse_math(False)
        tick.label1.set_rotation(90)
        tick.label1.set_fontsize(8)


def _heads(heads: Mapping[int, Sequence[int]]) -> str:
    """Which heads, for a title."""
    named = [f"{layer}.{head}" for layer in heads for head in np.atleast_1d(np.array(heads[layer]))]
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"head{'s' if len(named) > 1 else ''} {', '.join(named[:8])}{more}"
