"""The peak memory of `llama-attn corpus` after 300 texts: at most 50 MiB above that after 100 of them.

Random texts of 512 tokens on SmolLM2's shape, in a fresh process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

# The helpers of all benchmarks lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

from check import shrunk
from claim import hold
from memory import many_texts

with tempfile.TemporaryDirectory() as folder:
    row = many_texts(Path(folder), shrunk(100), shrunk(300), most_added=50)
hold(__file__, row)
