"""The report of 32,768 tokens: at most the 12 MB of its default `max_megabytes`.

Random numbers of 30 layers of 9 heads, which hardly compress, with maps, the largest weights of each query, and norms.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

# The helpers of all benchmarks lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

from check import shrunk
from claim import hold
from made_up import HEADS, LAYERS, made_up
from results import Row

from llama_attn.viz import report

length = 32_768
with tempfile.TemporaryDirectory() as folder:
    megabytes = report(made_up(shrunk(length)), Path(folder) / "report.html").stat().st_size / 1e6
shape = f"{LAYERS} layers, {HEADS} heads, T {length:,}"
hold(__file__, Row.over("report", shape, megabytes, "MB", "the limit", 12.0, at_most=1.0))
