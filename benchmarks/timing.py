"""Times several calls side by side: what the machine does meanwhile happens to all of them."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from check import CHECK, once
from results import Row

# Of malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3

# Of every round, by the name of the case.
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """Something to time.

    Args:
        name: What the table calls it.
        call: Does it once.
        at_most: The goal for its time over that of the baseline; None if there is none.
    """

    name: str
    call: Callable[[], object]
    at_most: float | None = None


def median(benchmark) -> float:
    """Seconds of the middle round of what the fixture has timed; in check mode, on several processes, it times nothing."""
    return math.nan if CHECK else benchmark.stats.stats.median


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, in this process from now on, for every side that is timed.

    Otherwise it gives back the upper end of its heap between two layers, or not, by where small blocks happen to lie;
    pages that come back empty take up to 8 % of a forward, which would hide differences of a few per cent.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, most in ((TRIM_THRESHOLD, 2**31 - 1), (MMAP_THRESHOLD, 2**25)):
            mallopt(parameter, most)


def alternate(benchmark, baseline: Case, cases: Sequence[Case], *, shape: str, rounds: int = 5):
    """Run the baseline and every case in turn, ``rounds`` times; keep the ratios of medians.

    Whoever checks what a case gives has run it once, which is its warm-up.

    Args:
        benchmark: The fixture of pytest-benchmark, which reports the first case.
        baseline: What the others are compared with.
        cases: The others.
        shape: For the table.
        rounds: How often.

    Returns:
        The rows, which are kept, and the seconds of every round by case.
    """
    seconds: Seconds = {case.name: [] for case in (baseline, *cases)}
    reported, *others = cases

    def before() -> None:
        for case in (baseline, *others):
            clock(case, seconds)

    benchmark.pedantic(clock, args=(reported, seconds), setup=before, rounds=once(rounds))
    rows = over(baseline, cases, seconds, shape)
    keep(benchmark, rows)
    return rows, seconds


def compare(baseline: Case, case: Case, *, shape: str, rounds: int = 5) -> Row:
    """The same for a single case and without pytest; nothing is kept."""
    seconds: Seconds = {baseline.name: [], case.name: []}
    for _ in range(once(rounds)):
        clock(baseline, seconds)
        clock(case, seconds)
    return over(baseline, [case], seconds, shape)[0]


def clock(case: Case, seconds: Seconds) -> None:
    """Run a case, and add how long it took to its others."""
    _synchronize()
    start = time.perf_counter()
    case.call()
    _synchronize()
    seconds[case.name].append(time.perf_counter() - start)


def over(baseline: Case, cases: Sequence[Case], seconds: Seconds, shape: str) -> list[Row]:
    """Rows of the ratios of medians."""
    plain, rows = seconds[baseline.name], []
    for case in cases:
        ratios = [ours / stock for ours, stock in zip(seconds[case.name], plain, strict=True)]
        median, plain_median = statistics.median(seconds[case.name]), statistics.median(plain)
        rows.append(
            Row(
                case.name, shape, median, "s", baseline.name, plain_median, median / plain_median,
                case.at_most, min(ratios), max(ratios),
            )
        )  # fmt: skip
    return rows


def keep(benchmark, rows: Sequence[Row]) -> None:
    """Leave rows to be merged into the results once the test has passed."""
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
