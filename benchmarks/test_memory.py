"""Peak memory of one forward, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The weights are random: memory does not depend on them, and reading the checkpoint has a peak of its own.
SCRIPT = """
import resource, sys, torch
from transformers import LlamaConfig
from llama_attn import LlamaForCausalLM
backend, statistics, length = sys.argv[1], sys.argv[2] == "on", int(sys.argv[3])
config = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)
model = LlamaForCausalLM._from_config(config, attn_implementation=backend).eval()
ids = torch.randint(49152, (1, length), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    output = model(ids, logits_to_keep=1, output_attention_stats=statistics)
assert output.logits.isfinite().all()
if statistics:
    assert output.attention_stats["entropy"].isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(backend: str, statistics: str, length: int) -> float:
    """MiB of resident memory at the peak."""
    command = [sys.executable, "-c", SCRIPT, backend, statistics, str(length)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


@pytest.mark.parametrize("backend", ["streaming", "sdpa"])
def test_statistics_cost_little_memory(backend, benchmark):
    plain = peak("sdpa", "off", 4096)
    measured = benchmark.pedantic(peak, args=(backend, "on", 4096), rounds=1)
    benchmark.group = "peak memory, T = 4096"
    benchmark.extra_info.update(plain_mib=plain, measured_mib=measured, ratio=measured / plain)
    assert measured <= 1.3 * plain, f"{measured:.0f} MiB with statistics on {backend}, {plain:.0f} without on sdpa"
