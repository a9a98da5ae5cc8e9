"""Calls of every figure with any options: classes of values by the names of parameters, and what is special."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from asked import Asked
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from own_text import own_ends, own_text
from prompt_pictures import IMAGES, prompts, rows_of_prompt
from random_runs import NUMBERS, Run, shapes
from read_answers import image_rows
from read_back import NAMES, READ_BACK, options_of, takes

from llama_attn import viz

READ = READ_BACK | {"plot_image_rows": image_rows}
CALLED = [*NAMES, "plot_image_rows"]
# Parameters on which the values of others depend.
FIRST = ("batch", "layer", "kind", "statistic", "statistics", "segments", "image_index")
# What is drawn, and where.
NOT_CHOSEN = ("source", "a", "b", "ax")


@dataclass(frozen=True)
class Call:
    """A figure and what it is asked for.

    Args:
        name: Of the function.
        inputs: What it draws.
        options: Besides ``ax``.
        read: Compares the figure with the inputs.
        place: Makes axes of the caller's; None for a figure of its own.
    """

    name: str
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    read: Callable[[Any], None]
    place: Callable[[], Axes] | None

    def draw(self, **changes: Any) -> Any:
        return getattr(viz, self.name)(*self.inputs, **(self.options | changes))


def any_call(draw: Callable[[st.SearchStrategy], Any], name: str, forced: tuple[str, str]) -> Call:
    """A call of the figure, by what ``draw`` chooses, but for the class of value that one option has.

    Args:
        draw: Of hypothesis.
        name: Of the function.
        forced: An option and one of its classes, of `classes_of`.
    """

    def choose(option: str, classes: dict[str, st.SearchStrategy]) -> Any:
        return draw(classes[forced[1]] if option == forced[0] else st.one_of(*classes.values()))

    parameters = inspect.signature(getattr(viz, name)).parameters
    shape = draw(shapes())
    run = shape.run(**draw(NUMBERS))
    other = shape.run(**draw(NUMBERS)) if "b" in parameters else run
    chosen: dict[str, Any] = {}
    options = [each for each in parameters if each not in NOT_CHOSEN]
    for option in sorted(options, key=lambda each: FIRST.index(each) if each in FIRST else len(FIRST)):
        known = OPTIONS[option].items()
        found = {value: of(run, name, chosen) for value, of in known if value not in NEVER.get((name, option), ())}
        chosen[option] = choose(option, found)
    place = choose("ax", {where: st.just(make) for where, make in PLACES.items()}) if "ax" in parameters else None
    asked = Asked(run.stats, other.stats, pairs=run.pairs, **chosen)
    sources = (run.stats, other.stats) if "b" in parameters else (run.stats,)
    return Call(
        name, tuple(each.to_xarray() for each in sources), options_of(name, asked),
        lambda figure: READ[name](figure, asked), place,
    )  # fmt: skip


def classes_of(name: str) -> Iterator[tuple[str, str]]:
    """Every option of a figure with each of its classes of values."""
    if name not in READ:
        pytest.fail(f"{name}: READ_BACK in tests/read_back.py does not say how it is read back")
    for option in inspect.signature(getattr(viz, name)).parameters:
        if option in NOT_CHOSEN[:-1]:
            continue
        known = PLACES if option == "ax" else OPTIONS.get(option)
        if known is None:
            pytest.fail(f"{name}: OPTIONS in tests/figure_calls.py does not say what {option!r} may be")
        yield from ((option, value) for value in known if value not in NEVER.get((name, option), ()))


def _beside(empty: Figure) -> Axes:
    left, right = empty.subplots(1, 2)
    left.plot([1, 2], label="another's")
    return right


PLACES: dict[str, Callable[[], Axes] | None] = {
    "own figure": None,
    "axes": lambda: Figure().subplots(),
    "beside others": lambda: _beside(Figure(figsize=(9, 4))),
    "in a subfigure": lambda: Figure(figsize=(9, 6)).subfigures(2, 1)[0].subplots(),
}

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


def _with(*axes: str, besides: tuple[str, ...] = ()):
    """Statistics that have some of these axes, and none of those besides."""

    def of(run: Run, name: str, chosen: dict[str, Any]) -> st.SearchStrategy:
        dims = {statistic: {*run.stats.labels[statistic].dims} for statistic in statistics_of(run, name)}
        found = [each for each, has in dims.items() if has & {*axes} and not has & {*besides}]
        return st.sampled_from(found) if found else st.nothing()

    return of


def _layers(run: Run, name: str, chosen: dict[str, Any]):
    return st.sampled_from(run.stats.hidden_layers if name == "plot_hidden_norms" else run.stats.layers)


def _segment(run: Run, name: str, chosen: dict[str, Any]):
    asked = chosen.get("statistics") or [chosen.get("statistic", "sink_mass")]
    return st.sampled_from(run.stats.segments) if "segment_mass" in asked else st.nothing()


def _no_segment(run: Run, name: str, chosen: dict[str, Any]):
    asked = chosen.get("statistics") or [chosen.get("statistic", "sink_mass")]
    return st.nothing() if "segment_mass" in asked else st.none()


def _slices(steps: list[int | None]):
    def of(run: Run, name: str, chosen: dict[str, Any]):
        _, stop = own_ends(run.stats, chosen["batch"])
        ends = st.integers(-stop, stop) | st.none()
        return st.builds(slice, ends, ends, st.sampled_from(steps))

    return of


def _rows(run: Run, name: str, chosen: dict[str, Any]):
    if name == "plot_image_rows":
        known = rows_of_prompt(run.stats, chosen["segments"], chosen["batch"], chosen["layer"])
    else:
        own = own_text(run.stats, chosen["batch"])
        numbers = np.moveaxis(own["row_weights"][:, chosen["batch"]].numpy(), 2, 0)
        known = [row for row, each in zip(own.rows, numbers, strict=True) if np.isfinite(each).any()]
    return st.sampled_from(known) if known else st.nothing()


def _heads(run: Run, name: str, chosen: dict[str, Any]):
    some = st.lists(st.sampled_from(run.stats.heads), min_size=1, unique=True)
    return st.dictionaries(st.sampled_from(run.stats.layers), some, min_size=1)


def _lists(most: int, least: int = 1):
    return lambda run, name, chosen: st.lists(
        st.sampled_from(statistics_of(run, name)), min_size=least, max_size=most, unique=True
    )


def _always(*values: Any):
    return lambda run, name, chosen: st.sampled_from(values)


def _of_weights(scale: str):
    return lambda run, name, chosen: st.nothing() if chosen.get("kind") == "logits" else st.just(scale)


def _images(run: Run, name: str, chosen: dict[str, Any]):
    number = len(chosen["segments"].images[chosen["batch"]])
    return st.integers(0, number - 1) if number else st.nothing()


OPTIONS: dict[str, dict[str, Callable[[Run, str, dict[str, Any]], st.SearchStrategy]]] = {
    "batch": {"any": lambda run, name, chosen: st.integers(0, run.stats.batch - 1)},
    "layer": {
        "one": _layers,
        "output": lambda run, name, chosen: st.just(run.stats.num_layers),
        "mean": _always(None),
    },
    "head": {"mean": _always(None), "one": lambda run, name, chosen: st.sampled_from(run.stats.heads)},
    "kind": {"weights": _always("weights"), "logits": _always("logits")},
    "scale": {
        "default": _always(None), "linear": _always("linear"), "sqrt": _of_weights("sqrt"), "log": _of_weights("log"),
    },
    "statistic": {
        "of heads": _with("head", besides=("segment",)), "of KV heads": _with("kv_head"),
        "of segments": _with("segment"), "of states": _with("hidden_layer"),
    },
    "statistics": {"default": _always(None), "one": _lists(1), "several": _lists(4, 2)},
    "segment": {"none": _no_segment, "one": _segment},
    "query_slice": {"all": _always(None), "some": _slices([None]), "with steps": _slices([1, 2])},
    "row": {"last": _always(None), "one": _rows},
    "sink": {"default": _always(None), "without": _always(False), "with": _always(True)},
    "heads": {"all": _always(None), "some": _heads},
    "mass": {
        "default": _always(None),
        "some": lambda run, name, chosen: st.lists(
            st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]), min_size=1, unique=True
        ),
    },
    "segments": {"any": lambda run, name, chosen: prompts(run.stats)},
    "image_index": {"any": _images},
    "image": {kind: lambda run, name, chosen, kind=kind: IMAGES[kind] for kind in IMAGES},
}  # fmt: skip
# Classes that some figures do not know.
NEVER: dict[tuple[str, str], set[str]] = {
    **{(name, "layer"): {"mean", "output"} for name in CALLED if takes(name, "layer")},
    ("plot_hidden_norms", "layer"): {"mean"},
    ("plot_rows", "layer"): {"output"},
    ("plot_head_grid", "statistic"): {"of states"},
    ("plot_head_comparison", "statistic"): {"of states", "of segments"},
}

# What is no index, though some of it equals one, or is one to numpy.
NO_INDEX: list[Any] = [-1, 99, 0.0, 1.5, True, False, "0", "", [0], [], {}, slice(None), np.array([0, 1])]
# Of every option what is never right.
WRONG: dict[str, list[Any]] = {
    "batch": [None, *NO_INDEX],
    "layer": NO_INDEX,
    "head": NO_INDEX,
    "kind": [None, "", "scores", 0, True, 1.5, ["weights"]],
    "scale": ["", "cubic", 0, True, 1.5, ["linear"]],
    "statistic": [None, "entropie", "topk_position", "", "head", 0, True, 1.5, ["entropy"]],
    "statistics": [["entropie"], ["weights_map"], [], "entropy", ["query"], [None], 0, True, 1.5, [["entropy"]]],
    "segment": ["assistant", "", 0, True, 1.5, ["system"]],
    "query_slice": [
        slice(99, None),
        slice(0, 0),
        0,
        True,
        1.5,
        "1:",
        (0, 3),
        [0],
        slice("1", None),
        slice(0.5, None),
        slice(None, None, 0),
    ],
    "row": NO_INDEX,
    "sink": [None, 0, 1, 1.5, "no", []],
    "heads": [
        {},
        {99: [0]},
        {0: []},
        [0],
        0,
        True,
        1.5,
        "all",
        {None: [0]},
        {True: [0]},
        {0.0: [0]},
        {"0": [0]},
        *({layer: wrong} for layer in range(5) for wrong in (None, True, [False], [0.0], ["0"], "0", [[0]])),
    ],
    "mass": [[], [0], [1.5], [0.5, 0.5], 0.5, "0.5", True, [True], ["0.5"], [None], [np.nan]],
    "segments": [None, "text", 0, True, []],
    "image_index": [None, *NO_INDEX],
    "image": [None, 0, True, [], np.zeros(3), np.full((2, 2), -1.0), np.full((2, 2), np.nan)],
    "ax": ["axes", 0, True, np.array([None, None])],
}


def never_right(name: str, option: str) -> list[Any]:
    """What the figure must refuse: of many options None too, of others it is the mean, the last, or the default."""
    needs_one = option == "layer" and "mean" in NEVER[name, option]
    return [*WRONG[option], *([None] if needs_one else [])]
