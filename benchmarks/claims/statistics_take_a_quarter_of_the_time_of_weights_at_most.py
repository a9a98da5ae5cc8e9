"""A forward of SmolLM2 over 2,048 tokens with statistics: at most a quarter of the time that they take from weights.

From the weights of `output_attentions=True`, as transformers' own class returns them on eager attention, come six of the
eight default statistics, by a line of PyTorch each; both give the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The helpers of all benchmarks lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

from check import shrunk
from claim import hold
from models import smollm2, text
from timing import compare
from workloads import from_eager

length = 2048
eager, measuring = from_eager(smollm2(), text(shrunk(length)), at_most=0.25)
hold(__file__, compare(eager, measuring, shape=f"SmolLM2, float32, T {length:,}"))
