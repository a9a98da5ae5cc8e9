"""What the histogram of weights, the mass on kept keys and the weights of 64 queries cost beside the default statistics."""

from __future__ import annotations

import pytest
import torch
from check import shrunk
from models import ours
from timing import Case, alternate, keep_freed_memory

from llama_attn import AttentionStatsConfig
from llama_attn.stats.table import default_statistics

pytestmark = pytest.mark.benchmark(group="decisions")


@torch.no_grad()
def test_beside_the_default_statistics(benchmark, model, text):
    """One forward at 4,096 tokens."""
    length = shrunk(4096)
    keep_freed_memory()
    ids, mine = text(length), ours(model, "streaming")
    half = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.5
    more = {
        "histogram of weights": {"statistics": (*default_statistics(), "weight_count", "weight_mass")},
        "mass on kept keys": {"keep": half},
        "weights of 64 queries": {"rows": slice(-64, None)},
    }

    def forward(**asked):
        config = AttentionStatsConfig(**asked)
        return mine(ids, logits_to_keep=1, use_cache=False, output_attention_stats=config).attention_stats

    plain = forward()
    found = {name: forward(**asked) for name, asked in more.items()}
    for stats in found.values():
        for name in plain.names:
            torch.testing.assert_close(stats[name], plain[name])
    mass = found["histogram of weights"]["weight_mass"].sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-4)
    rows = found["weights of 64 queries"]["row_weights"]
    torch.testing.assert_close(rows.amax(-1), plain["max_weight"][..., -64:], rtol=0, atol=1e-4)
    goals = dict(zip(more, (1.05, 1.03, 1.03), strict=True))
    cases = [Case(name, lambda asked=asked: forward(**asked), goals[name]) for name, asked in more.items()]
    baseline = Case(f"default statistics ({plain.engine})", forward)
    alternate(benchmark, baseline, cases, shape=f"SmolLM2, float32, T {length:,}")
