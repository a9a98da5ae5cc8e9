"""Which part of a model and of a text was measured, in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_attn.analysis.dataset import direction_of, without_attention

if TYPE_CHECKING:
    import xarray

MOST_RANGES = 12
ORDINALS = {1: "st", 2: "nd", 3: "rd"}


def measured_part(dataset: xarray.Dataset) -> str:
    """What a statement about a run rests on, if not on all of it: ``layers 0–9 of 30, every 3rd query``.

    Empty for the whole: all layers of the model that have attention, all heads, and all queries from the first key on.
    """
    parts = []
    if "layer" in dataset.coords:
        layers = {int(layer) for layer in dataset["layer"].values}
        every = range(int(dataset.attrs.get("num_layers", 0)))
        if set(every) - layers - set(without_attention(dataset)):
            parts.append(f"{named_layers(sorted(layers))} of {len(every)}")
    config = json.loads(dataset.attrs.get("config", "{}"))
    if "head" in dataset.coords:
        heads = sorted(int(head) for head in dataset["head"].values)
        if config.get("heads") is not None or heads != list(range(len(heads))):
            parts.append(f"head{'s' if len(heads) > 1 else ''} {in_ranges(heads)}")
    if (stride := int(config.get("query_stride", 1))) > 1:
        ending = "th" if stride % 100 in (11, 12, 13) else ORDINALS.get(stride % 10, "th")
        parts.append(f"every {stride}{ending} query")
    if "query" in dataset.coords and "key" in dataset.coords and direction_of(dataset) != "cross":
        first = int(dataset["query"].values[0])
        # What lies in a cache has been asked before.
        if first - int(dataset["key"].values[0]) >= stride:
            parts.append(f"queries from {first} on")
    return ", ".join(parts)


def named_layers(layers: Sequence[int]) -> str:
    """``layers 0–2, 4``: neighbours in one range, and no more than fit on a line."""
    return f"layer{'s' if len(layers) > 1 else ''} {in_ranges(layers)}"


def in_ranges(numbers: Sequence[int]) -> str:
    """``0–2, 4``: neighbours in one range, and no more than fit on a line."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [f"{first}–{last}" if last > first else str(first) for first, last in runs[:MOST_RANGES]]
    return f"{', '.join(words)}{', …' if len(runs) > MOST_RANGES else ''}"
