"""A token of SmolLM2 behind a cache of 1,000, with statistics of its own: at most 1.1 times as long as on stock sdpa.

Stock is transformers' own class, which measures nothing. Turns are short, since a token takes little time, and many.
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
from workloads import decoding

cached = 1000
stock, [measuring] = decoding(smollm2(), text(shrunk(cached) + 1), [("streaming", True, 1.1)])
hold(__file__, compare(stock, measuring, shape=f"SmolLM2, float32, one token behind {cached:,}", rounds=61))
