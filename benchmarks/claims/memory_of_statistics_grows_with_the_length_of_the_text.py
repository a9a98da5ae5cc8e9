"""What statistics add to the peak memory of a forward: at most 2.2 times as much for twice as many tokens.

T × T numbers would be four times as many. Of fresh processes on SmolLM2's shape, with 8,192 and 16,384 tokens, on
`streaming` with statistics and on stock sdpa without.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The helpers of all benchmarks lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

from claim import hold
from memory import growth

hold(__file__, growth(16_384, at_most=2.2))
