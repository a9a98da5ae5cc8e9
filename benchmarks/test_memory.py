"""Peak memory of one forward on the CPU, each in a process of its own: random weights of SmolLM2's shape, float32."""

from __future__ import annotations

from statistics import median

import pytest
from check import last, once, shrunk
from fresh_process import NUM_LAYERS, run
from memory import growth, measuring_peak, plain_peak, settled, shape
from results import Row
from timing import keep

pytestmark = pytest.mark.benchmark(group="memory")

STOCK = "stock sdpa, no statistics"
# By length: the most that statistics may add to the peak of stock sdpa.
GOALS = {2048: None, 8192: 1.15, 16384: None, 32768: 1.25}
# Twice as many tokens may take this much more for statistics.
GROWTH = 2.2
LONGEST = 32768


@pytest.mark.parametrize("length", last([8192, 16384, 32768]))
def test_long(benchmark, length):
    """One row; what statistics add, and how that grows with the length."""
    measured, engine = benchmark.pedantic(measuring_peak, args=(length,), rounds=1)
    case = f"streaming ({engine}), statistics"
    rows = [Row.over(case, shape(length), measured, "MiB", STOCK, plain_peak(length), GOALS[length])]
    if length > 8192:
        rows.append(growth(length, GROWTH))
    keep(benchmark, rows)


def test_threshold_of_glibc(benchmark):
    """With the allocator as it is; the median of five processes each."""
    length = 8192

    def middle(*arguments: str) -> float:
        return median(run(*arguments, "--length", length)["peak_mib"] for _ in range(once(5)))

    measured = benchmark.pedantic(middle, args=("streaming", "--statistics"), rounds=1)
    case, plain = "streaming, statistics, allocator as it is", middle("sdpa", "--stock")
    keep(benchmark, [Row.over(case, shape(length), measured, "MiB", STOCK, plain, GOALS[length])])


@pytest.mark.parametrize(("length", "layers"), last([(8192, NUM_LAYERS), (LONGEST, 2)]))
def test_padded_batch(benchmark, length, layers):
    """Two rows, the first with an eighth of padding; stock builds a mask of T × T for it, so not only against that."""
    options = ("--rows", 2, "--layers", layers)
    padded = (*options, "--padding", length // 8)
    measured, engine = benchmark.pedantic(measuring_peak, args=(length, *padded), rounds=1)
    padded_plain, plain = plain_peak(length, *padded), plain_peak(length, *options)
    case, two_rows = f"streaming ({engine}), statistics, padded", f"2 rows, {shape(length, layers)}"
    goal = GOALS[length]
    keep(
        benchmark,
        [
            Row.over(case, two_rows, measured, "MiB", "stock sdpa, the same padding", padded_plain, goal),
            Row.over(case, two_rows, measured, "MiB", "stock sdpa, two full rows", plain, goal),
        ],
    )


def test_weights(benchmark):
    """Against eager attention that returns its weights, T × T for every head."""
    length = 2048
    weights = settled("eager", "--stock", "--output-attentions", "--length", length)
    assert weights["weights"][-2:] == [shrunk(length)] * 2
    measured, engine = benchmark.pedantic(measuring_peak, args=(length,), rounds=1)
    case, eager = f"streaming ({engine}), statistics", "stock eager, output_attentions"
    keep(
        benchmark,
        [
            Row.over(case, shape(length), measured, "MiB", eager, weights["peak_mib"], 0.25),
            Row.over(case, shape(length), measured, "MiB", STOCK, plain_peak(length)),
        ],
    )
