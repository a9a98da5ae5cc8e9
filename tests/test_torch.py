"""What only the torch engine has: how many scores it computes for a call is counted block by block."""

from __future__ import annotations

import pytest
import torch
from calls import CPU

from llama_attn import AttentionStatsConfig
from llama_attn.engines import torch as engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility


def scores_of(monkeypatch):
    """Numbers of scores that the engine computes, block by block."""
    counts, blocks = [], engine._blocks

    def counted(*arguments, **options):
        for block in blocks(*arguments, **options):
            counts.append(block.scores.numel())
            yield block

    monkeypatch.setattr(engine, "_blocks", counted)
    return counts


@pytest.mark.parametrize("kind", ["window", "chunks", "documents"])
def test_no_work_outside_the_window(kind, monkeypatch):
    length, width, heads = 4_096, 256, 2
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 8, generator=generator) for _ in range(3))
    positions = torch.arange(length)
    spans = {
        "window": {"first_key": (positions - width + 1)[None]},
        "chunks": {"first_key": (positions // width * width)[None]},
        "documents": {"sequence": (positions // width)[None]},
    }
    visibility = Visibility(1, 0, length, CPU, **spans[kind])
    pairs = heads * int(visibility.visible_keys.sum())
    counts = scores_of(monkeypatch)
    wanted = Wanted([s for s in statistics_table().values() if s.default], AttentionStatsConfig())
    walk = engine.walk(query, key, value, visibility, Scoring(0.3), wanted)
    forward = sum(counts)
    engine.backward(
        torch.ones_like(walk.output), query, key, value, walk.output, walk.logsumexp, visibility, Scoring(0.3)
    )
    # A block has a triangle on both sides, of half as many pairs as the rows of the block squared.
    assert pairs <= forward <= 2.1 * pairs
    assert sum(counts) == 2 * forward
    full = Visibility(1, 0, length, CPU)
    counts.clear()
    engine.walk(query, key, value, full, Scoring(0.3))
    assert sum(counts) > 3 * forward, "the check can fail"
