"""The peak memory of a forward over 2,048 tokens: at most a quarter of that with `output_attentions=True`.

Of fresh processes on SmolLM2's shape: ours on `streaming` with statistics, transformers' own class on eager attention,
which returns its weights, T × T for every head. The share falls as the text gets longer.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The helpers of all benchmarks lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

from claim import hold
from memory import beside_weights

hold(__file__, beside_weights(2048, at_most=0.25))
