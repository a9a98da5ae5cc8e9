"""`record` around transformers' own class on sdpa: at most 1.03 times as long as our class, which measures the same.

SmolLM2 over 2,048 tokens, with the eight default statistics, which are the same from both.
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
from workloads import around_stock

length = 2048
ours, recorded = around_stock(smollm2(), text(shrunk(length)), at_most=1.03)
hold(__file__, compare(ours, recorded, shape=f"SmolLM2, float32, T {length:,}"))
