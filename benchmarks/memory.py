"""Peaks of fresh processes, compared; by a benchmark, which keeps the numbers, and by a claim, which judges one."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import corpus_process
from check import CHECK
from fresh_process import NUM_LAYERS, run
from results import Row

# Both sides without what glibc would keep, but where a test says so.
settled = partial(run, fixed_threshold=True)


# A length that is also half of another is measured once.
@cache
def plain_peak(length: int, *options: str | int) -> float:
    """MiB of stock without statistics."""
    return settled("sdpa", "--length", length, "--stock", *options)["peak_mib"]


@cache
def measuring_peak(length: int, *options: str | int) -> tuple[float, str]:
    """MiB of ours with statistics, and the engine."""
    found = settled("streaming", "--length", length, "--statistics", *options)
    return found["peak_mib"], found["engine"]


def shape(length: int, layers: int = NUM_LAYERS) -> str:
    """For the table."""
    return f"{layers} layers, T {length:,}"


def growth(length: int, at_most: float) -> Row:
    """What statistics add to the peak of stock, over what they add with half the tokens."""
    (measured, engine), (half_measured, _) = measuring_peak(length), measuring_peak(length // 2)
    extra, half_extra = measured - plain_peak(length), half_measured - plain_peak(length // 2)
    # Less than nothing would say how exact peaks are, and nothing of growth; the few tokens of check mode say nothing.
    assert CHECK or half_extra > 0
    case = f"streaming ({engine}), statistics: beyond stock"
    return Row.over(case, shape(length), extra, "MiB", "the same with half the tokens", half_extra, at_most)


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
