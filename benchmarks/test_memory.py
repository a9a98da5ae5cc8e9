"""Peak memory of one forward on the CPU, each in a process of its own: random weights of SmolLM2's shape, float32."""

from __future__ import annotations

from functools import cache, partial
from statistics import median

import pytest
from check import shrunk
from fresh_process import NUM_LAYERS, run
from results import Row
from timing import keep

pytestmark = pytest.mark.benchmark(group="memory")

STOCK = "stock sdpa, no statistics"
# By length: the most that statistics may add to the peak of stock sdpa.
GOALS = {2048: None, 8192: 1.15, 16384: None, 32768: 1.25}
# Twice as many tokens may take this much more for statistics.
GROWTH = 2.2
LONGEST = 32768
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


@pytest.mark.parametrize("length", [8192, 16384, 32768])
def test_long(benchmark, length):
    """One row; what statistics add, and how that grows with the length."""
    plain, measured, engine = benchmark.pedantic(peaks, args=(length,), rounds=1)
    shape = f"{NUM_LAYERS} layers, T {length:,}"
    rows = [Row.over(f"streaming ({engine}), statistics", shape, measured, "MiB", STOCK, plain, GOALS[length])]
    if length > 8192:
        half_plain, half_measured, _ = peaks(length // 2)
        extra, half_extra = measured - plain, half_measured - half_plain
        # Less than nothing would say how exact peaks are, and nothing of growth.
        assert half_extra > 0
        case = f"streaming ({engine}), statistics: beyond stock"
        rows.append(Row.over(case, shape, extra, "MiB", "the same with half the tokens", half_extra, GROWTH))
    keep(benchmark, rows)


def test_threshold_of_glibc(benchmark):
    """With the allocator as it is; the median of five processes each."""
    length = 8192

    def middle(*arguments: str) -> float:
        return median(run(*arguments, "--length", length)["peak_mib"] for _ in range(5))

    measured = benchmark.pedantic(middle, args=("streaming", "--statistics"), rounds=1)
    case, shape = "streaming, statistics, allocator as it is", f"{NUM_LAYERS} layers, T {length:,}"
    plain = middle("sdpa", "--stock")
    keep(benchmark, [Row.over(case, shape, measured, "MiB", STOCK, plain, GOALS[length])])


@pytest.mark.parametrize(("length", "layers"), [(8192, NUM_LAYERS), (LONGEST, 2)])
def test_padded_batch(benchmark, length, layers):
    """Two rows, the first with an eighth of padding; stock builds a mask of T × T for it, so not only against that."""
    options = ("--rows", 2, "--layers", layers)
    padding = ("--padding", length // 8)
    padded_plain, measured, engine = benchmark.pedantic(peaks, args=(length, *options, *padding), rounds=1)
    plain = peak("sdpa", length, "--stock", *options)
    case, shape = f"streaming ({engine}), statistics, padded", f"2 rows, {layers} layers, T {length:,}"
    goal = GOALS[length]
    keep(
        benchmark,
        [
            Row.over(case, shape, measured, "MiB", "stock sdpa, the same padding", padded_plain, goal),
            Row.over(case, shape, measured, "MiB", "stock sdpa, two full rows", plain, goal),
        ],
    )


def test_weights(benchmark):
    """Against eager attention that returns its weights, T × T for every head."""
    length = 2048
    weights = settled("eager", "--stock", "--output-attentions", "--length", length)
    assert weights["weights"][-2:] == [shrunk(length)] * 2
    plain, measured, engine = benchmark.pedantic(peaks, args=(length,), rounds=1)
    case, shape = f"streaming ({engine}), statistics", f"{NUM_LAYERS} layers, T {length:,}"
    keep(
        benchmark,
        [
            Row.over(case, shape, measured, "MiB", "stock eager, output_attentions", weights["peak_mib"], 0.25),
            Row.over(case, shape, measured, "MiB", STOCK, plain),
        ],
    )
