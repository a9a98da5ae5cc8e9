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
    """What a statement about a run rests on, if not on all of it: ``layers 0–9 of 30, heads 0–3 of 9``.

    Empty for the whole: all layers of the model that have attention, all heads, and all queries from the first key on.
    """
    parts = [layers] if (layers := measured_layers(dataset)) else []
    config = json.loads(dataset.attrs.get("config", "{}"))
    if "head" in dataset.coords:
        heads = sorted(int(head) for head in dataset["head"].values)
        if total := int(dataset.attrs.get("num_heads", 0)):
            parts += [f"{named_range('head', heads)} of {total}"] if len(heads) < total else []
        elif config.get("heads") is not None or heads != list(range(len(heads))):
            # An older file does not say of how many.
            parts.append(named_range("head", heads))
    if (stride := int(config.get("query_stride", 1))) > 1:
        ending = "th" if stride % 100 in (11, 12, 13) else ORDINALS.get(stride % 10, "th")
        parts.append(f"every {stride}{ending} query")
    if "query" in dataset.coords and "key" in dataset.coords and direction_of(dataset) != "cross":
        first = int(dataset["query"].values[0])
        # What lies in a cache has been asked before.
        if first - int(dataset["key"].values[0]) >= stride:
            parts.append(f"queries from {first} on")
    return ", ".join(parts)


def measured_layers(dataset: xarray.Dataset) -> str:
    """``layers 0–9 of 30``; empty where every layer of the model that has attention was measured."""
    layers = [int(layer) for layer in dataset.coords.get("layer", ())]
    if not layers:
        # Of the residual stream the last is the output.
        layers = [int(layer) for layer in dataset.coords.get("hidden_layer", ())][:-1]
    return part_of_layers(layers, int(dataset.attrs.get("num_layers", 0)), without_attention(dataset))


def part_of_layers(layers: Sequence[int], total: int, without: Sequence[int] = ()) -> str:
    """``layers 0–9 of 30``; empty for all of them but those without attention."""
    missing = {*range(total)} - {*layers, *without}
    return f"{named_layers(layers)} of {total}" if layers and missing else ""


def named_layers(layers: Sequence[int]) -> str:
    """``layers 0–2, 4``: neighbours in one range, and no more than fit on a line."""
    return named_range("layer", layers)


def named_range(word: str, numbers: Sequence[int]) -> str:
    """``heads 0–2, 4``: a word and the numbers, as in `named_layers`."""
    return f"{word}{'s' if len(numbers) > 1 else ''} {in_ranges(numbers)}"


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
