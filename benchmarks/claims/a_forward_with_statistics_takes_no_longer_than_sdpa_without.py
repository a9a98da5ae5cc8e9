"""A forward of SmolLM2 over 4,096 tokens, on `streaming` with the eight default statistics: at most the time of stock sdpa.

Stock is transformers' own class on sdpa, which measures nothing. Both have the same weights and give the same logits. It
takes the C++ engine; `llama-attn backends` says whether it is there.
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
from workloads import forwards

length = 4096
stock, [measuring] = forwards(smollm2(), text(shrunk(length)), [("streaming", True, 1.0)])
hold(__file__, compare(stock, measuring, shape=f"SmolLM2, float32, T {length:,}"))
