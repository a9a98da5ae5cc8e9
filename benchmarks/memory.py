"""Peaks of fresh processes, compared; by a benchmark, which keeps the numbers, and by a claim, which judges one."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import corpus_process
from check import CHECK, shrunk
from fresh_process import NUM_LAYERS, run
from results import Row

STOCK = "stock sdpa, no statistics"
# Both sides without what glibc would keep, but where a test says so.
settled = partial(run, fixed_threshold=True)


def peak(backend: str, length: int, *options: str | int) -> float:
    """MiB."""
    return settled(backend, "--length", length, *options)["peak_mib"]


# A length that is also half of another is measured once.
@cache
def peaks(length: int, *options: str | int) -> tuple[float, float, str]:
    """MiB of stock without statistics and of ours with them, and the engine."""
    measured = settled("streaming", "--length", length, "--statistics", *options)
    return peak("sdpa", length, "--stock", *options), measured["peak_mib"], measured["engine"]


def shape(length: int, layers: int = NUM_LAYERS) -> str:
    """For the table."""
    return f"{layers} layers, T {length:,}"


def growth(length: int, at_most: float) -> Row:
    """What statistics add to the peak of stock, over what they add with half the tokens."""
    plain, measured, engine = peaks(length)
    half_plain, half_measured, _ = peaks(length // 2)
    extra, half_extra = measured - plain, half_measured - half_plain
    # Less than nothing would say how exact peaks are, and nothing of growth; the few tokens of check mode say nothing.
    assert CHECK or half_extra > 0
    case = f"streaming ({engine}), statistics: beyond stock"
    return Row.over(case, shape(length), extra, "MiB", "the same with half the tokens", half_extra, at_most)


def beside_weights(length: int, at_most: float) -> Row:
    """Against eager attention that returns its weights, T × T for every head."""
    weights = settled("eager", "--stock", "--output-attentions", "--length", length)
    assert weights["weights"][-2:] == [shrunk(length)] * 2
    _, measured, engine = peaks(length)
    case, eager = f"streaming ({engine}), statistics", "stock eager, output_attentions"
    return Row.over(case, shape(length), measured, "MiB", eager, weights["peak_mib"], at_most)


def many_texts(folder: Path, some: int, every: int, most_added: int) -> Row:
    """A corpus of random texts: the peak after all of them, over that after some.

    Args:
        folder: Where it is written.
        some: Texts after which the peak is noted.
        every: All of them.
        most_added: MiB that the others may add.
    """
    found = run(folder, some, every, script=corpus_process.__file__)
    assert found["texts"] == every
    early, late = found["peaks"]
    what, goal = f"SmolLM2's shape, T 512, {every} texts", 1 + most_added / early
    return Row.over("peak of all texts", what, late, "MiB", f"after {some} texts", early, goal)
