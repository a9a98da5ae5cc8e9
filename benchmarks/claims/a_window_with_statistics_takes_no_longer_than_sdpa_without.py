"""A window of 1,024 over 8,192 tokens, on `streaming` with statistics: at most the time of stock sdpa without.

Stock sdpa computes all scores and hides most of them. Four layers of Mistral's proportions with random weights, which
`record` observes; both give the same logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The helpers of all benchmarks lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

from check import shrunk
from claim import hold
from timing import compare
from workloads import windowed

length, window = 8192, 1024
stock, measuring = windowed(shrunk(length), shrunk(window), at_most=1.0)
shape = f"Mistral's proportions, 4 layers, window {window:,}, float32, T {length:,}"
hold(__file__, compare(stock, measuring, shape=shape, rounds=3))
