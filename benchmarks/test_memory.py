"""Peak memory of one forward on the CPU, each in a process of its own: random weights of SmolLM2's shape, float32."""

from __future__ import annotations

from statistics import median

import pytest
from fresh_process import NUM_LAYERS, run
from memory import STOCK, beside_weights, growth, peak, peaks, shape
from results import Row
from timing import keep

pytestmark = pytest.mark.benchmark(group="memory")

# By length: the most that statistics may add to the peak of stock sdpa.
GOALS = {2048: None, 8192: 1.15, 16384: None, 32768: 1.25}
# Twice as many tokens may take this much more for statistics.
GROWTH = 2.2
LONGEST = 32768


@pytest.mark.parametrize("length", [8192, 16384, 32768])
def test_long(benchmark, length):
    """One row; what statistics add, and how that grows with the length."""
    plain, measured, engine = benchmark.pedantic(peaks, args=(length,), rounds=1)
    case = f"streaming ({engine}), statistics"
    rows = [Row.over(case, shape(length), measured, "MiB", STOCK, plain, GOALS[length])]
    if length > 8192:
        rows.append(growth(length, GROWTH))
    keep(benchmark, rows)


def test_threshold_of_glibc(benchmark):
    """With the allocator as it is; the median of five processes each."""
    length = 8192

    def middle(*arguments: str) -> float:
        return median(run(*arguments, "--length", length)["peak_mib"] for _ in range(5))

    measured = benchmark.pedantic(middle, args=("streaming", "--statistics"), rounds=1)
    case, plain = "streaming, statistics, allocator as it is", middle("sdpa", "--stock")
    keep(benchmark, [Row.over(case, shape(length), measured, "MiB", STOCK, plain, GOALS[length])])


@pytest.mark.parametrize(("length", "layers"), [(8192, NUM_LAYERS), (LONGEST, 2)])
def test_padded_batch(benchmark, length, layers):
    """Two rows, the first with an eighth of padding; stock builds a mask of T × T for it, so not only against that."""
    options = ("--rows", 2, "--layers", layers)
    padding = ("--padding", length // 8)
    padded_plain, measured, engine = benchmark.pedantic(peaks, args=(length, *options, *padding), rounds=1)
    plain = peak("sdpa", length, "--stock", *options)
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
    length = 2048
    row = benchmark.pedantic(beside_weights, args=(length, 0.25), rounds=1)
    plain, measured, _ = peaks(length)
    keep(benchmark, [row, Row.over(row.case, row.shape, measured, "MiB", STOCK, plain)])
