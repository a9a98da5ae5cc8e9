"""Calls of every figure with any options: strategies by the names of parameters, and tables for what is special."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from asked import Asked
from hypothesis import strategies as st
from own_text import own_ends, own_text
from random_runs import NUMBERS, Run, shapes
from read_back import READ_BACK, options_of

from llama_attn import viz

# Parameters on which the values of others depend.
FIRST = ("batch", "layer", "kind", "statistic", "statistics")


@dataclass(frozen=True)
class Call:
    """A figure and what it is asked for.

    Args:
        name: Of the function.
        inputs: What it draws.
        options: Besides ``ax``.
        read: Compares the figure with the inputs.
        wrong: For every option some that cannot be.
    """

    name: str
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    read: Callable[[Any], None]
    wrong: dict[str, list[Any]]

    def draw(self, **changes: Any) -> Any:
        return getattr(viz, self.name)(*self.inputs, **(self.options | changes))


def any_call(draw: Callable[[st.SearchStrategy], Any], name: str) -> Call:
    """A call of the figure, by what ``draw`` chooses."""
    parameters = inspect.signature(getattr(viz, name)).parameters
    shape = draw(shapes())
    run, other = shape.run(**draw(NUMBERS)), shape.run(**draw(NUMBERS))
    chosen: dict[str, Any] = {}
    options = [each for each in parameters if each not in ("source", "a", "b", "ax")]
    for option in sorted(options, key=lambda each: FIRST.index(each) if each in FIRST else len(FIRST)):
        if option not in OPTIONS:
            pytest.fail(f"{name}: OPTIONS in tests/figure_calls.py does not say what {option!r} may be")
        chosen[option] = draw(OPTIONS[option](run, name, chosen))
    if name not in READ_BACK:
        pytest.fail(f"{name}: READ_BACK in tests/read_back.py does not say how it is read back")
    asked = Asked(run.stats, other.stats, pairs=run.pairs, **chosen)
    sources = (run.stats, other.stats) if "a" in parameters else (run.stats,)
    wrong = {option: WRONG[option] for option in options}
    return Call(
        name, tuple(each.to_xarray() for each in sources), options_of(name, asked),
        lambda figure: READ_BACK[name](figure, asked), wrong,
    )  # fmt: skip


# Axes of what figures of a statistic take.
TOKENS, HEADS = {"query", "key"}, {"head", "kv_head"}
OF_RUNS = {"query_bin", "key_bin", "distance_bin", "weight_bin", "rank", "row"}


def statistics_of(run: Run, name: str) -> list[str]:
    """What a figure of a statistic may be asked for."""
    found = []
    for statistic in run.stats:
        dims = {*run.stats.labels[statistic].dims}
        heads, tokens = dims & HEADS, dims & TOKENS
        real = run.stats[statistic].is_floating_point() and not dims & OF_RUNS
        suits = {
            "plot_head_grid": heads and tokens,
            "plot_head_comparison": heads and tokens and "segment" not in dims,
            "plot_layer_profile": True,
            "plot_token_strip": tokens,
        }
        if name not in suits:
            pytest.fail(
                f"{name}: statistics_of in tests/figure_calls.py does not say which statistics it may be asked for"
            )
        if real and suits[name]:
            found.append(statistic)
    return found


def _layers(run: Run, name: str, chosen: dict[str, Any]):
    measured = run.stats.hidden_layers if name == "plot_hidden_norms" else run.stats.layers
    return st.sampled_from([*measured, *([None] if name == "plot_rows" else [])])


def _segments(run: Run, name: str, chosen: dict[str, Any]):
    asked = chosen.get("statistics") or [chosen.get("statistic", "sink_mass")]
    return st.sampled_from(run.stats.segments) if "segment_mass" in asked else st.none()


def _slices(run: Run, name: str, chosen: dict[str, Any]):
    _, stop = own_ends(run.stats, chosen["batch"])
    ends = st.integers(-stop, stop) | st.none()
    return st.none() | st.builds(slice, ends, ends, st.sampled_from([None, 1, 2]))


def _rows(run: Run, name: str, chosen: dict[str, Any]):
    own = own_text(run.stats, chosen["batch"])
    numbers = own["row_weights"][:, chosen["batch"]].numpy()
    known = [row for row, each in zip(own.rows, np.moveaxis(numbers, 2, 0), strict=True) if np.isfinite(each).any()]
    return st.sampled_from([None, *known])


def _heads(run: Run, name: str, chosen: dict[str, Any]):
    some = st.lists(st.sampled_from(run.stats.heads), min_size=1, unique=True)
    return st.none() | st.dictionaries(st.sampled_from(run.stats.layers), some, min_size=1)


OPTIONS: dict[str, Callable[[Run, str, dict[str, Any]], st.SearchStrategy]] = {
    "batch": lambda run, name, chosen: st.integers(0, run.stats.batch - 1),
    "layer": _layers,
    "head": lambda run, name, chosen: st.sampled_from([None, *run.stats.heads]),
    "kind": lambda run, name, chosen: st.sampled_from(["weights", "logits"]),
    "scale": lambda run, name, chosen: st.sampled_from(
        [None, "linear"] if chosen.get("kind") == "logits" else [None, "linear", "sqrt", "log"]
    ),
    "statistic": lambda run, name, chosen: st.sampled_from(statistics_of(run, name)),
    "statistics": lambda run, name, chosen: st.none() | st.lists(
        st.sampled_from(statistics_of(run, name)), min_size=1, max_size=4, unique=True
    ),
    "segment": _segments,
    "query_slice": _slices,
    "row": _rows,
    "sink": lambda run, name, chosen: st.sampled_from([None, False, True]),
    "heads": _heads,
    "mass": lambda run, name, chosen: st.none() | st.lists(
        st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]), min_size=1, unique=True
    ),
}  # fmt: skip

# Nothing of it is ever right.
WRONG: dict[str, list[Any]] = {
    "batch": [-1, 99],
    "layer": [-1, 99],
    "head": [-1, 99],
    "kind": ["", "scores"],
    "scale": ["", "cubic"],
    "statistic": ["entropie", "topk_position"],
    "statistics": [["entropie"], ["weights_map"]],
    "segment": ["assistant"],
    "query_slice": [slice(99, None), slice(0, 0)],
    "row": [-1, 99],
    "sink": [],
    "heads": [{}, {99: [0]}, {0: []}],
    "mass": [[], [0], [1.5], [0.5, 0.5]],
}
